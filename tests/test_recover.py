"""Recovery of any model: balanced labels, falling cross-entropy, rising agreement, the same bits by seed."""

from collections.abc import Callable

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool import recover
from metapool.bank import TaskBank
from metapool.base.images import to_float
from metapool.base.store import Store
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import (
    Generator,
    GeneratorRecovery,
    LossWeights,
    PixelRecovery,
    batch_norm_distances,
    batch_norms,
    common_key,
    inversion_loss,
    recover_pool,
)

Recovery = GeneratorRecovery | PixelRecovery
SMALL: dict[str, Callable[[int], Recovery]] = {
    "generator": lambda steps: GeneratorRecovery(per_class=4, steps=steps, code=16, width=8, shift=1),
    "pixels": lambda steps: PixelRecovery(per_class=4, steps=steps, shift=1),
}
BOTH = pytest.mark.parametrize("kind", SMALL)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Any model ------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("case", cases.WITH_BATCH_NORM, ids=lambda case: case.name)
def test_any_network_with_batch_norm(kind: str, case: cases.Case) -> None:
    model = case.model()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    task = SMALL[kind](2).recover(model, seeded())
    assert task.images.dtype == torch.uint8
    assert tuple(task.images.shape) == (4 * case.classes, *case.shape)
    assert torch.bincount(task.labels).tolist() == [4] * case.classes
    assert task.classes == model.classes
    with torch.no_grad():
        torch.testing.assert_close(task.logits, model(to_float(task.images)))
    assert set(task.record) == {"loss", "cross_entropy", "agreement", "seconds"}
    torch.testing.assert_close(dict(model.network.state_dict()), before, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


@BOTH
@pytest.mark.parametrize("case", cases.WITHOUT_BATCH_NORM, ids=lambda case: case.name)
def test_without_batch_norm_it_warns_and_uses_priors(kind: str, case: cases.Case) -> None:
    recovery, model = SMALL[kind](3), case.model()
    with pytest.warns(UserWarning, match=f"'{case.name}' has no batch norm: .*priors"):
        task = recovery.recover(model, seeded())
    assert tuple(task.images.shape) == (4 * case.classes, *case.shape)
    silent = recovery.model_copy(update={"weights": recover.PRIORS})
    torch.testing.assert_close(silent.recover(model, seeded()).images, task.images, rtol=0, atol=0)
    none = recovery.model_copy(update={"weights": LossWeights(batch_norm=0.0)})
    assert not torch.equal(none.recover(model, seeded()).images, task.images)


@BOTH
def test_cross_entropy_falls_and_agreement_rises(kind: str, fitted_model: PretrainedModel) -> None:
    weights = {"weights": LossWeights(batch_norm=1.0)}
    start, early, end = (
        SMALL[kind](steps).model_copy(update=weights).recover(fitted_model, seeded()).record for steps in (0, 1, 120)
    )
    assert end["cross_entropy"] < 0.5 * start["cross_entropy"]
    assert end["agreement"] > start["agreement"]
    assert end["agreement"] >= 90
    assert end["loss"] < 0.5 * early["loss"]


@BOTH
def test_batch_norm_weight_brings_statistics_nearer(kind: str, fitted_model: PretrainedModel) -> None:
    def distance(weight: float) -> float:
        recovery = SMALL[kind](40).model_copy(update={"weights": LossWeights(batch_norm=weight)})
        images = recovery.recover(fitted_model, seeded()).images
        with batch_norm_distances(fitted_model.network) as distances, torch.no_grad():
            fitted_model(to_float(images))
        return sum(value.item() for value in distances)

    assert distance(5.0) < 0.7 * distance(0.0)


@BOTH
def test_same_seed_same_bits_other_seed_other_images(kind: str, fitted_model: PretrainedModel) -> None:
    first, again, other = (SMALL[kind](3).recover(fitted_model, seeded(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(again.images, first.images, rtol=0, atol=0)
    torch.testing.assert_close(again.logits, first.logits, rtol=0, atol=0)
    assert not torch.equal(other.images, first.images)


@BOTH
def test_the_global_seed_decides_nothing(kind: str, fitted_model: PretrainedModel) -> None:
    """Nor is it used up: code around a recovery draws the same numbers with and without it."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(SMALL[kind](2).recover(fitted_model, seeded()).images)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# The best iterate -----------------------------------------------------------------------------------------------------


def test_best_iterate_is_kept_and_is_a_copy(monkeypatch: pytest.MonkeyPatch, fitted_model: PretrainedModel) -> None:
    """Losses 3, 1, 2, …: the images of step 1 must be kept, though the pixels move on in place after it."""
    seen: list[Tensor] = []
    truth = recover.inversion_loss

    def scripted(model: PretrainedModel, images: Tensor, labels: Tensor, weights: LossWeights) -> Tensor:
        seen.append(images.detach().clone())
        loss = truth(model, images, labels, weights)
        wanted = [3.0, 1.0, 2.0, 5.0, 4.0][len(seen) - 1]
        return loss * (wanted / loss.detach())

    monkeypatch.setattr(recover, "inversion_loss", scripted)
    task = PixelRecovery(per_class=2, steps=5, shift=0).recover(fitted_model, seeded())
    assert len(seen) == 5
    torch.testing.assert_close(task.images, (255 * seen[1]).round().to(torch.uint8), rtol=0, atol=0)
    assert task.record["loss"] == pytest.approx(1.0)
    for index in (0, 2, 3, 4):
        assert not torch.equal(task.images, (255 * seen[index]).round().to(torch.uint8))


def test_a_loss_that_is_not_a_number_never_wins(monkeypatch: pytest.MonkeyPatch, fitted_model: PretrainedModel) -> None:
    monkeypatch.setattr(recover, "inversion_loss", lambda model, images, *_: images.sum() * float("nan"))
    task = PixelRecovery(per_class=2, steps=3, shift=0).recover(fitted_model, seeded())
    start = PixelRecovery(per_class=2, steps=0).recover(fitted_model, seeded())
    torch.testing.assert_close(task.images, start.images, rtol=0, atol=0)


def test_no_steps_leave_the_untrained_generator_s_images_at_full_contrast(fitted_model: PretrainedModel) -> None:
    generator = seeded()
    painter = Generator(16, 8, fitted_model.input).initialise(generator).to(memory_format=torch.channels_last)
    faint = painter.train()(torch.randn(12, 16, generator=generator)).flatten(1)
    low, high = faint.min(1, keepdim=True).values, faint.max(1, keepdim=True).values
    expected = (255 * (faint - low) / (high - low)).round().to(torch.uint8)
    task = SMALL["generator"](0).recover(fitted_model, seeded())
    torch.testing.assert_close(task.images.flatten(1), expected, rtol=0, atol=1)
    assert (task.images.flatten(1).amax(1) == 255).all(), "black to white, unlike the faint original"
    assert high.max() < 1
    assert not torch.equal(SMALL["generator"](2).recover(fitted_model, seeded()).images, task.images)


# The loss and the generator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_inversion_loss_is_the_formula(case: cases.Case) -> None:
    model = case.model().double()
    images = cases.smooth_images(6, case.shape, seed=9).double()
    labels = torch.arange(6) % case.classes
    weights = LossWeights(batch_norm=0.7, total_variation=0.3, l2=0.2)

    inputs: list[Tensor] = []
    norms = [module for module in model.network.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda _, seen, __: inputs.append(seen[0])) for norm in norms]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    distance = torch.zeros((), dtype=torch.float64)
    for norm, seen in zip(norms, inputs):
        channels = seen.transpose(0, 1).flatten(1)
        mean = channels.sum(1) / channels.shape[1]
        variance = ((channels - mean[:, None]) ** 2).sum(1) / channels.shape[1]
        distance += ((mean - norm.running_mean) ** 2).sum() ** 0.5 + ((variance - norm.running_var) ** 2).sum() ** 0.5
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean()
    right = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean()
    expected = F.cross_entropy(logits, labels) + 0.7 * distance + 0.3 * (down + right) + 0.2 * (images**2).mean() ** 0.5

    found = inversion_loss(model, images, labels, weights)
    torch.testing.assert_close(found, expected)
    assert len(batch_norms(model.network)) == len(norms)
    for part in ("batch_norm", "total_variation", "l2"):
        without = inversion_loss(model, images, labels, weights.model_copy(update={part: 0.0}))
        if part == "batch_norm" and not case.batch_norm:
            torch.testing.assert_close(without, found)
        else:
            assert without < found


def test_norms_that_keep_no_statistics_are_not_counted() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2))
    assert batch_norms(network) == [network[1]]


def test_channel_moments_are_mean_and_biased_variance_with_their_gradients() -> None:
    images = torch.randn(3, 2, 4, 5, dtype=torch.float64).requires_grad_()
    variance, mean = torch.var_mean(images, (0, 2, 3), correction=0)
    torch.testing.assert_close(recover.channel_moments(images), (mean, variance))
    assert torch.autograd.gradcheck(recover.channel_moments, images)
    assert not torch.allclose(recover.channel_moments(images)[1], images.var((0, 2, 3)))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_channel_moments_are_float32_whatever_the_autocast(stored: torch.dtype) -> None:
    images = (2 + 0.5 * torch.randn(16, 3, 16, 16)).to(stored)
    variance, mean = torch.var_mean(images.float(), (0, 2, 3), correction=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = recover.channel_moments(images)
        cast = torch.ones(1, 4) @ torch.ones(4, 1)
    assert cast.dtype == torch.bfloat16, "the cast is on where the moments are taken"
    torch.testing.assert_close(found, (mean, variance), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 20, 28), (2, 17, 31)], ids=str)
def test_generator_makes_images_of_any_size(shape: cases.Shape) -> None:
    painter = Generator(8, 4, cases.input_spec(shape)).initialise(seeded())
    images = painter(torch.randn(5, 8, generator=seeded()))
    assert tuple(images.shape) == (5, *shape)
    assert images.min() >= 0
    assert images.max() <= 1
    again, other = (Generator(8, 4, cases.input_spec(shape)).initialise(seeded(seed)) for seed in (0, 1))
    torch.testing.assert_close(dict(again.named_parameters()), dict(painter.named_parameters()), rtol=0, atol=0)
    assert not torch.equal(other.linear.weight, painter.linear.weight)


# A whole pool ---------------------------------------------------------------------------------------------------------


def test_a_bank_holds_every_model_at_its_own_size(tiny_pool: ModelPool, tiny_bank: TaskBank) -> None:
    assert list(tiny_bank) == tiny_pool.ids
    for model in tiny_pool:
        task = tiny_bank[model.id]
        assert tuple(task.images.shape) == (4 * len(model.classes), *model.input.shape)
        with torch.no_grad():
            torch.testing.assert_close(task.logits, model(to_float(task.images)))


def test_a_model_s_images_do_not_depend_on_the_rest_of_the_pool(tiny_pool: ModelPool, store: Store) -> None:
    recovery = GeneratorRecovery(per_class=2, steps=1, code=8, width=4)
    both = recover_pool(tiny_pool[:2], recovery, store)
    made = len(list((store.root / "recover").glob("*/made.json")))
    alone = recover_pool(tiny_pool[1:2], recovery, Store(store.root.parent / "other"))
    torch.testing.assert_close(alone["b-resnet10"].images, both["b-resnet10"].images, rtol=0, atol=0)
    more = recover_pool(tiny_pool, recovery, store)
    assert len(list((store.root / "recover").glob("*/made.json"))) == made + 2, "two were there already"
    assert more.folders["a-conv4"] == both.folders["a-conv4"]


def test_settings_and_seed_make_another_bank(tiny_pool: ModelPool, store: Store) -> None:
    recovery = GeneratorRecovery(per_class=2, steps=1, code=8, width=4)
    variants = [recovery, *(recovery.model_copy(update=change) for change in ({"seed": 1}, {"steps": 2}, {"shift": 0}))]
    banks = [recover_pool(tiny_pool[:1], variant, store) for variant in variants]
    assert len({bank.digest() for bank in banks}) == 4
    assert not torch.equal(banks[0]["a-conv4"].images, banks[1]["a-conv4"].images)


def test_generators_start_from_a_common_one_where_they_have_its_size(tiny_pool: ModelPool, store: Store) -> None:
    """One step after a warm start is nearer to the first model's statistics than one step after none."""
    cold = GeneratorRecovery(per_class=4, steps=1, code=8, width=4)
    warm = cold.model_copy(update={"warm_steps": 30})
    banks = {recovery.warm_steps: recover_pool(tiny_pool, recovery, store) for recovery in (cold, warm)}
    assert len(list((store.root / "common").glob("*/painter.safetensors"))) == 1
    losses = {steps: {id: task.record["loss"] for id, task in bank.items()} for steps, bank in banks.items()}
    for id in ("a-conv4", "d-conv4"):
        assert losses[30][id] < losses[0][id]
    # Of another size and number of channels: it starts afresh.
    torch.testing.assert_close(banks[30]["c-conv4"].images, banks[0]["c-conv4"].images, rtol=0, atol=0)
    assert not torch.equal(banks[30]["a-conv4"].images, banks[0]["a-conv4"].images)
    assert banks[0].digest() != banks[30].digest()
    assert common_key(tiny_pool, warm) != common_key(tiny_pool[1:], warm)
    for none in (cold, warm.model_copy(update={"steps": 0}), PixelRecovery()):
        assert common_key(tiny_pool, none) is None
