"""Identity 7: renumbering models renumbers groups; two planted clusters come out mixed across groups."""

import numpy as np
import pytest
from numpy.typing import NDArray

from metapool.group import Grouping, group_models

SEEDS = range(8)
Matrix = NDArray[np.float64]


def planted(kinds: NDArray[np.int64], within: float, between: float, seed: int) -> Matrix:
    """Dissimilarities by kind, plus noise."""
    noise = 0.05 * np.random.default_rng(seed).standard_normal((len(kinds), len(kinds)))
    upper = np.triu(np.where(kinds[:, None] == kinds, within, between) + noise, 1).clip(0, 1)
    return upper + upper.T


def shuffled_kinds(kinds: int, each: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(np.arange(kinds).repeat(each))


def kinds_in(groups: list[list[int]], kinds: NDArray[np.int64]) -> list[set[int]]:
    return [set(kinds[group].tolist()) for group in groups]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("groups", [2, 5])
def test_two_kinds_of_model_are_mixed_by_dissimilar_and_separated_by_similar(seed: int, groups: int) -> None:
    kinds = shuffled_kinds(2, 12, seed)
    matrix = planted(kinds, within=0.1, between=0.9, seed=seed)
    mixed = group_models(matrix, "dissimilar", groups, 4, seed)
    assert len(mixed) == groups
    assert kinds_in(mixed, kinds) == [{0, 1}] * groups
    separated = group_models(matrix, "similar", 2, 4, seed)
    assert sorted(map(sorted, kinds_in(separated, kinds))) == [[0], [1]]


@pytest.mark.parametrize("seed", SEEDS)
def test_models_that_are_unlike_each_other_and_like_the_rest_share_a_group(seed: int) -> None:
    kinds = shuffled_kinds(4, 6, seed)
    matrix = planted(kinds, within=0.9, between=0.2, seed=seed)
    expected = sorted(np.flatnonzero(kinds == kind).tolist() for kind in range(4))
    assert group_models(matrix, "dissimilar", 4, 4, seed) == expected
    assert group_models(matrix, "similar", 4, 4, seed) != expected
    assert group_models(matrix, "random", 4, 4, seed) != expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grouping", ["dissimilar", "similar"])
def test_renumbering_models_renumbers_groups(seed: int, grouping: Grouping) -> None:
    # Not on planted structure alone: also where spectral clustering has nothing to hold on to.
    generator = np.random.default_rng(seed)
    upper = np.triu(generator.random((21, 21)), 1)
    for matrix in (planted(shuffled_kinds(3, 7, seed), 0.8, 0.3, seed), upper + upper.T):
        groups = group_models(matrix, grouping, 4, 4, seed)
        order = generator.permutation(21)
        renumbered = group_models(matrix[np.ix_(order, order)], grouping, 4, 4, seed)
        assert sorted(sorted(int(order[model]) for model in group) for group in renumbered) == groups
        assert renumbered != groups


def test_on_average_dissimilar_groups_are_more_dissimilar_inside_than_random_ones_and_similar_ones_less() -> None:
    def inside(grouping: Grouping) -> float:
        means = []
        for seed in SEEDS:
            matrix = planted(shuffled_kinds(2, 15, seed), within=0.1, between=0.9, seed=seed)
            groups = group_models(matrix, grouping, 5, 4, seed)
            means += [matrix[np.ix_(g, g)].sum() / (len(g) * (len(g) - 1)) for g in groups]
        return float(np.mean(means))

    assert inside("dissimilar") > inside("random") + 0.02
    assert inside("random") > inside("similar") + 0.2
