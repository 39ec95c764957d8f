"""Identity 4: dissimilarity is symmetric, zero on the diagonal, blind to a common scale and to the order of models."""

import numpy as np
import pytest
import reference
import torch

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.embed import dissimilarity

SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "norm.weight": (6,)}


def embeddings(models: int = 5, seed: int = 0) -> dict[str, Params]:
    """Heavy-tailed and positive, as squared gradients are."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model-{i}": {
            name: torch.exp(2 * torch.randn(shape, generator=generator, dtype=torch.float64) - 9)
            for name, shape in SHAPES.items()
        }
        for i in range(models)
    }


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(len(matrix), dtype=bool)]


@pytest.mark.parametrize("models", [1, 2, 7])
def test_vectorised_equals_pair_by_pair(models: int) -> None:
    some = embeddings(models)
    # The reference has no epsilon, which moves ratios by 1e-6 of the mean over a value: little, where values are not.
    np.testing.assert_allclose(dissimilarity(some), reference.dissimilarity_by_loops(some), rtol=0, atol=2e-5)


def test_symmetric_with_a_zero_diagonal_to_the_last_bit() -> None:
    matrix = dissimilarity(embeddings())
    assert matrix.dtype == np.float64
    assert (matrix == matrix.T).all()
    assert (np.diag(matrix) == 0).all()
    assert off_diagonal(matrix).min() > 0.05, "different models are apart"
    assert off_diagonal(matrix).max() <= 1
    assert len(np.unique(off_diagonal(matrix).round(9))) == 10, "every pair in its own way"


@pytest.mark.parametrize("scale", [1e-12, 1 / 3, 1e9])
def test_a_common_scale_does_not_matter(scale: float) -> None:
    some = embeddings()
    scaled = {id: {name: scale * value for name, value in task.items()} for id, task in some.items()}
    np.testing.assert_allclose(dissimilarity(scaled), dissimilarity(some), rtol=0, atol=1e-12)
    one = {id: {name: (scale if id == "model-0" else 1) * v for name, v in task.items()} for id, task in some.items()}
    assert np.abs(dissimilarity(one) - dissimilarity(some)).max() > 1e-3, "the scale of one model does"


def test_the_order_of_models_does_not_matter() -> None:
    some = embeddings(6)
    matrix = dissimilarity(some)
    order = [3, 0, 5, 1, 4, 2]
    reordered = dissimilarity({f"model-{i}": some[f"model-{i}"] for i in order})
    np.testing.assert_allclose(reordered, matrix[np.ix_(order, order)], rtol=0, atol=1e-14)
    assert np.abs(reordered - matrix).max() > 1e-3


def test_adding_a_model_moves_no_other_pair() -> None:
    np.testing.assert_array_equal(dissimilarity(embeddings(6))[:4, :4], dissimilarity(embeddings(4)))


def test_identical_tasks_are_at_zero_and_proportional_ones_too() -> None:
    some = embeddings(2)
    first, other = some.values()
    twin = {name: value.clone() for name, value in first.items()}
    matrix = dissimilarity({"a": first, "b": other, "twin": twin, "triple": {n: 3 * v for n, v in first.items()}})
    assert matrix[0, 2] == 0
    assert matrix[0, 3] < 1e-12
    assert matrix[0, 1] > 0.05


def test_disjoint_tasks_are_at_one() -> None:
    a = {"weight": torch.tensor([1.0, 2.0, 0.0, 0.0])}
    b = {"weight": torch.tensor([0.0, 0.0, 3.0, 1.0])}
    overlapping = {"weight": torch.tensor([1.0, 0.0, 3.0, 1.0])}
    matrix = dissimilarity({"a": a, "b": b, "overlapping": overlapping})
    assert matrix[0, 1] == 1
    assert 0 < matrix[0, 2] < 1


def test_tensors_of_zeros() -> None:
    # A dead layer is like a dead layer and unlike a live one; no NaN, no warning.
    dead, live = {"w": torch.zeros(3), "v": torch.ones(2)}, {"w": torch.ones(3), "v": torch.ones(2)}
    np.testing.assert_array_equal(dissimilarity({"a": dead, "b": dead, "c": live})[0], [0, 0, 0.5])


def test_misuse() -> None:
    some = embeddings(2)
    for bad in (float("nan"), float("inf"), -1.0):
        some["model-1"]["conv.bias"][0] = bad
        with pytest.raises(MetapoolError, match="model-1"):
            dissimilarity(some)
    del some["model-1"]["conv.bias"]
    with pytest.raises(ValueError, match="model-1"):
        dissimilarity(some)
