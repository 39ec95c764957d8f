r"""The heart of TGR: a step that aligns the gradients of a group's tasks without second derivatives.

With :math:`g_i = \nabla L_i(\theta)`, :math:`\bar g = \frac1n \sum_i g_i` and :math:`\bar L = \frac1n \sum_i L_i`,

.. math:: R(\theta) = \frac{1}{2n} \sum_i \|g_i - \bar g\|^2, \qquad
    \theta_i = \theta - \alpha (\bar g - g_i), \qquad
    d = \frac1n \sum_i \nabla L_i(\theta_i) = \nabla [\bar L + \alpha R](\theta) + O(\alpha^2)

(TGR, arXiv 2405.16560, section 3.3 and theorem 4.1). :math:`\theta_i` is *detached*: the published code keeps its
graph, which costs second order and regularises with :math:`2\alpha`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metapool.base.functional import Params

Batch = tuple[Tensor, ...]
TaskLoss = Callable[[Params, Batch], Tensor]
TaskLosses = Callable[[Params, Batch], list[Tensor]]


@dataclass(frozen=True)
class GradientStats:
    """What a step saw.

    Attributes:
        loss: mean task loss at θ.
        discrepancy: R(θ).
        cosine: mean cosine over the pairs of task gradients; 1 for a single task.
        squared_norm: mean ‖g_i‖², the yardstick of R, which is at most half of it.
    """

    loss: float
    discrepancy: float
    cosine: float
    squared_norm: float


def task_gradients(
    task_loss: TaskLoss, params: Params, batches: Batch, together: TaskLosses | None = None
) -> tuple[list[Params], list[float]]:
    """Gradient of every task at the same parameters.

    Args:
        task_loss: loss of one task.
        params: leaves that require gradients.
        batches: tensors whose leading axis is the task.
        together: losses of all tasks at once, the same numbers as ``task_loss`` gives one by one; worth giving when the
            tasks share images, which then pass forward once.

    Returns:
        n gradients and n losses.
    """
    shared = together(params, batches) if together is not None else None
    gradients: list[Params] = []
    losses: list[float] = []
    for index, task in enumerate(zip(*batches, strict=True)):
        loss = shared[index] if shared is not None else task_loss(params, task)
        found = torch.autograd.grad(
            loss, list(params.values()), retain_graph=shared is not None, materialize_grads=True
        )
        gradients.append(dict(zip(params, found)))
        losses.append(loss.item())
    return gradients, losses


def mean_gradient(gradients: list[Params]) -> Params:
    """ḡ.

    Args:
        gradients: n gradients.

    Returns:
        Their mean, by parameter.
    """
    return {name: torch.stack([gradient[name] for gradient in gradients]).mean(0) for name in gradients[0]}


def describe(gradients: list[Params], losses: list[float]) -> GradientStats:
    r"""Discrepancy :math:`R = \frac{1}{2n}\sum_i \|g_i - \bar g\|^2`, mean pairwise cosine and mean squared length.

    Args:
        gradients: n gradients.
        losses: n losses.

    Returns:
        The statistics.
    """
    flat = torch.stack([torch.cat([part.flatten() for part in gradient.values()]) for gradient in gradients])
    count = len(flat)
    discrepancy = (flat - flat.mean(0)).square().sum() / (2 * count)
    directions = torch.nn.functional.normalize(flat, dim=1)
    # Sum over all ordered pairs is the squared norm of the sum; the n pairs of a task with itself are 1 each.
    cosine = (directions.sum(0).square().sum() - directions.square().sum()) / max(count * (count - 1), 1)
    squared_norm = flat.square().sum().item() / count
    return GradientStats(sum(losses) / count, discrepancy.item(), cosine.item() if count > 1 else 1.0, squared_norm)


def implicit_step(
    task_loss: TaskLoss,
    params: Params,
    batches: Batch,
    alpha: float,
    together: TaskLosses | None = None,
) -> tuple[Params, GradientStats]:
    r"""The direction :math:`d` of implicit gradient regularization; the caller's optimiser descends it.

    Args:
        task_loss: loss of one task, differentiable in the parameters.
        params: leaves that require gradients; not changed.
        batches: tensors whose leading axis is the task.
        alpha: α, the displacement; 0 gives :math:`\bar g` at less than half the cost.
        together: as in :func:`task_gradients`, for the gradients at θ.

    Returns:
        d by parameter, and what was seen at θ.
    """
    gradients, losses = task_gradients(task_loss, params, batches, together)
    mean = mean_gradient(gradients)
    stats = describe(gradients, losses)
    if alpha == 0 or len(gradients) == 1:
        return mean, stats
    displaced: list[Params] = []
    for index, gradient in enumerate(gradients):
        moved = {
            name: (value.detach() - alpha * (mean[name] - gradient[name])).requires_grad_()
            for name, value in params.items()
        }
        task = tuple(tensor[index : index + 1] for tensor in batches)
        displaced += task_gradients(task_loss, moved, task)[0]
    return mean_gradient(displaced), stats


def attached_step(task_loss: TaskLoss, params: Params, batches: Batch, alpha: float) -> tuple[Params, GradientStats]:
    r"""What TGR's released code descends instead of :func:`implicit_step`: the displacement stays in the graph.

    The gradient of :math:`\frac1n \sum_i L_i(\theta - \alpha (\bar g - g_i))` with :math:`g_i` as functions of
    :math:`\theta` is :math:`\nabla [\bar L + 2\alpha R] + O(\alpha^2)`: twice the regularization, at second order.

    Args:
        task_loss: loss of one task, twice differentiable.
        params: leaves that require gradients; not changed.
        batches: tensors whose leading axis is the task.
        alpha: α.

    Returns:
        The direction by parameter, and what was seen at θ.
    """
    leaves, tasks = list(params.values()), list(zip(*batches, strict=True))
    losses = [task_loss(params, task) for task in tasks]
    found = [torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True) for loss in losses]
    gradients = [dict(zip(params, gradient)) for gradient in found]
    mean = mean_gradient(gradients)
    displaced = [
        task_loss({n: value - alpha * (mean[n] - gradient[n]) for n, value in params.items()}, task)
        for task, gradient in zip(tasks, gradients)
    ]
    direction = torch.autograd.grad(torch.stack(displaced).mean(), leaves, materialize_grads=True)
    seen = [{name: value.detach() for name, value in gradient.items()} for gradient in gradients]
    return dict(zip(params, direction)), describe(seen, [loss.item() for loss in losses])


def explicit_gradient(task_loss: TaskLoss, params: Params, batches: Batch, alpha: float) -> Params:
    r""":math:`\nabla [\bar L + \alpha R]` by double backward: the slow truth that the implicit step approximates.

    Args:
        task_loss: loss of one task, twice differentiable.
        params: leaves that require gradients.
        batches: tensors whose leading axis is the task.
        alpha: α.

    Returns:
        The gradient, by parameter.
    """
    leaves = list(params.values())
    losses = [task_loss(params, task) for task in zip(*batches, strict=True)]
    gradients = [torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True) for loss in losses]
    count = len(losses)
    means = [torch.stack(parts).mean(0) for parts in zip(*gradients)]
    discrepancy = sum(
        ((part - mean).square().sum() for gradient in gradients for part, mean in zip(gradient, means)),
        start=torch.zeros(()),
    ) / (2 * count)
    total = torch.stack(losses).mean() + alpha * discrepancy
    return dict(zip(params, torch.autograd.grad(total, leaves, materialize_grads=True)))
