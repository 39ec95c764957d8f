"""Identity 9: on simulated accuracies, the 95 % interval covers the true mean 93 to 97 times in 100."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from metapool.evaluate import Interval, Scores, mean_interval, paired_difference

REPEATS = 20_000


def simulated(repeats: int, episodes: int, query: int = 75) -> tuple[NDArray[np.float64], float]:
    """Accuracies [repeats, episodes] and their mean: episodes differ in difficulty, queries are right or wrong."""
    random = np.random.default_rng(0)
    difficulty = random.beta(6, 4, (repeats, episodes))
    return random.binomial(query, difficulty) / query, 0.6


def ends(accuracies: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``mean_interval`` of every row at once (compared with it below)."""
    count = accuracies.shape[1]
    half = stats.t.ppf(0.975, count - 1) * accuracies.std(1, ddof=1) / np.sqrt(count)
    return accuracies.mean(1) - half, accuracies.mean(1) + half


def coverage(low: NDArray[np.float64], high: NDArray[np.float64], truth: float) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("episodes", [10, 30, 100])
def test_the_interval_covers_the_mean(episodes: int) -> None:
    accuracies, truth = simulated(REPEATS, episodes)
    low, high = ends(accuracies)
    for row in range(0, REPEATS, 1000):
        found = mean_interval(accuracies[row])
        assert (found.low, found.high) == (pytest.approx(low[row]), pytest.approx(high[row]))
    assert 0.93 < coverage(low, high, truth) < 0.97


def test_the_project_s_own_function_covers_the_mean_at_600_episodes() -> None:
    accuracies, truth = simulated(2000, 600)
    found = [Scores(row).interval for row in accuracies]
    covered = np.mean([interval.low <= 100 * truth <= interval.high for interval in found])
    assert 0.93 < covered < 0.97
    shifted = np.mean([interval.low <= 100 * truth + 2 <= interval.high for interval in found])
    assert shifted < 0.6, "a mean two points away is covered much less often"


def test_the_normal_interval_of_few_episodes_covers_too_rarely() -> None:
    """Companion: with 5 episodes, 1.96 standard errors are too short; Student's t is not."""
    accuracies, truth = simulated(REPEATS, 5)
    low, high = ends(accuracies)
    middle, half = (low + high) / 2, (high - low) / 2
    assert 0.93 < coverage(low, high, truth) < 0.97
    short = half * 1.96 / stats.t.ppf(0.975, 4)
    assert coverage(middle - short, middle + short, truth) < 0.92


def test_pooling_the_queries_as_if_independent_covers_too_rarely() -> None:
    """Companion: queries of one episode share its difficulty, so a binomial interval is far too short."""
    accuracies, truth = simulated(REPEATS, 30)
    mean = accuracies.mean(1)
    half = 1.96 * np.sqrt(mean * (1 - mean) / (30 * 75))
    assert coverage(mean - half, mean + half, truth) < 0.6


def pairs(repeats: int, gap: float) -> tuple[list[Interval], list[tuple[Interval, Interval]]]:
    random = np.random.default_rng(1)
    difficulty = random.beta(6, 4, (repeats, 100))
    first, second = (np.clip(difficulty + d + random.normal(0, 0.03, (repeats, 100)), 0, 1) for d in (gap, 0.0))
    scores = [(Scores(a), Scores(b)) for a, b in zip(first, second)]
    return [paired_difference(a, b) for a, b in scores], [(a.interval, b.interval) for a, b in scores]


def test_paired_differences_of_equal_models_cover_zero() -> None:
    found, _ = pairs(2000, 0.0)
    assert 0.93 < np.mean([interval.low <= 0 <= interval.high for interval in found]) < 0.97


def test_paired_differences_see_what_two_intervals_do_not() -> None:
    paired, single = pairs(300, 0.02)
    assert np.mean([interval.low > 0 for interval in paired]) > 0.95
    assert np.mean([a.low > b.high for a, b in single]) < 0.1
