r"""Small problems in float64 on which theorem 4.1 is measured: from one whose constant is known to one that has none.

- ``logistic``: linear, so that the Lipschitz constant ρ of its Hessians is known, and with it the bound
  :math:`\alpha^2 \rho R` of docs/theorems.md.
- ``tanh``: a smooth network of two layers.
- ``relu``: the same with kinks, where there is no Hessian.
- ``conv4``: the meta-model's own kind of network: ReLU, max-pooling and batch norm by the batch's statistics.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.functional import Params, call, params_of
from metapool.base.networks import NetworkSpec, build
from metapool.gradients import (
    Batch,
    TaskLoss,
    attached_step,
    describe,
    explicit_gradient,
    implicit_step,
    mean_gradient,
    task_gradients,
)

CASES = ("logistic", "tanh", "relu", "conv4")
TASKS, IMAGES, INPUTS, HIDDEN, CLASSES = 4, 20, 8, 32, 5
SIDE, WIDTH = 16, 4
STEEPEST = 1 / (6 * math.sqrt(3))
"""Largest absolute second derivative of the logistic function."""


@dataclass(frozen=True)
class Problem:
    """Some tasks and a point at which their gradients are compared.

    Attributes:
        loss: of one task.
        params: θ, float64 leaves.
        batches: tensors whose leading axis is the task.
        rho: Lipschitz constant of every task's Hessian, where it is known.
    """

    loss: TaskLoss
    params: Params
    batches: Batch
    rho: float | None = None


def problem(case: str, generator: torch.Generator) -> Problem:
    """One of the problems, drawn at random.

    Args:
        case: which of ``CASES``.
        generator: of parameters, inputs and labels.

    Returns:
        The problem.
    """

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if case == "conv4":
        spec = NetworkSpec(
            architecture="conv4", width=WIDTH, classes=CLASSES, channels=1, height=SIDE, image_width=SIDE
        )
        network = build(spec, generator).double()
        # Blurred noise: neighbouring pixels are alike, as in images.
        images = F.interpolate(drawn(TASKS * IMAGES, 1, 6, 6), (SIDE, SIDE), mode="bilinear")
        labels = torch.randint(CLASSES, (TASKS, IMAGES), generator=generator)
        batches = (images.view(TASKS, IMAGES, 1, SIDE, SIDE), labels)
        return Problem(
            lambda params, batch: F.cross_entropy(call(network, params, batch[0]), batch[1]),
            params_of(network),
            batches,
        )
    inputs = drawn(TASKS, IMAGES, INPUTS)
    if case == "logistic":
        labels = torch.randint(2, (TASKS, IMAGES), generator=generator).double()
        return Problem(
            lambda params, batch: F.binary_cross_entropy_with_logits(batch[0] @ params["weight"], batch[1]),
            {"weight": drawn(INPUTS).requires_grad_()},
            (inputs, labels),
            # The third derivative is the mean over images of σ''(z) x ⊗ x ⊗ x.
            rho=STEEPEST * float(inputs.norm(dim=2).pow(3).mean(1).max()),
        )
    bend = torch.tanh if case == "tanh" else torch.relu
    return Problem(
        lambda params, batch: F.cross_entropy(bend(batch[0] @ params["first"]) @ params["second"], batch[1]),
        {
            "first": (drawn(INPUTS, HIDDEN) / math.sqrt(INPUTS)).requires_grad_(),
            "second": (drawn(HIDDEN, CLASSES) / math.sqrt(HIDDEN)).requires_grad_(),
        },
        (inputs, torch.randint(CLASSES, (TASKS, IMAGES), generator=generator)),
    )


def remainders(drawn: Problem, alphas: list[float]) -> dict[str, list[float | None]]:
    r"""How far steps are from the gradient of the regularized loss, all in units of :math:`\|\bar g\|`.

    Args:
        drawn: the problem.
        alphas: α, each.

    Returns:
        One value for each α, by what it is: ``detached`` is :math:`\|d - \nabla[\bar L + \alpha R]\|` with the implicit
        step d; ``attached to α`` and ``attached to 2α`` are those of the released code's step from
        :math:`\nabla[\bar L + \alpha R]` and :math:`\nabla[\bar L + 2 \alpha R]`; ``regularizer`` is
        :math:`\|\alpha \nabla R\|`; ``bound`` is :math:`\alpha^2 \rho R`, none where ρ is not known.
    """
    loss, params, batches = drawn.loss, drawn.params, drawn.batches
    gradients, losses = task_gradients(loss, params, batches)
    mean, stats = flat(mean_gradient(gradients)), describe(gradients, losses)
    # ∇[L̄ + αR] is linear in α: one double backward serves all.
    slope = flat(explicit_gradient(loss, params, batches, 1.0)) - mean
    found: dict[str, list[float | None]] = {}
    for alpha in alphas:
        detached = flat(implicit_step(loss, params, batches, alpha)[0])
        attached = flat(attached_step(loss, params, batches, alpha)[0])
        for name, value in {
            "detached": (detached - mean - alpha * slope).norm(),
            "attached to α": (attached - mean - alpha * slope).norm(),
            "attached to 2α": (attached - mean - 2 * alpha * slope).norm(),
            "regularizer": alpha * slope.norm(),
            "bound": None if drawn.rho is None else alpha**2 * drawn.rho * stats.discrepancy,
        }.items():
            found.setdefault(name, []).append(None if value is None else float(value / mean.norm()))
    return found


def flat(gradient: Params) -> Tensor:
    """A gradient as one vector.

    Args:
        gradient: by parameter.

    Returns:
        [P], in the order of the parameters.
    """
    return torch.cat([part.detach().flatten() for part in gradient.values()])
