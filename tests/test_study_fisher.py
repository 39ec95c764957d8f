"""Dissimilarity against shared classes, figure 4 of TGR, on planted class sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import studied
import torch
from check_results import rows_of_study

from metapool.base.store import Store
from metapool.interface.studies.fisher import FisherStudy, planted_sets, weight_distances
from metapool.interface.studies.pools import Pools, open_pools
from metapool.pool import ModelPool


def test_sets_overlap_as_planned() -> None:
    plan = planted_sets(5, (0, 2, 5), 6, seed=3)
    assert len(plan) == 18
    for id, labels in plan.items():
        assert labels == sorted(set(labels))
        assert len(labels) == 5
        assert len(set(labels) & set(range(5))) == int(id.split("-")[1])
        assert max(labels) < 10
    assert len({tuple(plan[f"overlap-2-{number}"]) for number in range(6)}) > 1
    assert planted_sets(5, (2,), 6, seed=3) == {id: labels for id, labels in plan.items() if "-2-" in id}
    assert planted_sets(5, (2,), 6, seed=4) != planted_sets(5, (2,), 6, seed=3)


def test_distance_of_weights(tiny_pool: ModelPool) -> None:
    pools = open_pools([str(tiny_pool.path)])
    found = weight_distances(pools)
    names = list(pools.entries)
    one, other = (tiny_pool.get(id).network for id in ("a-conv4", "d-conv4"))
    assert np.isnan(found[names.index("a-conv4"), names.index("b-resnet10")])
    assert np.isnan(found[names.index("a-conv4"), names.index("d-conv4")]), "width 8 and width 6"
    np.testing.assert_allclose(found.diagonal(), 0, atol=1e-12)
    assert not torch.equal(one.encoder[0][0].weight.flatten()[:9], other.encoder[0][0].weight.flatten()[:9])


def test_distance_of_weights_by_hand(tiny_pool: ModelPool, tmp_path: Path) -> None:
    pool = ModelPool.create(tmp_path / "pool", "pair")
    for id, factor in (("one", 1.0), ("doubled", 2.0), ("turned", -1.0), ("moved", 1.0)):
        model = tiny_pool.get("a-conv4")
        model.id = id
        for name, value in model.network.named_parameters():
            value.mul_(factor)
            if id == "moved" and not name.startswith("head."):
                value.add_(0.5)
        model.network.head.weight.add_(factor)
        pool.add(model)
    found = weight_distances(Pools({"pair": pool}))
    assert found[0, 1] == pytest.approx(0, abs=1e-6), "scale and head say nothing"
    assert found[0, 2] == pytest.approx(2**0.5)
    flat = [
        torch.cat(
            [v.flatten() for n, v in pool.get(id).network.named_parameters() if not n.startswith("head.")]
        ).double()
        for id in ("one", "moved")
    ]
    cosine = float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))
    assert found[0, 3] == pytest.approx((1 - cosine) ** 0.5, abs=1e-6)
    assert 0.05 < found[0, 3] < 1.4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fisher")


@pytest.fixture(scope="module")
def flags(root: Path, tiny_pool: ModelPool) -> list[object]:
    planted = ["--overlaps", 0, 2, "--sets", 1, "--way", 2, "--architectures", "conv4:4", "--epochs", 1]
    return ["--pools", tiny_pool.path, "--recipe", studied.recipe(root), *planted, "--images", 24]


@pytest.fixture(scope="module")
def result(root: Path, flags: list[object]) -> dict[str, Any]:
    return studied.study(root, "fisher", *flags)


def test_every_pair_of_every_pool_has_a_row(result: dict[str, Any], root: Path) -> None:
    rows = {(row["first"], row["second"]): row for row in result["rows"]}
    assert len(rows) == 6 + 3
    assert rows["base-0", "overlap-0-0"]["overlap"] == 0
    assert rows["base-0", "overlap-2-0"]["overlap"] == 2
    assert rows["base-0", "overlap-2-0"]["jaccard"] == 1
    assert rows["a-conv4", "b-resnet10"]["weight_distance"] is None
    assert rows["a-conv4", "b-resnet10"]["same_architecture"] is False
    assert rows["a-conv4", "b-resnet10"]["jaccard"] == pytest.approx(2 / 3, abs=1e-4)
    assert 0 < rows["base-0", "overlap-0-0"]["weight_distance"] < 1.5
    assert 0 < rows["base-0", "overlap-0-0"]["dissimilarity"] < 1
    assert result["summary"]["planted"]["models"] == 3
    assert set(studied.figures(root, "fisher")) == {
        f"fisher-{pool}-{part}.svg" for pool in ("tiny", "planted") for part in ("overlap", "architectures")
    }


def test_the_second_call_makes_nothing(result: dict[str, Any], root: Path, flags: list[object]) -> None:
    before = studied.made(root)
    assert studied.study(root, "fisher", *flags) == result
    studied.check_sample(root / "runs" / "study-fisher" / "fisher.json", root / "store")
    assert studied.made(root) == before


def test_the_answer_follows_the_numbers(
    tiny_pool: ModelPool, root: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    study = FisherStudy(pools=("icons-30",), overlaps=(), recipe=str(root / "tiny.yaml"))
    overlap = open_pools(["icons-30"]).overlaps.astype(float)
    noise = np.random.default_rng(0).random(overlap.shape)
    noise = noise + noise.T
    answers = []
    for planted in (5 - overlap + 0.1 * noise, 1 + overlap, noise):
        measures = dict.fromkeys(("dissimilarity", "cka_distance", "weight_distance"), planted)
        monkeypatch.setattr(FisherStudy, "_measures", lambda *_, measures=measures: measures)
        answers.append(study.measure(Store(root / "store")).answer)
    assert "dissimilarity falls with shared classes" in answers[0]
    assert "dissimilarity rises with shared classes, rank correlation 1.00" in answers[1]
    assert "dissimilarity does not clearly follow overlap" in answers[2]


def test_mistakes_are_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, wrong in (({"overlaps": (6,)}, "share 5 at most"), ({"pools": (), "overlaps": ()}, "name pools or")):
        with pytest.raises(pydantic.ValidationError, match=wrong):
            FisherStudy(**settings)
    for flags, wrong in (
        (["--way", 40, "--pools"], "data: planted sets of 40 classes need 80 classes; icons has 64"),
        (["--architectures", "tree", "--pools"], "architecture 'tree'"),
    ):
        with pytest.raises(SystemExit):
            studied.study(root, "fisher", *flags)
        error = capsys.readouterr().err
        assert wrong in error
        assert len(error.strip().splitlines()) == 1


def test_a_wrong_number_is_seen(result: dict[str, Any], root: Path) -> None:
    for row in result["rows"]:
        row["dissimilarity"] += 0.1
    wrong = root / "wrong.json"
    wrong.write_text(json.dumps(result))
    found = {what: abs(before - now) <= apart for what, before, now, apart in rows_of_study(wrong, root / "store")}
    assert [what for what, same in found.items() if not same] == [what for what in found if "dissimilarity" in what]
    assert not all(found.values())
