r"""Two logistic tasks whose distance is a knob, small enough that every term of theorem 3.2 is known exactly.

Inputs are P points of the unit sphere, each as likely as any other; task t labels x with 1 with the chance
:math:`\sigma(x \cdot \theta_t)`. So the risk of the logistic loss :math:`\log(1 + e^{x\cdot\theta}) - y\, x\cdot\theta`
is a finite sum, :math:`\theta_t` is its minimum, and the distance of two tasks is that of their minima. Learners
minimise an empirical risk over the ball :math:`\|\theta\| \le W`. The bounds are derived in docs/theorems.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DIMENSION, POINTS = 10, 400
NORM, RADIUS = 4.0, 5.0
"""Of the tasks' own parameters, and W: of the ball that learners search."""


@dataclass(frozen=True)
class Sample:
    """What was drawn of a task, many times over, as counts: a risk needs no more.

    Attributes:
        ones: float64 [R, P], images of label 1 at every point.
        total: float64 [R, P], images at every point.
    """

    ones: Tensor
    total: Tensor

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(self.ones + other.ones, self.total + other.total)


def points(generator: torch.Generator) -> Tensor:
    """Inputs.

    Args:
        generator: of the draw.

    Returns:
        float64 [P, D], of length 1.
    """
    return F.normalize(torch.randn(POINTS, DIMENSION, dtype=torch.float64, generator=generator), dim=1)


def task(distance: float) -> Tensor:
    """A task of the same difficulty as the basic one, so far from it; the basic one itself at distance 0.

    Args:
        distance: of the parameters, in [0, 2 NORM]: a chord of the circle on which all tasks lie.

    Returns:
        θ_t, float64 [D].
    """
    angle = 2 * math.asin(distance / (2 * NORM))
    theta = torch.zeros(DIMENSION, dtype=torch.float64)
    theta[0], theta[1] = NORM * math.cos(angle), NORM * math.sin(angle)
    return theta


def draw(chance: Tensor, sizes: Sequence[int], draws: int, generator: torch.Generator) -> dict[int, Sample]:
    """Samples of a task; a larger one has all images of a smaller one.

    Args:
        chance: float64 [P], of label 1 at every point.
        sizes: numbers of images.
        draws: R.
        generator: of the draw; the same one gives the same inputs whatever the chances.

    Returns:
        The samples by size.
    """
    where = torch.randint(len(chance), (draws, max(sizes)), generator=generator)
    ones = (torch.rand(draws, max(sizes), dtype=torch.float64, generator=generator) < chance[where]).double()
    empty = torch.zeros(draws, len(chance), dtype=torch.float64)
    return {
        size: Sample(
            empty.scatter_add(1, where[:, :size], ones[:, :size]),
            empty.scatter_add(1, where[:, :size], torch.ones_like(ones[:, :size])),
        )
        for size in sizes
    }


def expected(chance: Tensor, size: float = 1.0) -> Sample:
    """The sample that has every image as often as it is to be expected: its risk is the true one.

    Args:
        chance: float64 [P].
        size: number of images.

    Returns:
        One sample.
    """
    total = torch.full_like(chance, size / len(chance)).unsqueeze(0)
    return Sample(chance * total, total)


def risk(inputs: Tensor, theta: Tensor, sample: Sample) -> Tensor:
    """Mean logistic loss.

    Args:
        inputs: float64 [P, D].
        theta: float64 [R, D].
        sample: R samples, or one for all.

    Returns:
        float64 [R].
    """
    scores = theta @ inputs.T
    return (sample.total * F.softplus(scores) - sample.ones * scores).sum(1) / sample.total.sum(1)


def accuracy(inputs: Tensor, theta: Tensor, chance: Tensor) -> Tensor:
    """Share of images of a task that are labelled right.

    Args:
        inputs: float64 [P, D].
        theta: float64 [R, D].
        chance: float64 [P], of label 1 at every point.

    Returns:
        float64 [R], in percent.
    """
    return 100 * torch.where(theta @ inputs.T > 0, chance, 1 - chance).mean(1)


