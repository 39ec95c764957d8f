"""Groups are a partition of the pool, none too small, whatever the dissimilarities."""

import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from metapool.base.errors import MetapoolError
from metapool.group import Grouping, group_models

GROUPINGS: tuple[Grouping, ...] = ("dissimilar", "similar", "random")
EVERY_GROUPING = pytest.mark.parametrize("grouping", GROUPINGS)


def symmetric(models: int, seed: int = 0) -> NDArray[np.float64]:
    upper = np.triu(np.random.default_rng(seed).random((models, models)), 1)
    return upper + upper.T


def assert_valid(groups: list[list[int]], models: int, count: int, smallest: int) -> None:
    assert sorted(model for group in groups for model in group) == list(range(models)), "every model, once"
    assert len(groups) == count
    assert min(map(len, groups)) >= smallest
    assert groups == sorted(sorted(group) for group in groups)
    assert all(type(model) is int for group in groups for model in group)


@EVERY_GROUPING
@pytest.mark.parametrize(("models", "asked", "smallest"), list(product((4, 5, 9, 30), (1, 2, 5), (1, 4))))
def test_a_partition_with_no_group_too_small(grouping: Grouping, models: int, asked: int, smallest: int) -> None:
    groups = group_models(symmetric(models), grouping, asked, smallest, seed=1)
    assert_valid(groups, models, max(1, min(asked, models // smallest)), smallest)


@given(
    models=st.integers(1, 12),
    asked=st.integers(1, 12),
    smallest=st.integers(1, 4),
    grouping=st.sampled_from(GROUPINGS),
    seed=st.integers(0, 2**63 - 1),
    levels=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_ties_and_degenerate_matrices(
    models: int, asked: int, smallest: int, grouping: Grouping, seed: int, levels: int
) -> None:
    matrix = np.round(symmetric(models, seed % 1000) * (levels - 1)) / max(levels - 1, 1)
    if models < smallest:
        return
    groups = group_models(matrix, grouping, asked, smallest, seed)
    assert_valid(groups, models, max(1, min(asked, models // smallest)), smallest)


@EVERY_GROUPING
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_models_that_are_all_alike_or_all_unlike_still_get_groups_without_a_warning(
    grouping: Grouping, value: float
) -> None:
    matrix = value * (1 - np.eye(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_valid(group_models(matrix, grouping, 3, 4, seed=0), 12, 3, 4)


@EVERY_GROUPING
def test_same_arguments_same_groups(grouping: Grouping) -> None:
    matrix = symmetric(20)
    before = matrix.copy()
    assert group_models(matrix, grouping, 4, 3, seed=5) == group_models(matrix, grouping, 4, 3, seed=5)
    np.testing.assert_array_equal(matrix, before)


def test_random_groups_are_even_and_follow_the_seed_alone() -> None:
    groups = group_models(symmetric(22), "random", 5, 4, seed=0)
    assert sorted(map(len, groups)) == [4, 4, 4, 5, 5]
    assert groups == group_models(symmetric(22, seed=1), "random", 5, 4, seed=0)
    assert groups != group_models(symmetric(22), "random", 5, 4, seed=1)


@pytest.mark.parametrize(("grouping", "chosen"), [("dissimilar", 4), ("similar", 3)])
def test_a_group_too_small_takes_what_fits_it_best(grouping: Grouping, chosen: int) -> None:
    # 0 … 4 belong together and 5, 6 do; at least three are wanted. 4 is the most unlike 5 and 6, and 3 the most like.
    attraction = np.full((7, 7), 0.1)
    attraction[:5, :5] = attraction[5:, 5:] = 0.9
    attraction[[3, 3, 5, 6], [5, 6, 3, 3]] = 0.15 if grouping == "similar" else 0.05
    attraction[[4, 4, 5, 6], [5, 6, 4, 4]] = 0.05 if grouping == "similar" else 0.15
    matrix = (attraction if grouping == "dissimilar" else 1 - attraction) * (1 - np.eye(7))
    assert group_models(matrix, grouping, 2, 2, seed=0) == [[0, 1, 2, 3, 4], [5, 6]]
    rest = [model for model in range(5) if model != chosen]
    assert group_models(matrix, grouping, 2, 3, seed=0) == [rest, [chosen, 5, 6]]


def test_too_few_models() -> None:
    with pytest.raises(MetapoolError, match=r"3 models.*needs 4.*1 more"):
        group_models(symmetric(3), "dissimilar", 5, 4, seed=0)
    assert group_models(symmetric(4), "dissimilar", 5, 4, seed=0) == [[0, 1, 2, 3]]


def test_misuse() -> None:
    with pytest.raises(ValueError, match="square"):
        group_models(np.zeros((3, 4)), "similar", 1, 1, seed=0)
    with pytest.raises(ValueError, match="finite"):
        group_models(np.full((3, 3), np.nan), "similar", 1, 1, seed=0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        group_models(symmetric(3), "similar", 0, 1, seed=0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        group_models(symmetric(3), "similar", 1, 0, seed=0)
