"""Identity 1: the implicit step is the gradient of L̄ + αR up to O(α²), and what goes wrong when the graph is kept."""

import math
from collections.abc import Callable
from itertools import pairwise

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.functional import Params, call, params_of
from metapool.base.networks import build
from metapool.gradients import (
    Batch,
    attached_step,
    describe,
    explicit_gradient,
    implicit_step,
    mean_gradient,
    task_gradients,
)

TaskLoss = Callable[[Params, Batch], Tensor]
Problem = tuple[TaskLoss, Params, Batch]
ALPHAS = (1e-5, 5e-6, 2.5e-6)  # small enough that no ReLU or maximum of the Conv4 changes sides on the way


def toy() -> Problem:
    """A smooth network of two layers and three tasks, float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    params = {"first": draw(4, 6).requires_grad_(), "second": draw(6, 3).requires_grad_()}
    batches = (draw(3, 10, 4), torch.randint(3, (3, 10), generator=generator))

    def loss(params: Params, batch: Batch) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(torch.tanh(inputs @ params["first"]) @ params["second"], labels)

    return loss, params, batches


def conv4() -> Problem:
    """The meta-model's own network with batch statistics, four tasks, float64."""
    shape = (1, 16, 16)
    network = build(cases.network_spec("conv4", shape, 3, width=2), torch.Generator().manual_seed(0)).double()
    images = torch.stack([cases.smooth_images(6, shape, task) for task in range(4)]).double()
    labels = torch.arange(6).remainder(3).expand(4, -1)
    return (
        (lambda params, batch: F.cross_entropy(call(network, params, batch[0]), batch[1])),
        params_of(network),
        (
            images,
            labels,
        ),
    )


PROBLEMS = pytest.mark.parametrize("problem", [toy, conv4], ids=["toy", "conv4"])


def flat(gradient: Params) -> Tensor:
    return torch.cat([part.detach().flatten() for part in gradient.values()])


@PROBLEMS
def test_halving_alpha_quarters_the_distance_to_the_explicit_gradient(problem: Callable[[], Problem]) -> None:
    loss, params, batches = problem()
    errors = []
    for alpha in ALPHAS:
        implicit = flat(implicit_step(loss, params, batches, alpha)[0])
        errors.append((implicit - flat(explicit_gradient(loss, params, batches, alpha))).norm().item())
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(4, rel=0.1)
    plain = flat(explicit_gradient(loss, params, batches, 0.0))
    regularised = flat(implicit_step(loss, params, batches, ALPHAS[-1])[0]) - plain
    assert regularised.norm() > 20 * errors[-1], "the regularizer itself is much larger than the error"


@PROBLEMS
def test_without_regularizer_the_distance_only_halves(problem: Callable[[], Problem]) -> None:
    """Companion: against the plain mean gradient the difference is of first order in α."""
    loss, params, batches = problem()
    mean = flat(mean_gradient(task_gradients(loss, params, batches)[0]))
    large, small = ((flat(implicit_step(loss, params, batches, a)[0]) - mean).norm() for a in ALPHAS[:2])
    assert (large / small).item() == pytest.approx(2, rel=0.1)


@PROBLEMS
def test_with_the_graph_kept_the_strength_is_twice_alpha(problem: Callable[[], Problem]) -> None:
    loss, params, batches = problem()
    errors = {1: [], 2: []}
    for alpha in ALPHAS:
        kept = flat(attached_step(loss, params, batches, alpha)[0])
        for times, found in errors.items():
            found.append((kept - flat(explicit_gradient(loss, params, batches, times * alpha))).norm().item())
    for larger, smaller in pairwise(errors[2]):
        assert larger / smaller == pytest.approx(4, rel=0.1)
    for larger, smaller in pairwise(errors[1]):
        assert larger / smaller == pytest.approx(2, rel=0.15)
    assert errors[1][-1] > 5 * errors[2][-1]


@PROBLEMS
def test_explicit_gradient_is_the_derivative_of_its_formula(problem: Callable[[], Problem]) -> None:
    """Finite differences of L̄ + αR, R from gradients taken one task at a time."""
    loss, params, batches = problem()
    alpha = 0.3

    def objective(shifted: Params) -> float:
        gradients, losses = task_gradients(loss, shifted, batches)
        vectors = [flat(gradient) for gradient in gradients]
        centre = sum(vectors) / len(vectors)
        spread = sum(((vector - centre) ** 2).sum().item() for vector in vectors) / (2 * len(vectors))
        return sum(losses) / len(losses) + alpha * spread

    direction = {name: torch.randn_like(value) for name, value in params.items()}
    ends = []
    for sign in (1, -1):
        shifted = {n: (v.detach() + sign * 1e-6 * direction[n]).requires_grad_() for n, v in params.items()}
        ends.append(objective(shifted))
    slope = (ends[0] - ends[1]) / 2e-6
    found = flat(explicit_gradient(loss, params, batches, alpha)) @ flat(direction)
    assert found.item() == pytest.approx(slope, rel=1e-4)
    plain = flat(explicit_gradient(loss, params, batches, 0.0)) @ flat(direction)
    assert plain.item() != pytest.approx(slope, rel=1e-2)


