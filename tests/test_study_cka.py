"""CKA of pools: the minibatch estimate against slow references, and figure 1 of TGR on a pool of seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import reference
import studied
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.store import Store, generator_for
from metapool.embed import cka, minibatch_cka
from metapool.interface.studies import cka as module
from metapool.interface.studies.cka import CKAStudy
from metapool.interface.studies.pools import open_pools
from metapool.interface.studies.resampling import (
    alike,
    contrast,
    mean_of_pairs,
    over_models,
    pair_weights,
    rank_correlation,
    spearman,
    upper,
)
from metapool.pool import ModelPool


def features(count: int, dimension: int, seed: int) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kin(count: int) -> list[Tensor]:
    one = features(count, 5, 0)
    return [one, one[:, :3] + 0.8 * features(count, 3, 1), features(count, 4, 2)]


def by_song(some: list[Tensor], batches: list[slice]) -> NDArray[np.float64]:
    """Sums of HSIC_1 over batches, one at a time, then the ratio."""

    def total(one: Tensor, other: Tensor) -> float:
        return sum(reference.hsic_of_song(one[rows], other[rows]) for rows in batches)

    return np.array([[total(a, b) / (total(a, a) * total(b, b)) ** 0.5 for b in some] for a in some])


def test_with_one_batch_it_is_cka() -> None:
    some = kin(24)
    found = minibatch_cka(some, 24)
    np.testing.assert_allclose(found, [[cka(a, b) for b in some] for a in some], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, by_song(some, [slice(None)]), rtol=1e-9)
    np.testing.assert_allclose(found.diagonal(), 1, atol=1e-12)
    assert found.dtype == np.float64


def test_sums_over_batches_as_nguyen_et_al() -> None:
    """Of 23 images in batches of 7 or more, three batches of 8, 8 and 7."""
    some = kin(23)
    found = minibatch_cka(some, 7)
    np.testing.assert_allclose(found, by_song(some, [slice(0, 8), slice(8, 16), slice(16, 23)]), rtol=1e-9)
    assert abs(found - minibatch_cka(some, 23)).max() > 1e-3, "another estimate than that of one batch"
    averaged = np.mean([minibatch_cka([one[rows] for one in some], 7) for rows in (slice(0, 8), slice(8, 16))], axis=0)
    assert abs(found - averaged).max() > 1e-3, "a ratio of sums, no mean of ratios"


def test_is_close_to_that_of_all_images_whatever_the_batch() -> None:
    some = kin(1200)
    whole = minibatch_cka(some, 1200)
    assert 0.3 < whole[0, 1] < 0.9
    for batch in (12, 100):
        np.testing.assert_allclose(minibatch_cka(some, batch), whole, rtol=0, atol=0.05)
    few = np.array([minibatch_cka([features(16, 30, s), features(16, 30, s + 500)], 4)[0, 1] for s in range(200)])
    assert abs(few.mean()) < 3 * few.std() / 200**0.5, "independent features share nothing on average"
    assert few.std() > 0.01


def test_is_one_under_orthogonal_maps() -> None:
    one = features(40, 6, 0)
    turn = torch.linalg.qr(features(6, 6, 1))[0]
    assert minibatch_cka([one, 3 * one @ turn + 2], 8)[0, 1] == pytest.approx(1, abs=1e-12)
    stretched = one * torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert minibatch_cka([one, stretched], 8)[0, 1] < 0.9
    assert minibatch_cka([one, torch.ones_like(one)], 8)[0].tolist() == pytest.approx([1, 0], abs=1e-12)


def test_agrees_with_the_package_repsim() -> None:
    """Its ``song`` estimator of HSIC with a linear kernel; not a dependency, so only where somebody installed it."""
    repsim = pytest.importorskip("repsim")
    some = kin(30)
    hsic = np.asarray(repsim.hsic([one.numpy() for one in some], kernel_type="linear", estimator="song"))
    scale = np.sqrt(hsic.diagonal())
    np.testing.assert_allclose(minibatch_cka(some, 30), hsic / np.outer(scale, scale), rtol=1e-6)


@pytest.mark.parametrize(("counts", "batch"), [((3, 3), 4), ((8, 9), 4), ((8, 8), 3)])
def test_refuses_what_has_no_estimate(counts: tuple[int, int], batch: int) -> None:
    with pytest.raises(ValueError, match="batches of 4 or more images"):
        minibatch_cka([features(count, 2, 0) for count in counts], batch)


def test_weights_are_those_of_the_pairs_of_a_resample() -> None:
    """Models 4, 1, 4, 2 of five: six places two by two, of which one is a model and its own copy."""
    drawn = [4, 1, 4, 2]
    pairs = [tuple(sorted((a, b))) for i, a in enumerate(drawn) for b in drawn[i + 1 :] if a != b]
    counts = np.array([[drawn.count(model) for model in range(5)]], dtype=float)
    expected = [pairs.count((i, j)) for i in range(5) for j in range(i + 1, 5)]
    assert pair_weights(counts)[0].tolist() == expected
    assert sum(expected) == 5
    matrix = np.arange(9).reshape(3, 3)
    assert upper(matrix).tolist() == [1, 2, 5]


def test_resampling_models() -> None:
    generator = generator_for(0, "test")
    labels = ["a"] * 6 + ["b"] * 6
    same = alike(labels)
    planted = np.where(same, 0.9, 0.4)
    found = contrast(planted, same, ~same, generator)
    assert (found.value, found.low, found.high, found.sign) == pytest.approx((0.5, 0.5, 0.5, 1))
    assert mean_of_pairs(planted, ~same, generator).value == pytest.approx(0.4)
    assert not contrast(planted, same, np.zeros_like(same), generator).measured
    noise = np.random.default_rng(1).normal(size=(12, 12))
    nothing = contrast(noise + noise.T, same, ~same, generator)
    assert nothing.low < 0 < nothing.high
    assert nothing.sign == 0
    assert over_models(lambda weights: weights.sum(1), 5, generator).value == 10


def test_intervals_are_of_models_and_not_of_pairs() -> None:
    """Every model has a height of its own, so pairs are not free: their mean is less certain than 1/√pairs says."""
    covered, width = 0, 0.0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        height = rng.normal(size=20)
        values = height[:, None] + height + 0.1 * rng.normal(size=(20, 20))
        values = (values + values.T) / 2
        found = mean_of_pairs(values, np.ones((20, 20), dtype=bool), generator_for(seed, "test"))
        covered += found.low < 0 < found.high
        width += (found.high - found.low) / 40
    assert covered >= 33
    assert width > 3 * 2 * 1.96 * 2**0.5 / 190**0.5


def test_spearman_is_that_of_scipy_with_pairs_repeated() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, 60).astype(float), rng.normal(size=60).round(1)
    weights = np.stack([np.ones(60), rng.integers(0, 4, 60)]).astype(float)
    found = spearman(one, other, weights)
    for row, times in zip(found, weights.astype(int)):
        expected = spearmanr(one.repeat(times), other.repeat(times)).statistic
        assert row == pytest.approx(float(expected), abs=1e-12)
    assert found[0] != pytest.approx(found[1], abs=1e-3)
    assert spearman(one, one**3, weights).tolist() == pytest.approx([1, 1])
    assert np.isnan(spearman(one, np.ones(60), weights)).all()
    matrix = np.zeros((4, 4))
    matrix[np.triu_indices(4, 1)] = [1, 2, 3, 4, 5, 6]
    everything = np.ones((4, 4), dtype=bool)
    assert rank_correlation(matrix, -matrix, everything, generator_for(0, "test")).value == pytest.approx(-1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cka")


@pytest.fixture(scope="module")
def flags(root: Path, tiny_pool: ModelPool) -> list[object]:
    other = studied.renamed(tiny_pool, root / "other", "other")
    return ["--pools", tiny_pool.path, other, "--recipe", studied.recipe(root), "--images", 48, "--batch", 12]


@pytest.fixture(scope="module")
def result(root: Path, flags: list[object]) -> dict[str, Any]:
    return studied.study(root, "cka", *flags)


def test_every_pair_has_a_row(result: dict[str, Any], root: Path) -> None:
    assert len(result["rows"]) == 8 * 7 // 2
    same = [r for r in result["rows"] if r["first"].split("/")[1] == r["second"].split("/")[1]]
    assert len(same) == 4
    assert all(row["cka"] == pytest.approx(1, abs=1e-3) for row in same), "the same weights see the same"
    assert all(row["domain_first"] != row["domain_second"] for row in same)
    others = [row["cka"] for row in result["rows"] if row not in same]
    assert max(others) < 0.999
    svg = studied.figures(root, "cka")["cka.svg"]
    assert all(text in svg for text in ("tiny", "other", "conv4:8", "resnet10:8"))


def test_the_second_call_makes_nothing(result: dict[str, Any], root: Path, flags: list[object]) -> None:
    before = studied.made(root)
    assert studied.study(root, "cka", *flags) == result
    assert studied.made(root) == before


def test_the_answer_follows_the_numbers(
    root: Path, tiny_pool: ModelPool, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    study = CKAStudy(pools=(str(tiny_pool.path), str(root / "other")), recipe=str(root / "tiny.yaml"))
    domains = alike(["tiny"] * 4 + ["other"] * 4)
    answers = []
    for planted in (np.where(domains, 0.9, 0.2), np.where(domains, 0.2, 0.9), np.full((8, 8), 0.5)):
        monkeypatch.setattr(module, "pool_cka", lambda *_, planted=planted: planted)
        answers.append(study.measure(Store(root / "store")).answer)
    assert "Models of one domain are more alike than" in answers[0]
    assert "Models of one domain are less alike than" in answers[1]
    assert "Models of one domain are not clearly more or less alike" in answers[2]
    assert "mean CKA 0.90 [0.90, 0.90] against 0.20 [0.20, 0.20]" in answers[0]


def test_mistakes_are_one_line(root: Path, tiny_pool: ModelPool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        studied.study(root, "cka", "--pools", tiny_pool.path, tiny_pool.path)
    assert "pools: expected one or more pools of different names" in capsys.readouterr().err
    with pytest.raises(pydantic.ValidationError, match="batch\n  Input should be greater than or equal to 4"):
        CKAStudy(batch=3)
    study = CKAStudy(pools=(str(tiny_pool.path),), recipe=str(root / "tiny.yaml"), images=4, batch=4)
    with pytest.raises(MetapoolError, match="pools: expected 3 or more models"):
        open_pools([str(short_pool(tiny_pool, root / "short"))])
    assert len(study.measure(Store(root / "store")).rows) == 6


def short_pool(pool: ModelPool, folder: Path) -> Path:
    short = ModelPool.create(folder, "short")
    short.add(pool[0])
    return folder
