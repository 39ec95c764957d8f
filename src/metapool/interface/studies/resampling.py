"""What pairs of models say, with 95 % intervals: models are resampled, since pairs that share a model are not free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; all are NaN where there was nothing to measure.

    Attributes:
        value: of all models.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def measured(self) -> bool:
        """Whether there was anything to measure."""
        return bool(np.isfinite([self.value, self.low, self.high]).all())

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def rounded(self) -> dict[str, float | None]:
        """For a JSON file.

        Returns:
            Value and ends to four digits after the point; null where nothing was measured.
        """
        return {name: round(value, 4) if np.isfinite(value) else None for name, value in vars(self).items()}


def pair_weights(counts: Floats) -> Floats:
    """How often every pair stands in a resample of models; a model and its own copy are no pair.

    Args:
        counts: [B, M], how often each model was drawn.

    Returns:
        [B, P], P = M (M - 1) / 2 pairs in the order of :func:`upper`.
    """
    first, second = np.triu_indices(counts.shape[1], 1)
    return np.asarray(counts[:, first] * counts[:, second], dtype=np.float64)


def upper(matrix: NDArray[Any]) -> NDArray[Any]:
    """The pairs of a symmetric matrix [M, M]: what is above its diagonal, [P], row by row."""
    return np.asarray(matrix[np.triu_indices(len(matrix), 1)])


def over_models(
    statistic: Callable[[Floats], Floats], models: int, generator: torch.Generator, resamples: int = 1000
) -> Estimate:
    """A statistic of pairs of models with its percentile bootstrap interval (Efron 1979), models resampled.

    Args:
        statistic: of weights of all pairs [B, P], one number [B] for each row; NaN where no pair counts.
        models: M.
        generator: source of the resamples.
        resamples: how many.

    Returns:
        The statistic of all pairs, and its interval.
    """
    value = float(statistic(pair_weights(np.ones((1, models))))[0])
    drawn = torch.randint(models, (resamples, models), generator=generator)
    counts = F.one_hot(drawn, models).sum(1).double().numpy()
    parts = max(1, resamples * models**2 // 8_000_000)
    found = np.concatenate([statistic(pair_weights(part)) for part in np.array_split(counts, parts)])
    found = found[np.isfinite(found)]
    if not np.isfinite(value) or len(found) < 2:
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def spearman(first: Floats, second: Floats, weights: Floats) -> Floats:
    """Spearman's rank correlation of values that stand in a sample several times, or not at all.

    Args:
        first: [P].
        second: [P].
        weights: [B, P], how often; one sample per row.

    Returns:
        [B] in [-1, 1], equal values sharing their ranks; NaN where a side is constant.
    """
    one, other = (_centred_ranks(values, weights) for values in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = (weights * one * other).sum(1)
        scale = np.sqrt((weights * one**2).sum(1) * (weights * other**2).sum(1))
        return np.asarray(np.where(scale > 0, covariance / scale, np.nan))


def _centred_ranks(values: Floats, weights: Floats) -> Floats:
    """Ranks of the values in every sample [B, P], equal ones sharing the middle, less the sample's mean rank."""
    known, place = np.unique(values, return_inverse=True)
    mass = np.zeros((len(weights), len(known)))
    np.add.at(mass.T, place, weights.T)
    middle = np.cumsum(mass, 1) - mass / 2
    # The mean of middle ranks is half the sample, exactly.
    return np.asarray((middle - weights.sum(1, keepdims=True) / 2)[:, place])


def rank_correlation(measure: Floats, other: Floats, among: NDArray[np.bool_], generator: torch.Generator) -> Estimate:
    """Spearman's correlation of two measures of pairs.

    Args:
        measure: [M, M].
        other: [M, M].
        among: [M, M], which pairs count.
        generator: of the bootstrap.

    Returns:
        The correlation.
    """
    kept = upper(among)
    first, second = upper(measure)[kept], upper(other)[kept]
    return over_models(lambda weights: spearman(first, second, weights[:, kept]), len(measure), generator)