def learn(inputs: Tensor, sample: Sample, tolerance: float = 1e-8, most: int = 5000) -> Tensor:
    """Minimum of the empirical risk over the ball, by accelerated projected gradients with restarts.

    Nesterov's method (1983) with the restart of O'Donoghue and Candès (2015); all R problems at once.

    Args:
        inputs: float64 [P, D].
        sample: R samples.
        tolerance: of the largest step that a plain projected gradient would still take.
        most: iterations after which it gives up.

    Returns:
        float64 [R, D].

    Raises:
        ArithmeticError: when the tolerance is not reached.
    """
    share = sample.total / sample.total.sum(1, keepdim=True)
    curvature = torch.einsum("rp,pd,pe->rde", share, inputs, inputs)
    step = 4 / torch.linalg.eigvalsh(curvature)[:, -1:]
    ones = sample.ones / sample.total.sum(1, keepdim=True)
    theta = torch.zeros(len(share), inputs.shape[1], dtype=torch.float64)
    ahead, momentum = theta, torch.ones(len(share), 1, dtype=torch.float64)
    for _ in range(most):
        slope = (share * torch.sigmoid(ahead @ inputs.T) - ones) @ inputs
        new = _into_ball(ahead - step * slope)
        if float((new - ahead).norm(dim=1).max()) < tolerance:
            return new
        onward = ((ahead - new) * (new - theta)).sum(1, keepdim=True) <= 0
        following = torch.where(onward, (1 + (1 + 4 * momentum**2).sqrt()) / 2, 1.0)
        ahead = new + torch.where(onward, (momentum - 1) / following, 0.0) * (new - theta)
        theta, momentum = new, following
    raise ArithmeticError(f"no minimum of the logistic risk within {most} iterations")


def _into_ball(theta: Tensor) -> Tensor:
    shrink = RADIUS / theta.norm(dim=1, keepdim=True).clamp(min=RADIUS)
    inside: Tensor = theta * shrink
    return inside


def variance_term(images: float, delta: float) -> float:
    r"""ζ(N, δ): how far an empirical risk may be from the true one, anywhere in the ball.

    :math:`\zeta = W (2 + \sqrt{\log(2/\delta) / 2}) / \sqrt N`: twice the Rademacher complexity of the ball (inputs of
    length 1, a loss of slope 1 in the score), and McDiarmid's inequality for a loss that varies by W.

    Args:
        images: N, independent but not necessarily of one task.
        delta: chance that it does not hold.

    Returns:
        ζ, in nats.
    """
    return RADIUS * (2 + math.sqrt(math.log(2 / delta) / 2)) / math.sqrt(images)


def bound_of_sum(basic: int, auxiliary: int, distance: float, delta: float) -> float:
    r"""Theorem A of docs/theorems.md: what :math:`(1-w) E_\text{bas} + w E_\text{aux}` stays under.

    :math:`2 [(1-w)\, \zeta(N_\text{bas}, \delta) + w\, \zeta(N_\text{aux}, \delta)] + 2 w (1-w) K h` with the auxiliary
    task's share w of all images and K = 1, with a chance of at least 1 - 2δ.

    Args:
        basic: images of the basic task.
        auxiliary: images of the auxiliary task.
        distance: h.
        delta: δ.

    Returns:
        The bound, in nats.
    """
    share = auxiliary / (basic + auxiliary)
    deviation = (1 - share) * variance_term(basic, delta) + share * variance_term(auxiliary, delta)
    return 2 * deviation + 2 * share * (1 - share) * distance


def bound_of_basic(basic: int, auxiliary: int, distance: float, delta: float) -> float:
    r"""Theorem B of docs/theorems.md: what the excess risk on the basic task stays under.

    :math:`2 \zeta(N_\text{bas} + N_\text{aux}, \delta) + 2 w K' h` with K' = W / 4; without auxiliary images, what a
    learner of the basic task alone stays under.

    Args:
        basic: images of the basic task.
        auxiliary: images of the auxiliary task, 0 for none.
        distance: h.
        delta: δ.

    Returns:
        The bound, in nats.
    """
    share = auxiliary / (basic + auxiliary)
    return 2 * variance_term(basic + auxiliary, delta) + 2 * share * RADIUS / 4 * distance
