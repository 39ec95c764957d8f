"""Whom to trust: reliability weights over the models, learned by policy gradient from what models say of others."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.functional import in_chunks
from metapool.base.images import to_float
from metapool.pool import ModelPool

BASELINE_DECAY = 0.9


def log_probability(weights: Tensor, order: Tensor) -> Tensor:
    r"""Of an ordered draw without replacement: :math:`\sum_k [w_{i_k} - \log \sum_{j \ne i_1 … i_{k-1}} e^{w_j}]`.

    Args:
        weights: w, float [M].
        order: int64 [n], the models in the order of their drawing.

    Returns:
        A scalar, differentiable (Plackett 1975).
    """
    total, gone = weights.new_zeros(()), torch.zeros(len(weights), dtype=torch.bool)
    for index in order.tolist():
        total = total + weights[index] - weights.masked_fill(gone, -math.inf).logsumexp(0)
        gone = gone.index_fill(0, torch.tensor(index), True)
    return total


def draw_order(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """An ordered draw without replacement: the largest ``w − log E``, E exponential.

    The Gumbel-top-k trick (Kool et al. 2019, arXiv 1903.06059): −log E is Gumbel noise.

    Args:
        weights: w, float [M].
        count: n ≤ M.
        generator: of the draw.

    Returns:
        int64 [n], with the probability that :func:`log_probability` says.
    """
    return (weights - torch.empty_like(weights).exponential_(generator=generator).log()).topk(count).indices


def advantages(rewards: Tensor, baseline: float) -> Tensor:
    """(R − b), divided by its root mean square; all 0 when no reward differs from the baseline."""
    above = rewards - baseline
    return above / above.square().mean().sqrt().clamp(min=1e-8)


def policy_loss(weights: Tensor, orders: Sequence[Tensor], advantage: Tensor) -> Tensor:
    """REINFORCE: −mean A log P; its expected gradient is that of the expected −A (Williams 1992)."""
    return -(advantage * torch.stack([log_probability(weights, order) for order in orders])).mean()


def above_chance(accuracy: Tensor, classes: int) -> Tensor:
    """1 when all is right, 0 at the chance of K classes, less when wrong on purpose: (a − 1/K) / (1 − 1/K)."""
    return (classes * accuracy - 1) / (classes - 1)


def agreement(pool: ModelPool, bank: TaskBank) -> Tensor:
    """How far two models mean the same by the names that both claim.

    Args:
        pool: the models.
        bank: their recovered tasks, in the order of the pool.

    Returns:
        Float [M, M], symmetric: how far one is above chance on the other's images, mean of both ways; not a number
        where they share no name.
    """
    found = torch.full((len(pool), len(pool)), math.nan)
    tasks = list(bank.values())
    for column, judge in enumerate(pool):
        for row, task in enumerate(tasks):
            meant = [judge.classes.index(name) if name in judge.classes else -1 for name in task.classes]
            labels = torch.tensor(meant)[task.labels]
            shared = labels >= 0
            if row != column and shared.any() and len(judge.classes) > 1:
                answers = in_chunks(judge, to_float(task.images[shared])).argmax(1)
                found[row, column] = above_chance((answers == labels[shared]).double().mean(), len(judge.classes))
    return (found + found.T) / 2


def reward_of(order: Tensor, trust: Tensor, opinions: Tensor) -> float | None:
    r"""R: mean over drawn i of :math:`\sum_j \pi_j A_{ij} / \sum_j \pi_j`, over the j that share a name with i.

    Args:
        order: int64 [n], the models drawn.
        trust: π, float [M].
        opinions: A, float [M, M], not a number where nothing is shared.

    Returns:
        At most 1; none when nobody can judge any of them.
    """
    drawn = opinions[order]
    weights = trust * ~drawn.isnan()
    judged = weights.sum(1) > 0
    rewards = (weights * drawn.nan_to_num()).sum(1)[judged] / weights.sum(1)[judged]
    return rewards.mean().item() if len(rewards) else None


class Reliability:
    """How far each model is to be trusted: weights under policy gradient.

    Args:
        models: M.
        rate: of Adam.
        every: draws of one policy step.
    """

    def __init__(self, models: int, rate: float, every: int) -> None:
        self.weights = torch.zeros(models, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weights], rate)
        self.every = every
        self.baseline: float | None = None
        self.draws: list[tuple[list[int], float]] = []  # since the last policy step

    @property
    def probabilities(self) -> Tensor:
        """π, float [M]."""
        return self.weights.detach().softmax(0)

    def learn(self, order: Tensor, reward: float) -> None:
        """Takes in what a draw was worth; after every so many, one policy step.

        Args:
            order: int64 [n], what was drawn.
            reward: R.
        """
        self.baseline = reward if self.baseline is None else self.baseline
        self.draws.append((order.tolist(), reward))
        if len(self.draws) < self.every:
            return
        orders, rewards = zip(*self.draws)
        advantage = advantages(torch.tensor(rewards), self.baseline)
        loss = policy_loss(self.weights, [torch.tensor(order) for order in orders], advantage)
        (self.weights.grad,) = torch.autograd.grad(loss, [self.weights])
        self.optimizer.step()
        for seen in rewards:
            self.baseline += (1 - BASELINE_DECAY) * (seen - self.baseline)
        self.draws = []

    def state_dict(self) -> dict[str, Any]:
        """What the next draw depends on: tensors and plain values."""
        own = {"weights": self.weights.detach(), "baseline": self.baseline, "draws": self.draws}
        return {**own, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave."""
        self.weights.data.copy_(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline, self.draws = state["baseline"], list(state["draws"])
