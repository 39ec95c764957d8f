"""BiDf-MKD: services that are only asked, gradients out of answers, bi-level distillation, a budget of queries."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import params_of
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import Network, build
from metapool.base.store import Store
from metapool.blackbox import (
    FLOOR,
    BlackBox,
    ZeroOrderRecovery,
    estimate_gradient,
    sum_of_slopes,
    wanted_loss,
)
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.learners import ANIL, MAML, AnyLearner, ProtoNet
from metapool.methods import load_model
from metapool.methods.bidf_mkd import BiDfMKD
from metapool.methods.bidf_mkd.tasks import Found, Task, adapted_logits, among, boundary_term
from metapool.pool import ModelPool, PretrainedModel
from metapool.student import Student

SHAPE = (1, 4, 4)
NUMBERS = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# A service ------------------------------------------------------------------------------------------------------------


def test_a_service_answers_like_the_model_and_counts(fitted_model: PretrainedModel) -> None:
    box = BlackBox(fitted_model, most=10)
    images = torch.rand(6, 1, 16, 16, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(box(images), fitted_model(images).softmax(1))
    assert (box.queries, box.most) == (6, 10)
    assert (box.classes, box.input) == (fitted_model.classes, fitted_model.input)
    torch.testing.assert_close(box(3 * images[:2] - 1), box((3 * images[:2] - 1).clamp(0, 1)))
    assert box.queries == 10


def test_a_service_is_never_asked_beyond_its_cap(fitted_model: PretrainedModel) -> None:
    box = BlackBox(fitted_model, most=5)
    images = torch.rand(3, 1, 16, 16, generator=generator())
    box(images)
    with pytest.raises(MetapoolError, match=r"'fitted': 3 more images after 3 .* cap of 5"):
        box(images)
    assert box.queries == 3, "what was refused does not count"
    box(images[:2])
    assert box.queries == 5


def test_no_gradient_passes_and_the_model_is_out_of_reach(fitted_model: PretrainedModel) -> None:
    box = BlackBox(fitted_model, most=10)
    images = torch.rand(2, 1, 16, 16, generator=generator()).requires_grad_()
    assert fitted_model(images).requires_grad, "of the model itself there is one"
    assert not box(images).requires_grad
    public = {name for name in dir(box) if not name.startswith("_")}
    assert public == {"classes", "input", "most", "queries"}
    kept = [value for value in vars(box).values() if isinstance(value, nn.Module | Tensor)]
    assert kept == []


def test_a_label_only_service_says_which_class_and_no_more(fitted_model: PretrainedModel) -> None:
    images = torch.rand(8, 1, 16, 16, generator=generator())
    answers = BlackBox(fitted_model, most=8)(images)
    labels = BlackBox(fitted_model, most=8, label_only=True)(images)
    torch.testing.assert_close(labels, F.one_hot(answers.argmax(1), 3).float())
    assert not torch.equal(labels, answers)


# Gradients out of answers ---------------------------------------------------------------------------------------------


def smooth_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(NUMBERS, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def smooth_loss() -> Callable[[Tensor], Tensor]:
    network = smooth_network()
    labels = torch.tensor([0, 1, 2, 1])
    return lambda images: wanted_loss(network(images).softmax(1), labels)


def true_gradient(loss: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(loss(images).sum(), images)[0]


IMAGES = torch.rand(4, *SHAPE, generator=generator(), dtype=torch.float64)


def basis() -> Iterable[Tensor]:
    """An orthonormal one that is not the axes."""
    rotation = torch.linalg.qr(torch.randn(NUMBERS, NUMBERS, generator=generator(7), dtype=torch.float64)).Q
    return (row.expand(len(IMAGES), -1) for row in rotation)


def test_along_a_basis_it_is_the_gradient_up_to_the_radius() -> None:
    loss = smooth_loss()
    true = true_gradient(loss, IMAGES)

    def error(radius: float) -> float:
        found = sum_of_slopes(loss, IMAGES, loss(IMAGES).detach(), basis(), radius).detach()
        return float((found - true).norm())

    assert error(1e-6) < 1e-5 * float(true.norm())
    assert error(1e-2) / error(5e-3) == pytest.approx(2, rel=0.05), "first order in the radius"
    half = [unit for unit in basis()][::2]
    found = sum_of_slopes(loss, IMAGES, loss(IMAGES).detach(), half, 1e-6).detach()
    assert float((found - true).norm()) > 0.2 * float(true.norm()), "half a basis is not enough"


def test_the_estimate_is_the_formula_and_converges_in_the_mean() -> None:
    loss = smooth_loss()
    losses, true = loss(IMAGES).detach(), true_gradient(loss, IMAGES)
    found = estimate_gradient(loss, IMAGES, losses, 3, 1e-3, generator(5)).detach()
    draw, slow = generator(5), torch.zeros_like(IMAGES)
    for _ in range(3):
        noise = torch.randn(IMAGES.shape, generator=draw, dtype=torch.float64)
        for n in range(len(IMAGES)):
            unit = noise[n] / noise[n].square().sum().sqrt()
            moved = IMAGES.clone()
            moved[n] += 1e-3 * unit
            slow[n] += NUMBERS / 3 * (loss(moved)[n] - losses[n]).detach() / 1e-3 * unit
    torch.testing.assert_close(found, slow)

    def distance(directions: int) -> float:
        estimate = estimate_gradient(loss, IMAGES, losses, directions, 1e-5, generator(6)).detach()
        return float((estimate - true).norm() / true.norm())

    assert distance(1500) < 0.2
    assert distance(40) > 0.3, "few directions are not enough"


def test_the_cosine_grows_with_the_directions() -> None:
    loss = smooth_loss()
    true = true_gradient(loss, IMAGES).flatten(1)
    means = []
    for directions in (1, 4, 16, 64):
        found = [
            estimate_gradient(loss, IMAGES, loss(IMAGES).detach(), directions, 1e-4, generator(seed)).flatten(1)
            for seed in range(30)
        ]
        means.append(float(torch.stack([F.cosine_similarity(one.detach(), true) for one in found]).mean()))
    assert means == sorted(means)
    assert means[0] < 0.45 < 0.8 < means[-1] < 1


def test_another_image_does_not_change_an_estimate() -> None:
    loss = smooth_loss()
    other = IMAGES.clone()
    other[0] = 1 - other[0]
    found, changed = (
        estimate_gradient(loss, x, loss(x).detach(), 3, 1e-3, generator()).detach() for x in (IMAGES, other)
    )
    torch.testing.assert_close(found[1:], changed[1:], rtol=0, atol=0)
    assert not torch.equal(found[0], changed[0])


def test_labels_alone_have_no_slope() -> None:
    network = smooth_network()

    def loss(images: Tensor) -> Tensor:
        answers = network(images).softmax(1)
        return wanted_loss(F.one_hot(answers.argmax(1), 3).double(), torch.tensor([0, 1, 2, 1]))

    found = estimate_gradient(loss, IMAGES, loss(IMAGES), 50, 0.02, generator())
    torch.testing.assert_close(found, torch.zeros_like(IMAGES))
    assert true_gradient(smooth_loss(), IMAGES).norm() > 0.1


def test_the_loss_of_an_answer() -> None:
    answers = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = wanted_loss(answers, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([4.0, 1 / FLOOR], dtype=torch.float64).log())
    assert not torch.equal(found, wanted_loss(answers, torch.tensor([0, 1])))


def test_the_boundary_term() -> None:
    answers = torch.rand(3, 4, generator=generator(), dtype=torch.float64).softmax(1)
    student = torch.rand(3, 4, generator=generator(1), dtype=torch.float64).softmax(1)
    agree = torch.tensor([True, False, True])
    slow = torch.zeros(3, dtype=torch.float64)
    for n in (0, 2):
        for k in range(4):
            slow[n] -= abs(float(answers[n, k].log()) - float(student[n, k].log()))
    found = boundary_term(answers, student, agree)
    torch.testing.assert_close(found, slow)
    assert (found[[0, 2]] < 0).all()
    assert not torch.equal(found, boundary_term(answers, student, ~agree))
    torch.testing.assert_close(boundary_term(answers, answers, agree), torch.zeros(3, dtype=torch.float64))


def test_probabilities_among_some_classes() -> None:
    logits = torch.randn(3, 5, generator=generator(), dtype=torch.float64)
    chosen = torch.tensor([4, 1])
    torch.testing.assert_close(among(logits.softmax(1), chosen), logits[:, chosen].softmax(1))
    assert not torch.allclose(logits.softmax(1)[:, chosen], logits[:, chosen].softmax(1))


# Bi-level distillation ------------------------------------------------------------------------------------------------

LEARNERS: dict[str, AnyLearner] = {
    "protonet": ProtoNet(normalise=True, temperature=0.2),
    "protonet-euclid": ProtoNet(),
    "maml": MAML(inner_steps=2, inner_rate=0.1),
    "anil": ANIL(inner_steps=2, inner_rate=0.1),
}


def world() -> tuple[Network, dict[str, Tensor], Tensor, Tensor, Tensor]:
    network = build(cases.network_spec("conv4", (1, 16, 16), classes=4), generator()).double()
    support, query = (torch.randn(6, 1, 16, 16, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    targets = torch.randn(6, 3, generator=generator(3), dtype=torch.float64).softmax(1)
    return network, params_of(network), support, query, targets


@pytest.mark.parametrize("name", LEARNERS)
def test_certain_answers_are_labels(name: str) -> None:
    network, params, support, query, targets = world()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    certain = F.one_hot(labels, 3).double()
    wanted = LEARNERS[name].query_logits(network, params, support, labels, query)[:, :3]
    torch.testing.assert_close(adapted_logits(LEARNERS[name], network, params, support, certain, query), wanted)
    soft = adapted_logits(LEARNERS[name], network, params, support, targets, query)
    assert soft.shape == (6, 3)
    assert not torch.allclose(soft, wanted, rtol=1e-3), "and answers that doubt are not"


def test_prototypes_are_means_weighted_by_the_answers() -> None:
    network, params, support, query, targets = world()
    with torch.no_grad():
        found = adapted_logits(ProtoNet(), network, params, support, targets, query)
        network.train()  # the statistics of the batch, as in training
        features = network.features(torch.cat([support, query]))
    for q in range(6):
        for k in range(3):
            centre = sum(targets[i, k] * features[i] for i in range(6)) / sum(targets[i, k] for i in range(6))
            torch.testing.assert_close(found[q, k], -(features[6 + q] - centre).square().sum())


def test_the_inner_loop_descends_the_divergence_from_the_answers() -> None:
    """The entropy of the answers is a constant: cross-entropy and KL have one gradient."""
    network, params, support, query, targets = world()
    learner = MAML(inner_steps=1, inner_rate=0.3)
    found = adapted_logits(learner, network, params, support, targets, query)
    network.train()
    logits = torch.func.functional_call(network, params, support)
    padded = F.pad(targets, (0, 1))
    divergence = (torch.special.xlogy(padded, padded) - padded * logits.log_softmax(1)).sum(1).mean()
    gradients = torch.autograd.grad(divergence, list(params.values()))
    moved = {name: value - 0.3 * gradient for (name, value), gradient in zip(params.items(), gradients)}
    norm_by_support = learner.model_copy(update={"inner_steps": 0})
    wanted = adapted_logits(norm_by_support, network, moved, support, targets, query)
    torch.testing.assert_close(found, wanted)
    still = adapted_logits(norm_by_support, network, params, support, targets, query)
    assert not torch.allclose(found, still, rtol=1e-3)


def test_the_outer_loss_is_a_divergence_of_probabilities(fitted_model: PretrainedModel) -> None:
    method = BiDfMKD(width=4, way=3, learner=ProtoNet(normalise=True))
    data = cases.toy_images(3, 2, (1, 16, 16), seed=4)
    student = Student(4, 3, method.learner, fitted_model.input, data.images, 0)
    answers = torch.randn(6, 3, generator=generator()).softmax(1)
    task = Task(data.images, answers, data.images.flip(3), answers.flip(0), data.classes)
    loss, gradient = method.distil(student, student.initial(), [task])
    known, asked = (student.input.prepare(to_float(images)) for images in (task.support, task.query))
    params = student.initial()
    said = adapted_logits(method.learner, student.network, params, known, answers, asked).softmax(1)
    slow = (task.query_answers * (task.query_answers.log() - said.log())).sum() / 6
    assert loss == pytest.approx(slow.item(), rel=1e-4)
    released = (task.query_answers * (task.query_answers.log() - said)).mean()
    assert loss != pytest.approx(released.item(), rel=0.1), "what the released code takes for it"
    wanted = torch.autograd.grad(slow, list(params.values()), materialize_grads=True)
    torch.testing.assert_close(list(gradient.values()), list(wanted), rtol=1e-3, atol=1e-6)
    assert gradient["encoder.0.0.weight"].norm() > 0


# Recovery -------------------------------------------------------------------------------------------------------------

HASTY = ZeroOrderRecovery(per_class=3, steps=3, directions=2, code=8, width=4, shift=1)


def recovered(model: PretrainedModel, settings: ZeroOrderRecovery, seed: int = 0) -> tuple[Tensor, BlackBox]:
    box, random = BlackBox(model, 10**6), generator(seed)
    wanted = torch.arange(3).repeat_interleave(settings.per_class)

    def near(images: Tensor, answers: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda answers: wanted_loss(answers, wanted)

    return settings.recover(box, settings.painter(box.input, random), len(wanted), near, random), box


def test_recovery_costs_what_it_says_and_follows_its_generator(fitted_model: PretrainedModel) -> None:
    images, box = recovered(fitted_model, HASTY)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (9, 1, 16, 16))
    assert box.queries == HASTY.queries(3) == 9 * 3 * 3
    torch.manual_seed(99)
    torch.testing.assert_close(recovered(fitted_model, HASTY)[0], images, rtol=0, atol=0)
    assert not torch.equal(recovered(fitted_model, HASTY, seed=1)[0], images)


def test_answers_alone_lead_to_images_of_the_wanted_classes(fitted_model: PretrainedModel) -> None:
    wanted = torch.arange(3).repeat_interleave(6)
    settings = ZeroOrderRecovery(steps=60, directions=10, code=16, width=8, shift=0)
    found, before = (recovered(fitted_model, settings.model_copy(update={"steps": n}))[0] for n in (60, 1))
    agreement = [float((fitted_model(to_float(i)).argmax(1) == wanted).double().mean()) for i in (found, before)]
    assert agreement[0] > 0.8
    assert agreement[1] < 0.6


def test_every_image_is_kept_at_its_lowest_loss(fitted_model: PretrainedModel) -> None:
    """A loss that is low in the first step for the first image, in the last for the others."""
    seen: list[Tensor] = []

    def near(images: Tensor, answers: Tensor) -> Callable[[Tensor], Tensor]:
        seen.append(images.clone())
        step = float(len(seen))
        return lambda answers: torch.tensor([step] + [-step] * (len(answers) - 1))

    box, random = BlackBox(fitted_model, 10**6), generator()
    images = HASTY.recover(box, HASTY.painter(box.input, random), 4, near, random)
    assert len(seen) == 3
    torch.testing.assert_close(to_float(images[0]), seen[0][0], rtol=0, atol=0.51 / 255)
    torch.testing.assert_close(to_float(images[1:]), seen[2][1:], rtol=0, atol=0.51 / 255)


# The method -----------------------------------------------------------------------------------------------------------

BRIEF: dict[str, Any] = {
    "width": 4,
    "way": 3,
    "query": 2,
    "steps": 5,
    "check_every": 2,
    "visit_every": 1,
    "boundary_after": 0.5,
    "zero_order": HASTY,
    "replay_updates": 1,
    "replay_tasks": 2,
}


def brief(**changes: Any) -> BiDfMKD:
    return BiDfMKD(**{**BRIEF, **changes})


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("bidf-mkd"), threads=1)


def state(method: BiDfMKD, pool: ModelPool, store: Store, seed: int = 0) -> dict[str, Tensor]:
    return dict(method.fit(pool, store, seed).network.state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_pool_of_unlike_models(name: str, tiny_pool: ModelPool, kept: Store) -> None:
    """16 and 32 pixels, one channel and three, two to four classes."""
    model = brief(learner=LEARNERS[name]).fit(tiny_pool, kept, 0)
    assert model.input == tiny_pool.input
    assert sorted(record["model"] for record in model.history[:4]) == tiny_pool.ids, "all in turn"
    for record in model.history:
        assert torch.tensor([record["loss"], record["replay"]]).isfinite().all()
        assert record["loss"] > 0
        assert 0 <= record["agreement"] <= 100
    images = to_float(toys.stripes((0, 1), 3).images)
    answers = model.logits(images[::3], torch.tensor([0, 1]), images)
    assert answers.shape == (6, 2)
    assert answers.isfinite().all()


def test_the_budget_is_stated_and_never_exceeded(
    tiny_pool: ModelPool, kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    ask = BlackBox.__call__

    def counted(box: BlackBox, images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        return ask(box, images)

    monkeypatch.setattr(BlackBox, "__call__", counted)
    visit = 2 * 9 * (3 * 3 + 1)  # of a service with three classes or more; the one with two costs less
    history = brief(queries=2 * visit + 10).fit(tiny_pool, kept, 0).history
    spent = [record["queries"] for record in history]
    assert spent == sorted(spent)
    assert spent[-1] == asked <= 2 * visit + 10
    assert 2 <= sum("model" in record for record in history) < 5
    assert "model" not in history[-1], "used up: replay and earlier tasks go on"
    assert history[-1]["replay"] > 0
    with pytest.raises(MetapoolError, match=rf"queries is {visit - 1}: one visit takes {visit} "):
        brief(queries=visit - 1).fit(tiny_pool, kept, 0)


def test_services_that_give_labels_alone_are_refused(tiny_pool: ModelPool, kept: Store) -> None:
    with pytest.raises(MetapoolError, match="probabilities"):
        brief(label_only=True).fit(tiny_pool, kept, 0)


def test_the_pool_is_seen_through_services_only(
    tiny_pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient is asked of a model, and none of its features."""
    graphs: list[bool] = []
    forward = PretrainedModel.forward

    def watched(model: PretrainedModel, images: Tensor) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return forward(model, images)

    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("features were asked for")

    monkeypatch.setattr(PretrainedModel, "forward", watched)
    monkeypatch.setattr(PretrainedModel, "features_and_logits", refuse)
    brief().fit(tiny_pool, Store(tmp_path, threads=1), 0)
    assert graphs
    assert not any(graphs)


