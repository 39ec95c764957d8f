"""``benchmarks/recovery.py`` at tiny sizes; and its two formulas against slow ones."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ["main", "paper", "pixels-steps-60", "untrained"]


@pytest.fixture(scope="module")
def recovery() -> Iterator[ModuleType]:
    # It imports its neighbours by name, and tests have a ``reference`` of their own.
    before = {name: sys.modules.pop(name, None) for name in ("reference", "units")}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        found = importlib.util.spec_from_file_location("benchmarks_recovery", BENCHMARKS / "recovery.py")
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # dataclasses look their module up
        found.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old


def test_distance_is_the_mean_over_all_pairs_of_a_class(recovery: ModuleType) -> None:
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 0])  # class 2 has no pair
    means = []
    for label in (0, 1):
        members = [row for row, own in zip(features, labels.tolist()) if own == label]
        pairs = [1 - torch.cosine_similarity(one, other, dim=0).item() for one, other in combinations(members, 2)]
        means.append(sum(pairs) / len(pairs))
    assert recovery.within_class_distance(features, labels) == pytest.approx(sum(means) / 2, rel=1e-5)


def test_diversity_is_a_ratio_for_each_judge(recovery: ModuleType) -> None:
    def said(own: float, distance: float) -> dict[str, float]:
        return {"own": own, "all": own / 2, "distance": distance}

    seen = {"a": [said(50, 0.1), said(70, 3.0)], "b": [said(90, 0.3), said(30, 1.0)]}
    real = {"a": [said(99, 0.2), said(99, 8.0)], "b": [said(99, 0.2), said(99, 8.0)], "other": [said(0, 7.0)] * 2}
    found = recovery.measures(seen, real)
    assert found == pytest.approx({"judge_own": 60, "judge_all": 30, "diversity": (0.4 / 0.4 + 4 / 16) / 2})


def test_the_main_recipe_and_the_paper_are_what_they_are_called(recovery: ModuleType) -> None:
    recipe = recovery.load_recipe("main").method.recovery
    assert recovery.recovery_of("main", recipe, recovery.Sizes()) == recipe
    paper = recovery.recovery_of("paper", recipe, recovery.Sizes(), seed=3)
    assert (paper.width, paper.steps, paper.learning_rate, paper.per_class, paper.seed) == (64, 200, 1e-3, 30, 3)
    for name in recovery.VARIANTS:
        made = recovery.recovery_of(name, recipe, recovery.Sizes())
        assert made.per_class == (30 if name.startswith("paper") else recipe.per_class)


def test_a_small_benchmark_writes_every_variant_and_a_rerun_answers_from_the_store(tmp_path: Path) -> None:
    out, figure = tmp_path / "new" / "recovery.json", tmp_path / "new" / "recovery.svg"
    # A process of its own: its workers import the script by its name.
    command = [sys.executable, str(BENCHMARKS / "recovery.py"), "--small", "--threads", "1", "--jobs", "2"]
    command += ["--store", str(tmp_path / "store"), "--out", str(out), "--figure", str(figure)]
    command += ["--variants", *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["recovery.json", "recovery.svg"]
    result = json.loads(out.read_text())
    assert set(result) == {"command", "machine", "settings", "judges", "real", "speed", "rows"}
    assert set(result["rows"]) == set(NAMES)
    assert (result["settings"]["jobs"], result["settings"]["unit_threads"]) == (2, 1)
    assert len(result["settings"]["models"]) == 2
    assert [judge["architecture"] for judge in result["judges"]] == ["conv4", "resnet10"]
    assert result["real"]["diversity"] == 1
    for name, row in result["rows"].items():
        assert f"{name}" in done.stdout
        assert row["seconds"] > 0
        assert row["diversity"] > 0
        assert 0 <= row["judge_all"] <= row["judge_own"] <= 100
        assert set(row["by_architecture"]) == {"conv4", "resnet10"}
        halves = [part["seconds"] for part in row["by_architecture"].values()]
        assert row["seconds"] == pytest.approx(sum(halves) / 2, rel=1e-3)
        for shot in ("1", "5"):
            assert 0 < row["shots"][shot]["mean"] < 100
    assert result["rows"]["paper"]["shots"]["1"]["difference_to_paper"] == {"mean": 0, "low": 0, "high": 0}
    speed = result["speed"]
    assert speed["ratio"] == pytest.approx(speed["reference_seconds"] / speed["main_seconds"], rel=1e-3)
    assert speed["quality"]["main"]["judge_own"] == result["rows"]["main"]["judge_own"]
    assert math.isfinite(speed["kernel_ratio"])
    drawn = figure.read_text()
    assert drawn.startswith("<svg xmlns=")
    assert all(drawn.count(f">{name}<") == 3 for name in NAMES)

    figure.unlink()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads(out.read_text()) == result, "times too: nothing was made anew"
    assert figure.read_text() == drawn
