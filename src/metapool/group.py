"""Groups of models that are trained on together: dissimilar ones (TGR), similar ones or random ones (the ablation)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import SpectralClustering

from metapool.base.errors import MetapoolError

Grouping = Literal["dissimilar", "similar", "random"]


def group_models(
    dissimilarity: NDArray[np.float64], grouping: Grouping, groups: int, smallest: int, seed: int
) -> list[list[int]]:
    r"""Splits the pool into groups, none too small to draw a step's teachers from.

    Spectral clustering (von Luxburg 2007) of a graph whose weights say who attracts whom: D for ``dissimilar`` (Wei et
    al. 2024: unlike models share a group), 1 - D for ``similar``. ``random`` is a shuffled split into equal parts.
    Clusters may be of any size, unlike the groups here: while one is too small, it takes from the largest the model
    that fits it best (largest mean attraction).

    Args:
        dissimilarity: D, float64 [M, M] in [0, 1], symmetric, zero on the diagonal.
        grouping: what a group is.
        groups: groups wanted, at least 1; fewer are made when M < ``groups * smallest``.
        smallest: models in the smallest group allowed, at least 1.
        seed: of k-means or of the shuffle. Same arguments, same groups.

    Returns:
        A partition of 0 … M - 1: every group sorted, the list sorted by first member. Renumbering the models renumbers
        the groups (``random`` aside), unless models cannot be told apart by their sorted dissimilarities.

    Raises:
        MetapoolError: fewer than ``smallest`` models.
        ValueError: D is not a square matrix of finite numbers, or ``groups`` or ``smallest`` is below 1.
    """
    matrix = np.asarray(dissimilarity, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
        raise ValueError(f"dissimilarity must be a square matrix of finite numbers, got shape {matrix.shape}")
    if groups < 1 or smallest < 1:
        raise ValueError(f"groups and smallest must be at least 1, got {groups} and {smallest}")
    models = len(matrix)
    if models < smallest:
        raise MetapoolError(f"the pool has {models} models, but a group needs {smallest}: add {smallest - models} more")
    count = min(groups, models // smallest)
    if grouping == "random":
        shuffled = np.random.default_rng(seed).permutation(models)
        return _sorted([part.tolist() for part in np.array_split(shuffled, count)])
    # Clustering starts at random and breaks ties by position. In an order that depends on D alone, neither the numbers
    # nor the order of the models' names can matter.
    order = np.lexsort(np.sort(matrix, axis=1).T)
    attraction = matrix if grouping == "dissimilar" else 1 - matrix
    attraction = attraction[np.ix_(order, order)]
    members = _repaired(_clusters(attraction, count, seed), attraction, smallest)
    return _sorted([[int(order[model]) for model in group] for group in members])


def _clusters(attraction: NDArray[np.float64], count: int, seed: int) -> list[list[int]]:
    """At most ``count`` clusters of a graph; an empty list for each one missing."""
    models = len(attraction)
    if count == 1 or count == models:  # nothing to decide, and the eigensolver wants fewer vectors than models
        return [list(part) for part in np.array_split(np.arange(models), count)]
    weights = np.maximum(attraction, 1e-6)  # connected, whatever D: a disconnected graph has no unique eigenvectors
    clustering = SpectralClustering(count, affinity="precomputed", n_init=30, random_state=seed % 2**32)
    labels = clustering.fit_predict(weights)
    return [np.flatnonzero(labels == label).tolist() for label in range(count)]


def _repaired(groups: list[list[int]], attraction: NDArray[np.float64], smallest: int) -> list[list[int]]:
    """Moves models into groups below ``smallest``, of which there is room for all."""
    while True:
        groups = sorted(groups, key=lambda group: (len(group), group))
        needy, richest = groups[0], groups[-1]  # the richest can spare one: sizes average at least `smallest`
        if len(needy) >= smallest:
            return groups
        fits = attraction[np.ix_(richest, needy)].mean(1) if needy else -attraction[np.ix_(richest, richest)].mean(1)
        moved = richest[int(np.argmax(fits))]
        groups = [*groups[1:-1], sorted([*needy, moved]), [model for model in richest if model != moved]]


def _sorted(groups: list[list[int]]) -> list[list[int]]:
    return sorted(sorted(group) for group in groups)
