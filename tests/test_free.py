"""FREE: the expansion behind BELL, the losses, the meta-generator, and a method that resumes, loads and learns."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.base.images import LabelledImages, to_float
from metapool.base.store import Store
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.gradients import Batch
from metapool.learners import MAML
from metapool.meta_model import MetaModel
from metapool.methods import load_model
from metapool.methods.free import FREE, MetaGenerator, Visit, adversarial_loss, divergence, sequential_direction
from metapool.pool import ModelPool
from metapool.recover import GeneratorRecovery, LossWeights
from metapool.student import Student

VISIT = GeneratorRecovery(per_class=4, steps=2, code=8, width=4, shift=1)
BRIEF: dict[str, Any] = {
    "visit": VISIT,
    "teachers": 3,
    "width": 8,
    "way": 3,
    "steps": 7,
    "check_every": 2,
    "warm_up": 0.3,
    "replay_updates": 1,
    "replay_tasks": 2,
    "learning_rate": 0.01,
}
METHOD = FREE(**BRIEF)

# BELL: d = (θ - θ_f) / (n η) ------------------------------------------------------------------------------------------

TASKS = 3
ORDERS = list(itertools.permutations(range(TASKS)))


def smooth_tasks() -> tuple[Params, list[Batch]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {"weight": draw(3, 2).requires_grad_(), "bias": draw(2).requires_grad_()}
    return params, [(draw(6, 3), draw(6, 2)) for _ in range(TASKS)]


def smooth_loss(params: Params, batch: Batch) -> Tensor:
    inputs, wanted = batch
    return (torch.tanh(inputs @ params["weight"] + params["bias"]) - wanted).square().mean()


def flat(gradient: Params) -> Tensor:
    return torch.cat([gradient["weight"].flatten(), gradient["bias"].flatten()])


def gradients_and_products(params: Params, batches: list[Batch]) -> tuple[list[Tensor], Tensor]:
    """g_i, with graphs, and the sum of g_i · g_j over pairs."""
    leaves = list(params.values())
    found = [torch.autograd.grad(smooth_loss(params, batch), leaves, create_graph=True) for batch in batches]
    gradients = [flat(dict(zip(params, parts))) for parts in found]
    return gradients, torch.stack([a @ b for a, b in itertools.combinations(gradients, 2)]).sum()


def expansion(params: Params, batches: list[Batch], rate: float) -> Tensor:
    """(Σ g_i - η/2 Σ_{i<j} ∇(g_i · g_j)) / n by double backward."""
    gradients, products = gradients_and_products(params, batches)
    pull = flat(dict(zip(params, torch.autograd.grad(products, list(params.values())))))
    return (torch.stack(gradients).sum(0).detach() - rate / 2 * pull) / len(batches)


def mean_over_orders(params: Params, batches: list[Batch], rate: float) -> Tensor:
    found = [flat(sequential_direction(smooth_loss, params, batches, rate, order)[0]) for order in ORDERS]
    return torch.stack(found).mean(0)


def errors(of: str) -> list[float]:
    """Distance from the expansion at η, η/2 and η/4."""
    params, batches = smooth_tasks()
    found = []
    for rate in (0.04, 0.02, 0.01):
        if of == "all orders":
            direction = mean_over_orders(params, batches, rate)
        else:
            direction = flat(sequential_direction(smooth_loss, params, batches, rate, ORDERS[0])[0])
        found.append((direction - expansion(params, batches, rate)).norm().item())
    return found


def test_the_mean_over_orders_is_the_expansion_up_to_second_order() -> None:
    first, second, third = errors("all orders")
    assert first > 1e-8, "the error is no rounding noise"
    torch.testing.assert_close(
        torch.tensor([first / second, second / third]), torch.tensor([4.0, 4.0]), rtol=0.1, atol=0
    )


def test_a_single_order_is_not() -> None:
    """Companion: there the error is of first order, and halves."""
    first, second, third = errors("one order")
    torch.testing.assert_close(
        torch.tensor([first / second, second / third]), torch.tensor([2.0, 2.0]), rtol=0.1, atol=0
    )
    assert first > 10 * errors("all orders")[0]


@pytest.mark.parametrize("order", ORDERS[:3], ids=str)
def test_the_direction_is_where_sgd_ends_and_the_parameters_stay(order: tuple[int, ...]) -> None:
    params, batches = smooth_tasks()
    before = {name: value.detach().clone() for name, value in params.items()}
    direction, stats = sequential_direction(smooth_loss, params, batches, 0.1, order)
    moved = [value.detach().clone().requires_grad_() for value in params.values()]
    losses = []
    for index in order:
        optimizer = torch.optim.SGD(moved, 0.1)
        optimizer.zero_grad()
        loss = smooth_loss(dict(zip(params, moved)), batches[index])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for (name, start), end in zip(before.items(), moved):
        torch.testing.assert_close(direction[name], (start - end.detach()) / (TASKS * 0.1))
        torch.testing.assert_close(params[name].detach(), start, rtol=0, atol=0)
    assert stats.loss == pytest.approx(sum(losses) / TASKS)


def test_without_a_rate_it_is_the_mean_gradient() -> None:
    params, batches = smooth_tasks()
    mean = torch.stack(gradients_and_products(params, batches)[0]).mean(0).detach()
    torch.testing.assert_close(flat(sequential_direction(smooth_loss, params, batches, 0.0, (2, 0, 1))[0]), mean)
    other = flat(sequential_direction(smooth_loss, params, batches, 0.1, (2, 0, 1))[0])
    assert (other - mean).norm() > 1e-3


def test_it_raises_the_inner_products_of_gradients() -> None:
    """Against the mean gradient, which pays no heed to them; the opposite correction lowers them."""
    params, batches = smooth_tasks()
    plain, bent = mean_over_orders(params, batches, 0.0), mean_over_orders(params, batches, 0.05)

    def products_after(direction: Tensor) -> float:
        start = torch.cat([value.detach().flatten() for value in params.values()])
        there = start - 0.01 * direction
        moved = {"weight": there[:6].view(3, 2).requires_grad_(), "bias": there[6:].clone().requires_grad_()}
        return gradients_and_products(moved, batches)[1].item()

    assert products_after(bent) > products_after(plain) > products_after(2 * plain - bent)


# Losses ---------------------------------------------------------------------------------------------------------------

TEACHER = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.5, 0.0, -1.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.3, 0.1, 0.0], [2.0, 0.0, 1.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
"""They agree on the first image and on the last."""


def slow_divergence(teacher: Tensor, student: Tensor) -> list[float]:
    found = []
    for row, other in zip(teacher.tolist(), student.tolist()):
        p, q = ([math.exp(v) / sum(map(math.exp, logits)) for v in logits] for logits in (row, other))
        found.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
    return found


def test_divergence_of_teacher_from_student() -> None:
    expected = torch.tensor(slow_divergence(TEACHER, STUDENT), dtype=torch.float64)
    torch.testing.assert_close(divergence(TEACHER, STUDENT), expected)
    torch.testing.assert_close(divergence(TEACHER, TEACHER + 5), torch.zeros(3, dtype=torch.float64))
    assert (divergence(STUDENT, TEACHER) - expected).abs().min() > 1e-3, "the other way round it is another number"


def test_only_the_outputs_that_the_teacher_has_count() -> None:
    wider = torch.cat([STUDENT, torch.full((3, 2), 9.0, dtype=torch.float64)], 1)
    torch.testing.assert_close(divergence(TEACHER, wider), divergence(TEACHER, STUDENT))
    torch.testing.assert_close(adversarial_loss(TEACHER, wider), adversarial_loss(TEACHER, STUDENT))


def test_the_adversarial_loss_counts_images_on_which_both_agree() -> None:
    first, apart, last = slow_divergence(TEACHER, STUDENT)
    torch.testing.assert_close(adversarial_loss(TEACHER, STUDENT).item(), -(first + last) / 3)
    assert apart > 1e-2, "what is left out is something"


def test_descending_the_adversarial_loss_drives_the_two_apart() -> None:
    """On an image that both networks see, the gradient passes through the frozen student too."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    image = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    student += (1 + (teacher - student).norm()) * image.T @ F.one_hot((image @ teacher).argmax(1), 3).double()
    image.requires_grad_()
    loss = adversarial_loss(image @ teacher, image @ student)
    assert loss < 0, "they agree"
    (whole,) = torch.autograd.grad(loss, image)
    (cut,) = torch.autograd.grad(adversarial_loss(image @ teacher, (image @ student).detach()), image)
    assert adversarial_loss((image - 1e-3 * whole) @ teacher, (image - 1e-3 * whole) @ student) < loss
    assert (whole - cut).norm() > 1e-3


