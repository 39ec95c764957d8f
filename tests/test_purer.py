"""PURER: formulas against slow references, its dataset and switch, a fit in seconds, the calibration at test time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import toys
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.base.images import LabelledImages, to_float
from metapool.base.store import Store, generator_for
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.learners import ANIL, MAML, FewShotModel, ProtoNet, episode_loss
from metapool.meta_model import MetaModel
from metapool.methods import load_model
from metapool.methods.purer import PURER, Curriculum, Switch, turn
from metapool.methods.purer.calibration import Adapted, Calibrated, Calibration, contrastive_loss
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import LossWeights, PixelRecovery, inversion_loss

BRIEF: dict[str, Any] = {
    "width": 8,
    "way": 3,
    "query": 2,
    "per_class": 4,
    "teachers": 2,
    "episodes": 2,
    "curriculum_start": 2,
    "patience": 1,
    "steps": 7,
    "check_every": 2,
}
CALIBRATION = Calibration(recovery=PixelRecovery(per_class=3, steps=4, learning_rate=0.1), steps=3, rate=0.1)


def brief(**changes: Any) -> PURER:
    return PURER(**{**BRIEF, **changes})


def weights(model: FewShotModel, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    model.save(folder)
    found = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}
    assert found
    return found


def answers(model: FewShotModel, count: int = 6) -> Tensor:
    images = to_float(toys.stripes(range(3), 6, seed=3).images)
    support = torch.tensor([0, 6, 7, 12])
    return model.classify(model.encode(images[support]), torch.tensor([0, 1, 1, 2]), model.encode(images[3::3][:count]))


# The switch -----------------------------------------------------------------------------------------------------------


def switched(accuracies: list[float], start: int, patience: int) -> list[bool]:
    """The rule as it is told: at ``start``; then whenever the best is that of ``patience`` steps ago or older."""
    on = [step == start for step in range(len(accuracies) + 1)]
    since = start
    for step in range(start, len(accuracies)):
        seen = accuracies[since : step + 1]
        best = max(range(len(seen)), key=lambda i: (seen[i], -i)) if max(seen) > 0 else -1
        if len(seen) - 1 - best >= patience:
            on[step + 1] = True
            since = step + 1
    return on


def turned(accuracies: list[float], start: int, patience: int) -> list[bool]:
    switch = Switch(on=start == 0)
    on = [switch.on]
    for step, accuracy in enumerate(accuracies):
        switch = turn(switch, step, accuracy, start, patience)
        on.append(switch.on)
    return on


@pytest.mark.parametrize("start", [0, 1, 5, 100])
@pytest.mark.parametrize("patience", [1, 2, 6])
def test_the_switch_follows_the_rule(start: int, patience: int) -> None:
    generator = torch.Generator().manual_seed(start)
    for _ in range(10):
        accuracies = torch.randint(0, 6, (40,), generator=generator).double().tolist()
        assert turned(accuracies, start, patience) == switched(accuracies, start, patience)
    assert turned([float(i) for i in range(1, 41)], start, patience).count(True) == (start <= 40), (
        "it never stops rising"
    )


def test_the_switch_by_hand() -> None:
    accuracies = [50.0, 90.0, 40.0, 60.0, 60.0, 55.0, 60.0, 20.0, 30.0, 30.0]
    assert [step for step, on in enumerate(turned(accuracies, 2, 2)) if on] == [2, 6, 9]
    assert [step for step, on in enumerate(turned(accuracies, 2, 3)) if on] == [2, 7]
    assert turn(Switch(60.0, 1), 5, 60.0, 2, 2) == Switch(on=True), "best and count are forgotten"
    assert turn(Switch(on=True), 6, 60.0, 2, 2) == Switch(60.0), "on for one step"


# The contrastive loss -------------------------------------------------------------------------------------------------


def contrastive_by_loops(real: Tensor, labels: Tensor, pseudo: Tensor, pseudo_labels: Tensor, tau: float) -> float:
    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    def from_side(anchors: Tensor, classes: Tensor, others: Tensor, other_classes: Tensor) -> float:
        total = 0.0
        for anchor, label in zip(anchors, classes):
            sums = sum(math.exp(cosine(anchor, other) / tau) for other in others)
            terms = [
                math.log(math.exp(cosine(anchor, other) / tau) / sums)
                for other, its in zip(others, other_classes)
                if its == label
            ]
            total -= sum(terms) / len(terms) / len(anchors)
        return total

    there, back = (real, labels), (pseudo, pseudo_labels)
    return (from_side(*there, *back) + from_side(*back, *there)) / 2


def features(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real, pseudo = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (4, 7))
    return real, torch.tensor([0, 1, 1, 2]), pseudo, torch.tensor([2, 0, 1, 0, 1, 2, 2])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrastive_loss_is_that_of_the_paper(temperature: float) -> None:
    real, labels, pseudo, others = features()
    found = contrastive_loss(real, labels, pseudo, others, temperature)
    torch.testing.assert_close(found.item(), contrastive_by_loops(real, labels, pseudo, others, temperature))
    torch.testing.assert_close(contrastive_loss(3 * real, labels, pseudo / 7, others, temperature), found)
    torch.testing.assert_close(contrastive_loss(pseudo, others, real, labels, temperature), found)
    for wrong in (
        contrastive_loss(real, labels.flip(0), pseudo, others, temperature),
        contrastive_loss(real, labels, pseudo, others, 2 * temperature),
        contrastive_loss(real + 1, labels, pseudo, others, temperature),
    ):
        assert (wrong - found).abs() > 1e-3


def test_contrastive_loss_is_least_where_classes_fall_together() -> None:
    _, labels, _, others = features()
    axes = torch.eye(3, dtype=torch.float64)
    together = contrastive_loss(axes[labels], labels, axes[others], others, 0.05)
    apart = contrastive_loss(axes[labels], labels, axes[(others + 1) % 3], others, 0.05)
    shares = [torch.bincount(part).double() for part in (labels, others)]  # positives share the probability
    least = (sum(s[part].log().mean() for s, part in zip(shares, (others, labels)))) / 2
    torch.testing.assert_close(together, least, rtol=1e-6, atol=1e-6)
    assert apart > together + 5


# The dynamic dataset --------------------------------------------------------------------------------------------------


def curriculum_of(pool: ModelPool, *, double: bool = False, **changes: Any) -> tuple[Curriculum, Params]:
    found = Curriculum(brief(**changes), pool, 0)
    params = found.student.initial()
    if double:
        found.pixels = [part.detach().double().requires_grad_() for part in found.pixels]
        found.models = [model.double() for model in found.models]
        found.student.network.double()
        params = {name: value.detach().double().requires_grad_() for name, value in params.items()}
    return found, params


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LEARNERS = {
    "protonet": ProtoNet(normalise=True, temperature=0.15),
    "maml": MAML(inner_steps=2, inner_rate=0.1),
    "anil": ANIL(inner_steps=1),
}


@pytest.mark.parametrize("learner", LEARNERS)
def test_gradient_of_the_data_step(learner: str, tiny_pool: ModelPool) -> None:
    """Σ L_inv - β L_out, by one backward pass of the sum as it stands."""
    drawn = torch.tensor([2, 0, 3])
    losses = LossWeights(total_variation=0.1, l2=0.01)
    found, params = curriculum_of(tiny_pool, double=True, learner=LEARNERS[learner], shift=0, weights=losses)
    leaves = [found.pixels[i] for i in drawn]
    inversion = [
        inversion_loss(found.models[i], found.pixels[i].sigmoid(), found.targets[i], losses) for i in drawn.tolist()
    ]
    images, labels = found.episode(drawn, generator())
    outer = episode_loss(found.method.learner, found.student.network, params, images, labels, found.method.shot)
    plain = torch.autograd.grad(torch.stack(inversion).sum(), leaves, retain_graph=True)
    harder = torch.autograd.grad(torch.stack(inversion).sum() - 10 * outer, leaves)

    off, mean = found.gradients(drawn, params, generator())
    found.switch = Switch(on=True)
    on, same = found.gradients(drawn, params, generator())
    for part, expected in zip((*off, *on), (*plain, *harder), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-12)
    assert mean == same == pytest.approx(torch.stack(inversion).mean().item())
    for first, second in zip(plain, harder):
        assert (first - second).abs().max() > 1e-3 * first.abs().max(), "the adversarial part reaches every size"


def test_inversion_losses_are_added_once(tiny_pool: ModelPool) -> None:
    """Companion: a running sum, as in the published code, would weigh the first of three models three times."""
    drawn = torch.tensor([2, 0, 3])
    found, params = curriculum_of(tiny_pool, double=True, shift=0)
    together, _ = found.gradients(drawn, params, generator())
    for place, owner in enumerate(drawn):
        (alone,), _ = found.gradients(owner.view(1), params, generator())
        torch.testing.assert_close(together[place], alone, rtol=1e-12, atol=1e-15)
        assert (3 * alone - together[place]).abs().max() > 1e-3 * alone.abs().max()


@pytest.mark.parametrize("learner", LEARNERS)
def test_outer_loss_is_the_learner_s(learner: str, tiny_pool: ModelPool) -> None:
    found, params = curriculum_of(tiny_pool, double=True, learner=LEARNERS[learner])
    images, labels = found.episode(torch.arange(4), generator())
    loss, accuracy = found.outer(torch.arange(4), params, generator())
    expected = episode_loss(found.method.learner, found.student.network, params, images, labels, 1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert accuracy.item() in [pytest.approx(100 * right / 6) for right in range(7)]
    other, _ = found.outer(torch.arange(4), params, generator(1))
    assert (other - loss).abs() > 1e-3


def test_harder_is_a_larger_outer_loss(tiny_pool: ModelPool) -> None:
    drawn = torch.arange(4)
    found, params = curriculum_of(tiny_pool, double=True, shift=0)
    before, _ = found.outer(drawn, params, generator())
    plain, _ = found.gradients(drawn, params, generator())
    found.switch = Switch(on=True)
    harder, _ = found.gradients(drawn, params, generator())
    with torch.no_grad():
        for pixels, one, other in zip(found.pixels, plain, harder):
            pixels -= 1e-3 * (other - one) / (other - one).norm().clamp(min=1e-12)
    after, _ = found.outer(drawn, params, generator())
    assert after > before


def test_only_the_drawn_images_move(tiny_pool: ModelPool) -> None:
    found, params = curriculum_of(tiny_pool)
    found.switch = Switch(on=True)
    starts = [part.detach().clone() for part in found.pixels]
    found.move(torch.tensor([1, 2]), params, generator())
    assert [torch.equal(part, start) for part, start in zip(found.pixels, starts)] == [True, False, False, True]
    assert set(found.optimizer.state_dict()["state"]) == {1, 2}
    moments = found.optimizer.state[found.pixels[1]]["exp_avg"].clone()
    found.move(torch.tensor([0, 2]), params, generator(1))
    torch.testing.assert_close(found.optimizer.state[found.pixels[1]]["exp_avg"], moments, rtol=0, atol=0)
    counts = {i: int(state["step"]) for i, state in found.optimizer.state_dict()["state"].items()}
    assert counts == {0: 1, 1: 1, 2: 2}
    assert all(value.grad is None for value in params.values()), "the meta-model does not move"


def test_episodes_mix_models_and_classes_go_by_name(tiny_pool: ModelPool) -> None:
    found, _ = curriculum_of(tiny_pool, per_class=3)
    seen = torch.cat([found.input.prepare(part.detach().sigmoid()) for part in found.pixels])
    names = [model.classes[int(label)] for model, part in zip(tiny_pool, found.targets) for label in part]
    owners = found.owner.tolist()
    rows_of = {image.numpy().tobytes(): row for row, image in enumerate(seen)}
    mixed = 0
    for seed in range(20):
        drawn = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 0, 2], [0, 2, 1, 3]][seed % 4][: 2 + seed % 3])
        images, labels = found.episode(drawn, generator(seed))
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        rows = [rows_of[image.detach().numpy().tobytes()] for image in images]
        assert len(set(rows)) == 9, "no image stands twice, so no query is known"
        assert {owners[row] for row in rows} <= set(drawn.tolist())
        classes = [{names[row] for row in rows[3 * k : 3 * k + 3]} for k in range(3)]
        assert all(len(found) == 1 for found in classes)
        assert len(set.union(*classes)) == 3
        mixed += any(len({owners[row] for row in rows[3 * k : 3 * k + 3]}) > 1 for k in range(3))
    assert mixed, "a class of one name in two models is one class"


def test_inversion_goes_on(tiny_pool: ModelPool) -> None:
    """The dataset comes nearer to what its model knows, image by image of the model's own size."""
    found, params = curriculum_of(tiny_pool)
    losses = [found.move(torch.tensor([2]), params, generator(step)) for step in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert tuple(found.pixels[2].shape[1:]) == (3, 32, 32)
    assert tuple(found.images().shape) == (4 * 12, *tiny_pool.input.shape)


# A fit ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tiny_pool: ModelPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, FewShotModel]:
    store = Store(tmp_path_factory.mktemp("purer"), threads=1)
    return store, brief().fit(tiny_pool, store, 0)


def test_same_seed_same_bits_other_seed_other_bits(
    tiny_pool: ModelPool, kept: tuple[Store, FewShotModel], store: Store, tmp_path: Path
) -> None:
    first = weights(kept[1], tmp_path / "first")
    torch.manual_seed(1234)
    assert weights(brief().fit(tiny_pool, store, 0), tmp_path / "again") == first
    assert weights(brief().fit(tiny_pool, store, 1), tmp_path / "other") != first


def test_history_and_a_saved_model_that_answers_alike(kept: tuple[Store, FewShotModel], tmp_path: Path) -> None:
    model = kept[1]
    assert isinstance(model, MetaModel)
    assert [record["step"] for record in model.history] == list(range(7))
    harder = [record["harder"] for record in model.history]
    assert harder[:4] == [False, False, True, False]
    numbers = [[record[name] for name in ("inversion", "loss", "accuracy")] for record in model.history]
    assert torch.tensor(numbers).isfinite().all()
    weights(model, tmp_path / "saved")
    torch.testing.assert_close(answers(load_model(tmp_path / "saved")), answers(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [{"adversarial": 0.0}, {"curriculum_start": 4}, {"patience": 3}, {"pixel_rate": 0.2}, {"shift": 0}],
    ids=str,
)
def test_every_setting_counts(
    change: dict[str, Any], tiny_pool: ModelPool, kept: tuple[Store, FewShotModel], tmp_path: Path
) -> None:
    other = brief(**change).fit(tiny_pool, kept[0], 0)
    assert weights(other, tmp_path / "other") != weights(kept[1], tmp_path / "first")


@pytest.mark.parametrize("learner", [MAML(inner_steps=1, test_steps=2), ANIL(inner_steps=1, test_steps=2)], ids=str)
def test_learners_that_descend(learner: MAML | ANIL, tiny_pool: ModelPool, store: Store) -> None:
    model = brief(learner=learner, steps=4, way=7, teachers=40).fit(tiny_pool, store, 0)
    assert isinstance(model, MetaModel)
    assert model.spec.classes == 7
    assert answers(model).isfinite().all()


@pytest.mark.parametrize("stop", [1, 3, 5, 7], ids=lambda stop: f"after-{stop}")
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    stop: int,
    tiny_pool: ModelPool,
    kept: tuple[Store, FewShotModel],
    store: Store,
    tmp_path: Path,
) -> None:
    """After the last step too: what is saved then must have the statistics of the images as they ended."""
    steps: list[int] = []

    def interrupt(kind: str, done: int, total: int) -> None:
        if kind == "meta-train":
            steps.append(done)
            if done == stop and len(steps) == stop:
                raise KeyboardInterrupt

    store.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        brief().fit(tiny_pool, store, 0)
    resumed = brief().fit(tiny_pool, store, 0)
    again = stop if stop == 7 else stop - stop % 2
    assert steps == [*range(1, stop + 1), *range(again + 1, 8)]
    assert weights(resumed, tmp_path / "resumed") == weights(kept[1], tmp_path / "unbroken")
    assert isinstance(resumed, MetaModel)
    assert isinstance(kept[1], MetaModel)
    assert resumed.history == kept[1].history


@pytest.mark.parametrize("part", ["pixels", "optimizer", "switch"])
def test_every_part_of_the_state_is_needed(
    part: str,
    tiny_pool: ModelPool,
    kept: tuple[Store, FewShotModel],
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Companion: with one part forgotten at the reload, the end is another."""

    def interrupt(kind: str, done: int, total: int) -> None:
        if kind == "meta-train" and done == 4:
            store.progress = lambda *_: None
            raise KeyboardInterrupt

    store.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        brief(patience=2).fit(tiny_pool, store, 0)
    complete = Curriculum.load_state_dict

    def forgetful(self: Curriculum, state: dict[str, Any]) -> None:
        complete(self, {**state, part: Curriculum(brief(), tiny_pool, 0).state_dict()[part]})

    monkeypatch.setattr(Curriculum, "load_state_dict", forgetful)
    resumed = brief(patience=2).fit(tiny_pool, store, 0)
    monkeypatch.undo()
    unbroken = brief(patience=2).fit(tiny_pool, kept[0], 0)
    assert weights(resumed, tmp_path / "resumed") != weights(unbroken, tmp_path / "unbroken")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPool, Store]:
    folder = tmp_path_factory.mktemp("stripes")
    return toys.striped_pool(folder / "pool"), Store(folder / "store", threads=1)


@pytest.fixture(scope="module")
def solved(stripes: tuple[ModelPool, Store]) -> MetaModel:
    model = brief(steps=60, curriculum_start=30, patience=3, per_class=8, check_every=30).fit(*stripes, seed=0)
    assert isinstance(model, MetaModel)
    return model


@pytest.mark.parametrize("calibrate", [False, True], ids=["plain", "calibrated"])
def test_beats_chance_on_new_classes(calibrate: bool, solved: MetaModel) -> None:
    images = toys.stripes(toys.NEW_KINDS, 20, seed=5)
    episodes = sample_episodes(images, 4, 5, 5, 30 if calibrate else 60, seed=0)
    model: FewShotModel = Calibrated(solved, CALIBRATION) if calibrate else solved
    assert evaluate(model, images, episodes).interval.low > 25 + 10
    wrong = torch.randperm(len(images), generator=generator())
    shuffled = LabelledImages(images.images[wrong], images.labels, images.classes)
    assert 15 < evaluate(model, shuffled, episodes).interval.mean < 35, "labels that mean nothing leave chance"


# The calibration ------------------------------------------------------------------------------------------------------


def episode(model: Calibrated) -> tuple[Tensor, Tensor, Tensor]:
    images = model.encode(to_float(toys.stripes(toys.NEW_KINDS, 4, seed=7).images))
    return images[::4], torch.arange(4), images[1::2]


def encoded(images: Tensor, model: MetaModel, params: Params | None = None) -> Tensor:
    params = dict(model.network.named_parameters()) if params is None else params
    return model.learner.encode(model.network, params, dict(model.network.named_buffers()), images)


def test_a_query_never_sees_another_query(solved: MetaModel) -> None:
    model = Calibrated(solved, CALIBRATION)
    support, labels, query = episode(model)
    logits = model.classify(support, labels, query)
    order = torch.tensor([3, 0, 5, 1, 4, 2, 7, 6])
    torch.testing.assert_close(model.classify(support, labels, query[order]), logits[order])
    torch.testing.assert_close(model.classify(support, labels, query[2:3]), logits[2:3])
    strange = torch.cat([query, torch.full((3, *query.shape[1:]), 4.0)])
    torch.testing.assert_close(model.classify(support, labels, strange)[:8], logits)
    changed = torch.cat([-support[:1], support[1:]])
    assert (model.classify(changed, labels, query) - logits).abs().max() > 1e-2, "the support it does see"
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "the queries do differ"


def test_calibration_brings_real_and_inverted_features_together(solved: MetaModel) -> None:
    model = Calibrated(solved, CALIBRATION)
    support, labels, query = episode(model)
    adapted = PretrainedModel("adapted", Adapted(solved, support, labels), solved.input, ["a", "b", "c", "d"])
    grey = support * solved.input.std[0] + solved.input.mean[0]
    torch.testing.assert_close(adapted(grey), solved.logits(grey, labels, grey), rtol=1e-3, atol=1e-3)
    pseudo = PixelRecovery(per_class=3, steps=30, learning_rate=0.1).recover(adapted, generator())
    assert pseudo.record["agreement"] > 25 + 30, "the adapted network takes most of them for what was asked for"

    def loss(settings: Calibration) -> float:
        calibrated = Calibrated(solved, settings)
        params = calibrated.calibrated(support, labels)
        inverted = settings.recovery.recover(adapted, generator_for(0, "purer", "calibrate"))
        images = torch.cat([support, solved.input.prepare(to_float(inverted.images))])
        found = encoded(images, solved, params)
        return contrastive_loss(found[:4], labels, found[4:], inverted.labels, settings.temperature).item()

    still = CALIBRATION.model_copy(update={"rate": 1e-12})
    assert loss(CALIBRATION) < loss(still) - 0.01
    moved, plain = (Calibrated(solved, settings).classify(support, labels, query) for settings in (CALIBRATION, still))
    expected = solved.classify(encoded(support, solved), labels, encoded(query, solved))
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-3)
    assert (moved - expected).abs().max() > 1e-2


def test_calibration_leaves_the_model_and_the_global_seed_alone(solved: MetaModel, tmp_path: Path) -> None:
    before = weights(solved, tmp_path / "before")
    first = answers(Calibrated(solved, CALIBRATION))
    torch.manual_seed(7)
    with torch.no_grad():
        torch.testing.assert_close(answers(Calibrated(solved, CALIBRATION)), first, rtol=0, atol=0)
    assert weights(solved, tmp_path / "after") == before


def test_a_calibrated_model_is_saved_and_answers_alike(
    tiny_pool: ModelPool, kept: tuple[Store, FewShotModel], tmp_path: Path
) -> None:
    store, plain = kept
    before = set(store.root.rglob("made.json"))
    model = brief(calibrate=True, calibration=CALIBRATION).fit(tiny_pool, store, 0)
    assert set(store.root.rglob("made.json")) == before, "the same training"
    assert isinstance(model, Calibrated)
    weights(model, tmp_path / "saved")
    loaded = Calibrated.load(tmp_path / "saved")
    assert loaded.calibration == CALIBRATION
    torch.testing.assert_close(answers(loaded), answers(model), rtol=0, atol=0)
    assert not torch.equal(answers(model), answers(plain))
    assert (loaded.input, loaded.parameter_count) == (plain.input, plain.parameter_count)
    assert loaded.models_at_inference == 1


BROKEN: dict[str, Callable[[Path], object]] = {
    "no model.json": lambda folder: (folder / "model.json").unlink(),
    "another kind": lambda folder: (folder / "model.json").write_text('{"kind": "meta-model", "version": 1}'),
    "no meta-model": lambda folder: (folder / "meta-model" / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_holds_no_calibrated_model(how: str, tmp_path: Path) -> None:
    model = Calibrated(MetaModel.load(toys.saved_model(tmp_path / "plain")), CALIBRATION)
    weights(model, tmp_path / "model")
    assert Calibrated.load(tmp_path / "model").calibration == CALIBRATION
    BROKEN[how](tmp_path / "model")
    with pytest.raises(MetapoolError, match=str(tmp_path / "model")):
        Calibrated.load(tmp_path / "model")


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(tiny_pool: ModelPool, store: Store, tmp_path: Path) -> None:
    with pytest.raises(MetapoolError, match=r"per_class is 4.*shot \+ query = 5"):
        brief(query=4).fit(tiny_pool, store, 0)
    with pytest.raises(MetapoolError, match=r"calibrate needs .*not maml"):
        brief(calibrate=True, learner=MAML()).fit(tiny_pool, store, 0)
    alone = ModelPool.create(tmp_path / "alone", "alone")
    spec, input = cases.network_spec("conv4", (1, 16, 16), 1), cases.input_spec((1, 16, 16))
    network = cases.build(spec, generator())
    alone.add(PretrainedModel("one", network, input, ["only"], spec=spec))
    with pytest.raises(MetapoolError, match="two names or more"):
        brief().fit(alone, store, 0)
    assert not (store.root / "meta-model").exists()


def test_settings() -> None:
    for field in PURER.model_fields.values():
        assert field.description
    again = PURER.model_validate(PURER(calibrate=True).model_dump(mode="json"))
    assert again == PURER(calibrate=True) != PURER()
    with pytest.raises(ValueError, match="patience"):
        PURER(patience=0)
