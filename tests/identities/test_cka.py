"""Identity 5: CKA is 1 under orthogonal maps and isotropic scaling of either side, near 0 for independent features."""

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from metapool.embed import cka


def features(count: int, dimension: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + 0.7


def orthogonal(dimension: int, seed: int) -> Tensor:
    return torch.linalg.qr(features(dimension, dimension, seed))[0]


@pytest.mark.parametrize("seed", range(3))
def test_one_under_orthogonal_maps_and_isotropic_scaling_of_either_side(seed: int) -> None:
    one = features(30, 6, seed)
    turned = -3.7 * one @ orthogonal(6, seed + 100) + 11
    assert cka(one, turned) == pytest.approx(1, abs=1e-12)
    other = features(30, 4, seed + 200) + one[:, :4]
    plain = cka(one, other)
    assert 0.05 < plain < 0.99
    assert cka(turned, other) == pytest.approx(plain, abs=1e-12)
    assert cka(one, 1e-5 * other @ orthogonal(4, seed)) == pytest.approx(plain, abs=1e-12)
    assert cka(other, one) == pytest.approx(plain, abs=1e-14)


def test_not_one_under_anisotropic_scaling() -> None:
    one = features(30, 6, 0)
    assert cka(one, one * torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64)) < 0.9


def biased_cka(one: Tensor, other: Tensor) -> float:
    one, other = one - one.mean(0), other - other.mean(0)
    return float((one.T @ other).norm() ** 2 / ((one.T @ one).norm() * (other.T @ other).norm()))


def test_near_zero_on_average_for_independent_features() -> None:
    pairs = [(features(12, 40, seed), features(12, 40, seed + 1000)) for seed in range(200)]
    values = np.array([cka(one, other) for one, other in pairs])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert values.std() > 0.01, "single values scatter, to both sides"
    assert values.min() < 0
    biased = np.mean([biased_cka(one, other) for one, other in pairs])
    assert biased > 0.5, "the plain estimate takes 12 images in 40 dimensions for kin"


@pytest.mark.parametrize("count", [4, 7, 25])
def test_equals_song_et_al(count: int) -> None:
    one = features(count, 5, 1)
    other = one[:, :3] + features(count, 3, 2)
    assert cka(one, other) == pytest.approx(reference.cka_of_song(one, other), rel=1e-9)
    assert cka(one, other) != pytest.approx(biased_cka(one, other), rel=1e-3)


def test_the_reference_is_the_mean_over_quadruples() -> None:
    one, other = features(7, 3, 3), features(7, 2, 4)
    by_quadruples = reference.hsic_by_quadruples(one, other)
    assert reference.hsic_of_song(one, other) == pytest.approx(by_quadruples, rel=1e-9)
    assert reference.hsic_of_song(one, one) != pytest.approx(by_quadruples, rel=1e-3)


def test_constant_features_share_nothing() -> None:
    one = features(9, 3, 0)
    constant = torch.full((9, 4), 0.1, dtype=torch.float32)
    assert cka(one, constant) == 0
    assert cka(constant, constant) == 0
    assert cka(one, one.float()) == pytest.approx(1, abs=1e-6)


def test_misuse() -> None:
    with pytest.raises(ValueError, match="got 3 and 3"):
        cka(features(3, 2, 0), features(3, 2, 0))
    with pytest.raises(ValueError, match="got 5 and 6"):
        cka(features(5, 2, 0), features(6, 2, 0))
