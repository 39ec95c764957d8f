"""Accuracy gain of a second model: its trend, its pairs, and a whole study in small."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studied
import torch
from scipy import stats
from toys import NEW_KINDS, POOL_KINDS, stripes, write_images

from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec
from metapool.base.store import Store
from metapool.evaluate import evaluate
from metapool.interface.cli import main
from metapool.interface.studies.gain import GainStudy, explained, said, train_pair, trend
from metapool.interface.studies.trials import draw_exam

SETTINGS: dict[str, Any] = {
    "way": 2, "sets": 2, "architectures": ("conv4:4", "resnet10:2"), "architectures_overlap": 1, "epochs": 1,
    "per_class": 4, "recovery_steps": 1, "width": 4, "steps": 2, "shot": 1, "query": 3, "seeds": 1, "episodes": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", stripes(POOL_KINDS[:6], 8))
    write_images(root / "test", stripes(NEW_KINDS, 10, seed=5))
    return root


def flags(data: Path, root: Path) -> list[str]:
    given: list[str] = []
    for name, value in SETTINGS.items():
        given += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    places = ["--store", str(root / "store"), "--out", str(root / "runs"), "--jobs", "1"]
    return ["study", "gain", "--data", str(data), *given, *places]


def test_a_whole_study(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(data, tmp_path))
    folder = tmp_path / "runs" / "study-gain"
    first = (folder / "gain.json").read_bytes()
    result = json.loads(first)
    rows = result["rows"]
    assert [row["overlap"] for row in rows if row["varies"] == "overlap"] == [2, 2, 1, 1, 0, 0] * 2
    assert {row["heterogeneity"] for row in rows} == {0.0, round(2 / 3, 4), 1.0}
    assert [row["architecture"] for row in rows if row["varies"] == "architecture"] == ["resnet10:2"] * 2
    recovered, real = ([row for row in rows if row["inputs"] == kind] for kind in ("recovered", "real images"))
    assert (len(recovered), len(real)) == (8, 6), "real images know no architecture"
    assert any(row["5-shot gain"] for row in recovered)
    assert [row["5-shot gain"] for row in recovered[:6]] != [row["5-shot gain"] for row in real]
    alone = result["summary"]["basic alone"]
    assert alone["recovered"] != alone["real images"]
    assert result["answer"] in capsys.readouterr().out
    for name in ("recovered-images-1-shot", "recovered-images-5-shot", "real-images-1-shot", "real-images-5-shot"):
        assert ElementTree.parse(folder / f"gain-{name}.svg").getroot().tag.endswith("svg")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")}
    main(flags(data, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")} == made
    assert (folder / "gain.json").read_bytes() == first
    studied.check_sample(folder / "gain.json", tmp_path / "store")


def test_class_sets_have_the_overlap_that_they_say() -> None:
    models, about = GainStudy(sets=3)._models(64)
    basic = set(models["basic"][1])
    assert len(basic) == 5
    for id, (network, overlap, varies) in about.items():
        own = set(models[id][1])
        assert (len(own), len(own & basic)) == (5, overlap)
        assert models[id][0] == network
        assert (network == "conv4:32") == (varies == "overlap")
    assert len(about) == 3 * 6 + 3 * 2
    unlike = [models[f"overlap-2-{number}"][1] for number in range(3)]
    assert len(set(unlike)) == 3, "random class sets of one overlap differ"


HETEROGENEITY = [place / 5 for place in range(6) for _ in range(5)]


def planted(shape: list[float], noise: float = 0.2) -> list[float]:
    random = np.random.default_rng(1)
    return [value + noise * random.standard_normal() for value in np.repeat(shape, 5)]


@pytest.mark.parametrize(
    ("shape", "answer"),
    [
        ([0, 2, 3, 3, 2, 0], "rises with heterogeneity and then falls"),
        ([0, 1, 2, 3, 4, 5], "only rises with"),
        ([5, 4, 3, 2, 1, 0], "only falls with"),
        ([0, 0, 0, 0, 0, 0], "neither rises nor falls"),
    ],
)
def test_the_answer_follows_what_is_planted(shape: list[float], answer: str) -> None:
    gained = planted(shape)
    found = trend(HETEROGENEITY, gained)
    assert answer in said(found, 0.5)
    assert "explains 50 % of" in said(found, 0.5)
    rank = found["rank correlation"]
    assert rank.mean == pytest.approx(stats.spearmanr(HETEROGENEITY, gained).statistic, abs=1e-12)
    means = np.array(gained).reshape(6, 5).mean(1)
    assert found["above the alike"].mean == pytest.approx(means[1:5].mean() - means[0], abs=1e-12)
    assert found["above the unlike"].mean == pytest.approx(means[1:5].mean() - means[5], abs=1e-12)
    assert all(part.low <= part.mean <= part.high for part in found.values() if part is not rank)


def test_what_heterogeneity_explains_is_the_share_of_variance_between() -> None:
    random = np.random.default_rng(0)
    places = np.repeat(np.arange(4), 2000) / 3
    between = np.array([0.0, 3.0, 1.0, 0.0])
    gained = np.repeat(between, 2000) + 2 * random.standard_normal(8000)
    assert explained(places.tolist(), gained.tolist()) == pytest.approx(between.var() / (between.var() + 4), abs=0.02)
    nothing = [explained(HETEROGENEITY, random.standard_normal(30).tolist())
               for _ in range(300)]  # fmt: skip
    assert np.mean(nothing) == pytest.approx(0, abs=0.03), "not of chance alone"
    assert explained(HETEROGENEITY, HETEROGENEITY) == 1
    assert explained(HETEROGENEITY, [1.0] * 30) == 0


def test_bootstrap_intervals_are_about_as_wide_as_theory_says() -> None:
    gained = planted([0, 1, 2, 2, 1, 0], noise=1.0)
    parts = np.array(gained).reshape(6, 5)
    variance = parts.var(1) / 5  # a resampled mean's, exactly
    wanted = 2 * 1.96 * np.sqrt(variance[1:5].sum() / 16 + variance[0])
    alike = trend(HETEROGENEITY, gained)["above the alike"]
    assert alike.high - alike.low == pytest.approx(wanted, rel=0.1)
    quiet = trend(HETEROGENEITY, planted([0, 1, 2, 2, 1, 0], noise=0.1))["above the alike"]
    assert quiet.high - quiet.low < 0.3 * (alike.high - alike.low)


@pytest.mark.parametrize("learner", ["protonet", "maml"])
def test_a_pair_learns_from_both_banks(learner: str) -> None:
    input = InputSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.3,))
    basic, other = stripes(POOL_KINDS[:2], 8), stripes(POOL_KINDS[2:4], 8)
    settings = GainStudy.model_validate({**SETTINGS, "learner": learner})
    pairs = [train_pair(tasks, input, settings, 0) for tasks in ([basic, basic], [basic, other], [basic, other])]
    weights = [torch.cat([value.flatten() for value in pair.state_dict().values()]).double() for pair in pairs]
    torch.testing.assert_close(weights[1], weights[2], rtol=0, atol=0)
    assert (weights[0] - weights[1]).abs().max() > 1e-4
    exam = draw_exam(stripes(NEW_KINDS, 8), [(2, 1)], 3, 5, 0)
    assert len(evaluate(pairs[0], exam.images, exam.episodes[2, 1]).accuracies) == 5


def test_mistakes_are_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MetapoolError, match="way: models that share no class need 10 classes"):
        GainStudy(data=str(data)).measure(Store(tmp_path))
    with pytest.raises(ValueError, match="architectures_overlap is at most way, 3, not 4"):
        GainStudy(way=3, architectures_overlap=4)
    with pytest.raises(SystemExit):
        main(["study", "gain", "--sets", "1"])
    assert "sets" in capsys.readouterr().err