# FIVE -----------------------------------------------------------------------------------------------------------------


def five(pool: ModelPool, method: FREE = METHOD, seed: int = 0) -> MetaGenerator:
    input = pool.input
    noise = torch.zeros(2, *input.shape, dtype=torch.uint8)
    return MetaGenerator(method, pool, Student(8, 3, method.learner, input, noise, seed), seed)


def weights_of(made: MetaGenerator) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.painters.named_parameters()}


def silent_rival(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3)).unsqueeze(1) * torch.tensor([1.0, -1.0, 0.5])


def test_one_generator_for_every_size_and_colour(tiny_pool: ModelPool) -> None:
    made = five(tiny_pool)
    assert set(made.painters) == {"(1, 16, 16)", "(3, 32, 32)"}
    before = weights_of(made)
    grey = tiny_pool[:2]
    made.pool = grey
    made.step(None, torch.Generator().manual_seed(0))
    changed = {name.split(".")[0] for name, value in weights_of(made).items() if not torch.equal(value, before[name])}
    assert changed == {"(1, 16, 16)"}, "that of a size which no model of the step has stays"


def test_the_meta_gradient_is_the_mean_of_those_at_the_end_of_every_visit(tiny_pool: ModelPool) -> None:
    """Adam's first step from the mean gradient by hand; with the last gradient alone, it is another."""
    pool = tiny_pool[:2]
    made, again = five(pool), five(pool)
    made.step(None, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(2, generator=generator).tolist()
    painter = again.painters["(1, 16, 16)"]
    gradients = []
    for index in order:
        visit = Visit(METHOD, pool[index], painter.state_dict(), None, generator)
        for _ in range(VISIT.steps):
            visit.step()
        visit.gradient()
        gradients.append([value.grad for value in visit.unknowns[:-1]])
    moments = made.optimizer.state_dict()["state"]
    for place, (value, *parts) in enumerate(zip(painter.parameters(), *gradients)):
        mean = sum(part.double() for part in parts) / 2
        torch.testing.assert_close(moments[place]["exp_avg"].double(), 0.5 * mean, rtol=1e-4, atol=1e-9)
        assert not torch.equal(moments[place]["exp_avg"], 0.5 * parts[-1])
        moved = value.double() - 1e-3 * mean / (mean.abs() + 1e-8)
        torch.testing.assert_close(list(made.painters.parameters())[place].double(), moved, rtol=1e-4, atol=1e-5)


def test_a_few_steps_from_a_trained_generator_do_more_than_from_a_new_one(tiny_pool: ModelPool) -> None:
    pool = tiny_pool[:1]
    method = METHOD.model_copy(update={"visit": VISIT.model_copy(update={"steps": 3})})
    made = five(pool, method)

    def loss_after_a_visit() -> float:
        total = 0.0
        for model in pool:
            phi = made.painters[str(model.input.shape)].state_dict()
            visit = Visit(method, model, phi, None, torch.Generator().manual_seed(9))
            for _ in range(3):
                visit.step()
            total += visit.gradient()
        return total

    new = loss_after_a_visit()
    for step in range(12):
        made.step(None, torch.Generator().manual_seed(step))
    assert loss_after_a_visit() < 0.9 * new


def test_a_visit_leaves_the_common_generator_alone(tiny_pool: ModelPool) -> None:
    made = five(tiny_pool)
    before = weights_of(made)
    visit = Visit(METHOD, tiny_pool[0], made.painters["(1, 16, 16)"].state_dict(), None, torch.Generator())
    visit.step()
    torch.testing.assert_close(weights_of(made), before, rtol=0, atol=0)
    fitted = visit.unknowns[0]
    assert not torch.equal(fitted, before["(1, 16, 16).linear.weight"])


def test_a_rival_adds_the_adversarial_loss(tiny_pool: ModelPool) -> None:
    model = tiny_pool[0]
    phi = five(tiny_pool).painters["(1, 16, 16)"].state_dict()
    alone, rivalled = (Visit(METHOD, model, phi, r, torch.Generator().manual_seed(1)) for r in (None, silent_rival))
    images = alone.best
    expected = alone.loss(images) + METHOD.adversarial * adversarial_loss(model(images), silent_rival(images))
    torch.testing.assert_close(rivalled.loss(images), expected)
    assert adversarial_loss(model(images), silent_rival(images)) < 0
    assert not model._forward_hooks, "nothing is left hanging on the model"


def test_a_model_of_more_classes_than_outputs_shows_some_of_them(tiny_pool: ModelPool) -> None:
    model, phi = tiny_pool[3], five(tiny_pool).painters["(1, 16, 16)"].state_dict()
    assert len(model.classes) == 4
    drawn = {
        tuple(Visit(METHOD, model, phi, None, torch.Generator().manual_seed(s)).outputs.tolist()) for s in range(9)
    }
    assert all(len(outputs) == 3 and list(outputs) == sorted(outputs) for outputs in drawn)
    assert len(drawn) > 1
    whole = Visit(METHOD, tiny_pool[0], phi, None, torch.Generator())
    assert whole.outputs.tolist() == [0, 1, 2], "the same output means the same class at every visit"


def test_the_images_of_all_models_of_a_step_are_remembered(tiny_pool: ModelPool) -> None:
    made = five(tiny_pool, METHOD.model_copy(update={"teachers": 4}))
    tasks, _ = made.step(None, torch.Generator().manual_seed(0))
    assert (len(made.memory), tasks) == (0, []), "nothing in the warm-up"
    tasks, _ = made.step(silent_rival, torch.Generator().manual_seed(0))
    assert set(made.memory.labelled().classes) == {name for model in tiny_pool for name in model.classes}
    assert sorted(len(images) for images, _ in tasks) == [4 * k for k in (2, 3, 3, 4)]
    assert len(made.memory) == 4 * (2 + 3 + 3 + 4)
    assert {tuple(images.shape[1:]) for images, _ in tasks} == {tiny_pool.input.shape}


# The method -----------------------------------------------------------------------------------------------------------


def bytes_of(model: MetaModel, folder: Path) -> bytes:
    folder.mkdir()
    model.save(folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tiny_pool: ModelPool, toy_images: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> MetaModel:
    return METHOD.fit(tiny_pool, Store(tmp_path_factory.mktemp("free"), threads=1), 0, toy_images)


def test_a_record_of_every_step(unbroken: MetaModel, tiny_pool: ModelPool) -> None:
    assert [record["step"] for record in unbroken.history] == list(range(7))
    assert [("replay" in record, "loss" in record) for record in unbroken.history] == 2 * [(False, False)] + 5 * [
        (True, True)
    ]
    for record in unbroken.history:
        numbers = [record[name] for name in ("recovery", "loss", "discrepancy", "cosine", "replay") if name in record]
        assert torch.tensor(numbers).isfinite().all()
    assert unbroken.input == tiny_pool.input


def test_same_seed_same_bits_other_seed_other_bits(
    unbroken: MetaModel, tiny_pool: ModelPool, toy_images: LabelledImages, tmp_path: Path
) -> None:
    torch.manual_seed(1234)  # the global seed decides nothing
    store = Store(tmp_path / "store", threads=1)
    again, other = (METHOD.fit(tiny_pool, store, seed, toy_images) for seed in (0, 1))
    assert bytes_of(again, tmp_path / "again") == bytes_of(unbroken, tmp_path / "first")
    assert bytes_of(other, tmp_path / "other") != bytes_of(unbroken, tmp_path / "unbroken")


@pytest.mark.parametrize("stops", [(1,), (2, 5), (7,)], ids=str)
def test_a_broken_run_ends_like_an_unbroken_one(
    stops: tuple[int, ...], unbroken: MetaModel, tiny_pool: ModelPool, toy_images: LabelledImages, tmp_path: Path
) -> None:
    """In the warm-up, on and between checkpoints, and after the last one, when only the saving is left."""
    left = list(stops)

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "meta-train" and left and done == left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    store = Store(tmp_path / "store", threads=1, progress=stop)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            METHOD.fit(tiny_pool, store, 0, toy_images)
    resumed = METHOD.fit(tiny_pool, store, 0, toy_images)
    assert not left
    assert bytes_of(resumed, tmp_path / "resumed") == bytes_of(unbroken, tmp_path / "unbroken")
    assert resumed.history == unbroken.history


@pytest.mark.parametrize("part", ["phi", "optimizer", "memory"])
def test_every_part_of_its_state_is_needed(
    part: str,
    unbroken: MetaModel,
    tiny_pool: ModelPool,
    toy_images: LabelledImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Companion: with one part forgotten at the reload, the end is another."""
    running = True

    def stop(kind: str, done: int, total: int) -> None:
        if running and kind == "meta-train" and done == 4:
            raise KeyboardInterrupt

    store = Store(tmp_path / "store", threads=1, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        METHOD.fit(tiny_pool, store, 0, toy_images)
    running = False
    complete = MetaGenerator.load_state_dict

    def forgetful(self: MetaGenerator, state: dict[str, Any]) -> None:
        complete(self, {**state, part: self.state_dict()[part]})

    monkeypatch.setattr(MetaGenerator, "load_state_dict", forgetful)
    resumed = METHOD.fit(tiny_pool, store, 0, toy_images)
    assert bytes_of(resumed, tmp_path / "resumed") != bytes_of(unbroken, tmp_path / "unbroken")


def test_a_saved_model_answers_alike(unbroken: MetaModel, tmp_path: Path) -> None:
    bytes_of(unbroken, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    images = to_float(toys.stripes(range(3), 4, seed=3).images)
    support, query = images[::2], images[1::2]
    labels = torch.arange(3).repeat_interleave(2)
    expected = unbroken.classify(unbroken.encode(support), labels, unbroken.encode(query))
    torch.testing.assert_close(
        loaded.classify(loaded.encode(support), labels, loaded.encode(query)), expected, rtol=0, atol=0
    )
    assert expected.std() > 0


def test_every_setting_decides(unbroken: MetaModel, tiny_pool: ModelPool, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"adversarial": 0.0},
        {"inner_rate": 0.5},
        {"warm_up": 0.5},
        {"memory": 2},
        {"visit": VISIT.model_copy(update={"weights": LossWeights(batch_norm=0.0)})},
        {"learner": MAML(inner_steps=1, test_steps=1)},
    ]
    store = Store(tmp_path / "store", threads=1)
    short = METHOD.model_copy(update={"steps": 2, "warm_up": 0.0})
    models = [short.model_copy(update=change).fit(tiny_pool, store, 0) for change in changes]
    assert len({bytes_of(model, tmp_path / str(place)) for place, model in enumerate(models)}) == len(changes)
    assert models[-1].learner.name == "maml"


@pytest.mark.parametrize("models", [0, 2], ids=["no model", "one class name"])
def test_a_pool_of_which_no_episode_can_be_made(models: int, tiny_pool: ModelPool, tmp_path: Path) -> None:
    one = [entry.model_copy(update={"classes": ("dog",)}) for entry in tiny_pool.manifest.models[:models]]
    pool = ModelPool(tiny_pool.path, tiny_pool.manifest.model_copy(update={"models": tuple(one)}))
    with pytest.raises(MetapoolError, match="two or more class names"):
        METHOD.fit(pool, Store(tmp_path / "store", threads=1), 0)


def test_beats_chance_on_new_classes(tmp_path: Path) -> None:
    images = toys.stripes(toys.NEW_KINDS, 20, seed=5)
    episodes = sample_episodes(images, 4, 5, 5, 60, seed=0)
    visit = GeneratorRecovery(per_class=8, steps=5, code=16, width=8, shift=1, learning_rate=0.02)
    method = FREE(**{**BRIEF, "visit": visit, "steps": 12, "check_every": 12})
    model = method.fit(toys.striped_pool(tmp_path / "pool"), Store(tmp_path / "store", threads=1), 0)
    assert evaluate(model, images, episodes).interval.low > 25 + 10
    wrong = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = LabelledImages(images.images[wrong], images.labels, images.classes)
    assert 15 < evaluate(model, shuffled, episodes).interval.mean < 35, "labels that mean nothing leave chance"
