"""What pairs of models say, with 95 % intervals: models are resampled, since pairs that share a model are not free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import silhouette_score

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


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


def pairs_among(chosen: Indices) -> tuple[Indices, Indices]:
    """Pairs of different models among models that may be chosen several times.

    Args:
        chosen: int64 [M'], numbers of models.

    Returns:
        Numbers of the first and of the second model of every pair; a model and its own copy are no pair.
    """
    first, second = np.triu_indices(len(chosen), 1)
    apart = chosen[first] != chosen[second]
    return chosen[first[apart]], chosen[second[apart]]


def over_models(
    statistic: Callable[[Indices, Indices], float], models: int, generator: torch.Generator, resamples: int = 1000
) -> Estimate:
    """A statistic of pairs of models with its percentile bootstrap interval (Efron 1979), models resampled.

    Args:
        statistic: of the pairs that :func:`pairs_among` gives; NaN where it has none to speak of.
        models: M.
        generator: source of the resamples.
        resamples: how many.

    Returns:
        The statistic of all pairs, and its interval.
    """
    value = statistic(*pairs_among(np.arange(models)))
    drawn = torch.randint(models, (resamples, models), generator=generator).numpy()
    found = np.array([statistic(*pairs_among(chosen)) for chosen in drawn])
    found = found[np.isfinite(found)]
    if not np.isfinite(value) or len(found) < 2:
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def spearman(first: Floats, second: Floats) -> float:
    """Spearman's rank correlation.

    Args:
        first: [n].
        second: [n].

    Returns:
        In [-1, 1], equal values sharing their ranks; NaN where a side is constant or there are fewer than 3 pairs.
    """
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


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

    def statistic(first: Indices, second: Indices) -> float:
        kept = among[first, second]
        first, second = first[kept], second[kept]
        return spearman(measure[first, second], other[first, second])

    return over_models(statistic, len(measure), generator)


def mean_of_pairs(measure: Floats, among: NDArray[np.bool_], generator: torch.Generator) -> Estimate:
    """Mean of a measure over some pairs.

    Args:
        measure: [M, M].
        among: [M, M], which pairs count.
        generator: of the bootstrap.

    Returns:
        The mean.
    """
    return over_models(lambda first, second: _mean(measure, among, first, second), len(measure), generator)


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

    def statistic(first: Indices, second: Indices) -> float:
        return _mean(measure, same, first, second) - _mean(measure, different, first, second)

    return over_models(statistic, len(measure), generator)


def _mean(measure: Floats, among: NDArray[np.bool_], first: Indices, second: Indices) -> float:
    values = measure[first, second][among[first, second]]
    return float(values.mean()) if len(values) else float("nan")


def alike(labels: Sequence[str]) -> NDArray[np.bool_]:
    """Which models share a label.

    Args:
        labels: M of them.

    Returns:
        [M, M].
    """
    array = np.array(labels)
    return np.asarray(array[:, None] == array)


def silhouette(
    distances: Floats, labels: Sequence[str], generator: torch.Generator, shuffles: int = 999
) -> dict[str, Any] | None:
    """How well labels fit distances, and whether shuffled labels fit as well: a permutation test of the silhouette.

    Args:
        distances: [M, M], zero on the diagonal.
        labels: M of them.
        generator: of the shuffles.
        shuffles: how many.

    Returns:
        ``silhouette`` in [-1, 1] (Rousseeuw 1987), its ``chance`` mean over shuffles, and the two-sided ``p``; none
        where the labels are all one or all different.
    """
    numbers = np.unique(np.array(labels), return_inverse=True)[1]
    if not 2 <= len(set(labels)) < len(labels):
        return None

    def of(order: Indices) -> float:
        return float(silhouette_score(distances, numbers[order], metric="precomputed"))

    found = of(np.arange(len(labels)))
    shuffled = np.array([of(torch.randperm(len(labels), generator=generator).numpy()) for _ in range(shuffles)])
    chance = float(shuffled.mean())
    # Ties are counted in, and rounding must not break them.
    extreme = int((np.abs(shuffled - chance) >= abs(found - chance) - 1e-12).sum())
    return {"silhouette": round(found, 4), "chance": round(chance, 4), "p": round((1 + extreme) / (1 + shuffles), 4)}