def test_same_seed_same_bits_other_seed_other_bits(tiny_pool: ModelPool, kept: Store, tmp_path: Path) -> None:
    first = state(brief(), tiny_pool, kept)
    torch.manual_seed(1234)
    assert same(state(brief(), tiny_pool, Store(tmp_path, threads=1)), first)
    assert not same(state(brief(), tiny_pool, kept, seed=1), first)


@pytest.mark.parametrize(
    "change", [{"boundary": 0.0}, {"teachers": 1}, {"replay_updates": 2}, {"visit_every": 2}], ids=str
)
def test_settings_matter(change: dict[str, Any], tiny_pool: ModelPool, kept: Store) -> None:
    def found(**changes: Any) -> dict[str, Tensor]:
        return state(brief(steps=3, boundary_after=0.0, zero_order=SURER, **changes), tiny_pool[:2], kept)

    assert not same(found(**change), found())


SURER = HASTY.model_copy(update={"steps": 8, "directions": 4})
"""Enough for some images to be what they are to be: elsewhere the boundary term is silent."""


def test_killed_in_the_middle_it_ends_with_the_same_bits(
    tiny_pool: ModelPool, kept: Store, tmp_path: Path, toy_images: LabelledImages
) -> None:
    method = brief(average=0.5)
    unbroken = method.fit(tiny_pool, kept, 0, toy_images)
    stopped: list[int] = []

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "meta-train" and done in (1, 3, 5) and done not in stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    store = Store(tmp_path, threads=1, progress=stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            method.fit(tiny_pool, store, 0, toy_images)
    resumed = method.fit(tiny_pool, store, 0, toy_images)
    assert stopped == [1, 3, 5]
    assert resumed.history == unbroken.history
    assert same(dict(resumed.network.state_dict()), dict(unbroken.network.state_dict()))


@pytest.mark.parametrize("part", ["tasks", "memory", "queries"])
def test_every_part_of_what_was_found_is_needed(
    part: str, tiny_pool: ModelPool, kept: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Companion: with one part forgotten at the reload, the end is another."""
    method = brief(queries=600)
    unbroken = method.fit(tiny_pool, kept, 0)

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "meta-train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.fit(tiny_pool, Store(tmp_path, threads=1, progress=stop), 0)
    complete = Found.load_state_dict

    def forgetful(found: Found, saved: dict[str, Any]) -> None:
        first = next(iter(saved[part])) if part != "queries" else ""
        lost = 0 if part == "queries" else {first: saved[part][first]}
        complete(found, {**saved, part: lost})

    monkeypatch.setattr(Found, "load_state_dict", forgetful)
    resumed = method.fit(tiny_pool, Store(tmp_path, threads=1), 0)
    assert resumed.history != unbroken.history


def test_it_saves_loads_and_answers_alike(tiny_pool: ModelPool, kept: Store, tmp_path: Path) -> None:
    model = brief().fit(tiny_pool, kept, 0)
    model.save(tmp_path)
    loaded = load_model(tmp_path)
    images = to_float(toys.stripes((0, 1, 2), 4).images)
    labels = torch.tensor([0, 1, 2])
    answers = [one.classify(one.encode(images[::4]), labels, one.encode(images)) for one in (model, loaded)]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)
    assert len({str(row) for row in answers[0].tolist()}) == 12, "and not all queries alike"


def test_beats_chance_on_new_classes(tmp_path: Path) -> None:
    pool = toys.striped_pool(tmp_path / "pool")
    method = BiDfMKD(
        width=8,
        way=3,
        steps=12,
        learning_rate=0.01,
        visit_every=3,
        zero_order=ZeroOrderRecovery(steps=10, directions=5, code=16, width=8, shift=1),
        replay_updates=2,
        replay_tasks=2,
        query=3,
        check_every=10,
    )
    model = method.fit(pool, Store(tmp_path / "store", threads=1), seed=0)
    images = toys.stripes(toys.NEW_KINDS, 20, seed=5)
    episodes = sample_episodes(images, 4, 5, 5, 60, seed=0)
    assert evaluate(model, images, episodes).interval.low > 25 + 10
    wrong = torch.randperm(len(images), generator=generator())
    shuffled = LabelledImages(images.images[wrong], images.labels, images.classes)
    assert 15 < evaluate(model, shuffled, episodes).interval.mean < 35, "labels that mean nothing leave chance"
