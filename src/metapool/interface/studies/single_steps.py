"""The three ways to a regularized step, compared at the same weights on the same batches: directions and seconds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from metapool.base.functional import Params
from metapool.gradients import Batch, TaskLoss, TaskLosses, attached_step, explicit_gradient, implicit_step
from metapool.interface.studies.small_tasks import flat


@dataclass(frozen=True)
class SingleStep:
    """What a single step is taken on.

    Attributes:
        loss: of one task.
        together: of all tasks at once, where they share images.
        params: leaves.
        batches: tensors whose leading axis is the task.
    """

    loss: TaskLoss
    together: TaskLosses | None
    params: Params
    batches: Batch

    def doubled(self) -> "SingleStep":
        """The same in float64, where a difference of two directions is not rounding."""
        params = {name: value.detach().double().requires_grad_() for name, value in self.params.items()}
        batches = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in self.batches)
        return SingleStep(self.loss, self.together, params, batches)


def step_differences(step: SingleStep, alphas: Sequence[float]) -> dict[str, list[float]]:
    r"""How unlike the directions of the three steps are, relative to the explicit one.

    Args:
        step: weights and batches.
        alphas: α, each.

    Returns:
        One value for each α: ``implicit`` and ``attached`` are distances from :math:`\nabla[\bar L + \alpha R]`,
        ``attached to 2α`` that from :math:`\nabla[\bar L + 2\alpha R]`, and ``none`` that of :math:`\bar g`, which is
        what the regularization amounts to. Each is divided by the length of what it is the distance from.
    """
    loss, params, batches = step.loss, step.params, step.batches
    mean = flat(implicit_step(loss, params, batches, 0.0)[0])
    slope = flat(explicit_gradient(loss, params, batches, 1.0)) - mean  # linear in α: one double backward serves all
    found: dict[str, list[float]] = {}
    for alpha in alphas:
        once, twice = mean + alpha * slope, mean + 2 * alpha * slope
        implicit = flat(implicit_step(loss, params, batches, alpha)[0])
        attached = flat(attached_step(loss, params, batches, alpha)[0])
        for name, direction, truth in (
            ("implicit", implicit, once),
            ("attached", attached, once),
            ("attached to 2α", attached, twice),
            ("none", mean, once),
        ):
            found.setdefault(name, []).append(float((direction - truth).norm() / truth.norm()))
    return found


def step_seconds(step: SingleStep, alpha: float, repeats: int) -> dict[str, float]:
    """What each kind of step takes.

    Args:
        step: weights and batches.
        alpha: displacement.
        repeats: how often each is timed, in turn, after one that is not counted.

    Returns:
        Median seconds, by kind: ``mean`` is without regularization.
    """
    loss, params, batches = step.loss, step.params, step.batches
    steps: dict[str, Callable[[], object]] = {
        "mean": lambda: implicit_step(loss, params, batches, 0.0, step.together),
        "implicit": lambda: implicit_step(loss, params, batches, alpha, step.together),
        "attached": lambda: attached_step(loss, params, batches, alpha),
        "explicit": lambda: explicit_gradient(loss, params, batches, alpha),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, take in steps.items():
            started = time.perf_counter()
            take()
            times[name].append(time.perf_counter() - started)
    return {name: median(spent[1:]) for name, spent in times.items()}