def mean_of_pairs(measure: Floats, among: NDArray[np.bool_], generator: torch.Generator) -> Estimate:
    """Mean of a measure over some pairs.

    Args:
        measure: [M, M].
        among: [M, M], which pairs count.
        generator: of the bootstrap.

    Returns:
        The mean.
    """
    return over_models(lambda weights: _mean(measure, among, weights), len(measure), generator)


def block_means(
    measure: Floats, labels: Sequence[str], among: NDArray[np.bool_], generator: torch.Generator
) -> dict[str, Estimate]:
    """Mean of a measure by the two labels of a pair.

    Args:
        measure: [M, M], symmetric.
        labels: M of them.
        among: [M, M], which pairs count.
        generator: of the bootstrap.

    Returns:
        The means by ``first / second``, labels in alphabetical order; blocks without pairs are left out.
    """
    array, found = np.array(labels), dict[str, Estimate]()
    for one, other in combinations_with_replacement(sorted(set(labels)), 2):
        block = (array[:, None] == one) & (array == other)
        mean = mean_of_pairs(measure, (block | block.T) & among, generator)
        if mean.measured:
            found[f"{one} / {other}"] = mean
    return found


def contrast(
    measure: Floats, same: NDArray[np.bool_], different: NDArray[np.bool_], generator: torch.Generator
) -> Estimate:
    """Mean of a measure over some pairs less that over others.

    Args:
        measure: [M, M].
        same: [M, M], the pairs of the first mean.
        different: [M, M], those of the second.
        generator: of the bootstrap.

    Returns:
        The difference.
    """

    def statistic(weights: Floats) -> Floats:
        return _mean(measure, same, weights) - _mean(measure, different, weights)

    return over_models(statistic, len(measure), generator)


def _mean(measure: Floats, among: NDArray[np.bool_], weights: Floats) -> Floats:
    kept = upper(among)
    with np.errstate(invalid="ignore"):  # 0/0: no pair counts
        return np.asarray(weights[:, kept] @ upper(measure)[kept] / weights[:, kept].sum(1))


def alike(labels: Sequence[str]) -> NDArray[np.bool_]:
    """Which models share a label.

    Args:
        labels: M of them.

    Returns:
        [M, M].
    """
    array = np.array(labels)
    return np.asarray(array[:, None] == array)


def silhouette(distances: Floats, labels: Sequence[str]) -> float:
    """How much nearer a model's own cluster is than the next one, in the mean (Rousseeuw 1987).

    Args:
        distances: [M, M], zero on the diagonal.
        labels: M of them, two or more different ones.

    Returns:
        In [-1, 1]; a model alone in its cluster counts as 0.
    """
    own = np.unique(np.array(labels), return_inverse=True)[1]
    member = np.eye(own.max() + 1)[own]
    sizes, models = member.sum(0), np.arange(len(own))
    sums = distances @ member
    inside = sums[models, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[models, own] = np.inf
    outside = means.min(1)
    larger = np.maximum(np.maximum(inside, outside), np.finfo(np.float64).tiny)
    return float(np.where(sizes[own] > 1, (outside - inside) / larger, 0).mean())


def silhouette_test(
    distances: Floats, labels: Sequence[str], generator: torch.Generator, shuffles: int = 999
) -> dict[str, float] | None:
    """How well labels fit distances, and whether shuffled labels fit as well: a permutation test.

    Args:
        distances: [M, M], zero on the diagonal.
        labels: M of them.
        generator: of the shuffles.
        shuffles: how many.

    Returns:
        ``silhouette``, its mean over shuffles ``chance``, and the two-sided ``p``; none where the labels are all one or
        all different.
    """
    if not 2 <= len(set(labels)) < len(labels):
        return None
    found, array = silhouette(distances, labels), np.array(labels)
    orders = (torch.randperm(len(labels), generator=generator).numpy() for _ in range(shuffles))
    shuffled = np.array([silhouette(distances, array[order].tolist()) for order in orders])
    chance = float(shuffled.mean())
    # Ties are counted in, and rounding must not break them.
    extreme = int((np.abs(shuffled - chance) >= abs(found - chance) - 1e-12).sum())
    return {"silhouette": round(found, 4), "chance": round(chance, 4), "p": round((1 + extreme) / (1 + shuffles), 4)}