@PROBLEMS
def test_identical_tasks_give_exactly_the_mean_gradient(problem: Callable[[], Problem]) -> None:
    loss, params, batches = problem()
    # Four: halving twice is exact in floating point, so the mean of equal gradients is the gradient itself.
    same = tuple(tensor[:1].expand(4, *tensor.shape[1:]) for tensor in batches)
    step, stats = implicit_step(loss, params, same, 0.5)
    (gradient,), _ = task_gradients(loss, params, tuple(tensor[:1] for tensor in batches))
    torch.testing.assert_close(step, gradient, rtol=0, atol=0)
    assert stats.discrepancy == 0
    assert stats.cosine == pytest.approx(1, abs=1e-12)
    different, stats = implicit_step(loss, params, batches, 0.5)
    mean = mean_gradient(task_gradients(loss, params, batches)[0])
    assert not torch.allclose(flat(different), flat(mean))
    assert stats.discrepancy > 0
    assert stats.cosine < 0.999


@PROBLEMS
def test_one_task_or_no_displacement_is_the_mean_gradient(problem: Callable[[], Problem]) -> None:
    loss, params, batches = problem()
    mean = mean_gradient(task_gradients(loss, params, batches)[0])
    torch.testing.assert_close(implicit_step(loss, params, batches, 0.0)[0], mean, rtol=0, atol=0)
    single = tuple(tensor[:1] for tensor in batches)
    step, stats = implicit_step(loss, params, single, 0.5)
    torch.testing.assert_close(step, task_gradients(loss, params, single)[0][0], rtol=0, atol=0)
    assert (stats.discrepancy, stats.cosine) == (0.0, 1.0)


@PROBLEMS
def test_vectorised_is_looped(problem: Callable[[], Problem]) -> None:
    """The same step with all tasks at once by vmap, to 1e-12."""
    loss, params, batches = problem()
    alpha = 0.05
    plain = {name: value.detach() for name, value in params.items()}
    gradient = torch.func.grad(loss)
    at_theta = torch.func.vmap(gradient, (None, 0))(plain, batches)
    moved = {name: plain[name] - alpha * (parts.mean(0) - parts) for name, parts in at_theta.items()}
    vectorised = {name: parts.mean(0) for name, parts in torch.func.vmap(gradient)(moved, batches).items()}
    looped, _ = implicit_step(loss, params, batches, alpha)
    torch.testing.assert_close(vectorised, looped, rtol=1e-12, atol=1e-12)
    assert (flat(vectorised) - flat(implicit_step(loss, params, batches, 2 * alpha)[0])).abs().max() > 1e-6


@PROBLEMS
def test_discrepancy_and_cosine_are_their_slow_formulas(problem: Callable[[], Problem]) -> None:
    loss, params, batches = problem()
    gradients, losses = task_gradients(loss, params, batches)
    stats = describe(gradients, losses)
    vectors = [flat(gradient).tolist() for gradient in gradients]
    n, size = len(vectors), len(vectors[0])
    centre = [sum(vector[p] for vector in vectors) / n for p in range(size)]
    spread = sum((vector[p] - centre[p]) ** 2 for vector in vectors for p in range(size)) / (2 * n)
    length = [math.sqrt(sum(x * x for x in vector)) for vector in vectors]
    cosines = [
        sum(x * y for x, y in zip(vectors[i], vectors[j])) / (length[i] * length[j])
        for i in range(n)
        for j in range(i + 1, n)
    ]
    assert stats.discrepancy == pytest.approx(spread, rel=1e-10)
    assert stats.cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-10)
    assert stats.loss == pytest.approx(sum(losses) / n)
    assert max(cosines) - min(cosines) > 1e-3, "a mean over unequal cosines"


def test_opposite_and_orthogonal_tasks() -> None:
    vector = {"p": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    opposite = {"p": -vector["p"]}
    across = {"p": torch.tensor([-8.0, 6.0], dtype=torch.float64)}
    assert describe([vector, opposite], [1.0, 2.0]).cosine == pytest.approx(-1)
    assert describe([vector, opposite], [1.0, 2.0]).discrepancy == pytest.approx((25 + 25) / 4)
    assert describe([vector, across], [1.0, 2.0]).cosine == pytest.approx(0, abs=1e-12)
    assert describe([vector, across], [1.0, 2.0]).loss == 1.5


def test_a_step_changes_no_parameter_and_leaves_no_gradient() -> None:
    loss, params, batches = toy()
    before = {name: value.detach().clone() for name, value in params.items()}
    step, _ = implicit_step(loss, params, batches, 0.1)
    torch.testing.assert_close({n: v.detach() for n, v in params.items()}, before, rtol=0, atol=0)
    assert all(value.grad is None for value in params.values())
    assert not any(part.requires_grad for part in step.values())


def test_a_parameter_that_a_task_does_not_use_has_gradient_zero() -> None:
    params = {name: torch.ones(2, dtype=torch.float64).requires_grad_() for name in ("used", "unused")}
    batches = (torch.tensor([1.0, 2.0], dtype=torch.float64),)
    loss = lambda params, batch: (batch[0] * params["used"]).square().sum()
    step, _ = implicit_step(loss, params, batches, 0.01)
    torch.testing.assert_close(step["unused"], torch.zeros(2, dtype=torch.float64))
    assert step["used"].abs().min() > 1
    explicit = explicit_gradient(loss, params, batches, 0.01)
    torch.testing.assert_close(explicit["unused"], torch.zeros(2, dtype=torch.float64))


def test_an_attached_step_sees_what_an_implicit_one_sees() -> None:
    loss, params, batches = toy()
    assert attached_step(loss, params, batches, 0.1)[1] == implicit_step(loss, params, batches, 0.1)[1]
    attached, detached = (flat(step(loss, params, batches, 0.0)[0]) for step in (attached_step, implicit_step))
    torch.testing.assert_close(attached, detached)
