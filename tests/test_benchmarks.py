"""Benchmarks that have no other test, at tiny sizes: they run, and what they write is whole."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def growth(*arguments: object) -> subprocess.CompletedProcess[str]:
    # A process of its own: the process that it measures imports the script by its name.
    command = [sys.executable, str(BENCHMARKS / "growth.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_growth_measures_every_stage_and_draws_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "growth.json"
    done = growth("--small", "--models", 4, 2, "--jobs", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["growth.json", "growth.svg"], "no temporary file is left"
    result = json.loads(out.read_text())
    assert set(result) == {"command", "machine", "settings", "pools", "powers"}
    assert "--small" in result["command"]
    assert {"capability", "cores", "torch", "threads"} <= set(result["machine"])
    assert {"seed", "jobs", "noise", "recovery_steps_per_model", "training_steps"} <= set(result["settings"])
    stages = ["recover", "embed", "group", "views", "train", "evaluate"]
    small, large = result["pools"]
    assert small["architectures"] == {"conv4": 1, "resnet10": 1}
    assert large["architectures"] == {"conv4": 2, "resnet10": 1, "resnet18": 1}
    for pool, models in ((small, 2), (large, 4)):
        assert pool["models"] == models
        assert list(pool["stages"]) == stages
        assert all(0 < stage["own_mb"] < stage["resident_mb"] for stage in pool["stages"].values())
        assert all(0 < stage["seconds"] < 300 for stage in pool["stages"].values())
        assert pool["seconds"] == pytest.approx(sum(stage["seconds"] for stage in pool["stages"].values()), abs=0.01)
        for unit in ("resident_mb", "own_mb"):
            assert pool["peak"][unit] == max(stage[unit] for stage in pool["stages"].values())
        # Two workers that have imported torch: each holds about what the process itself held at its start.
        assert pool["peak"]["resident_mb"] > 2 * pool["start"]["resident_mb"]
    assert large["store_mb"] > small["store_mb"] > 0
    (power,) = result["powers"]["evaluate"]
    seconds = [pool["stages"]["evaluate"]["seconds"] for pool in (small, large)]
    assert power == pytest.approx(math.log(seconds[1] / seconds[0], 2), abs=0.006)
    assert "| meta-train |" in done.stdout

    drawn = out.with_suffix(".svg").read_text()
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert all(word in drawn for word in ("Seconds", "Peak memory, GB", "probe and embed", "as the number of models"))
    again = growth("--figure-only", "--out", out, "--figure", tmp_path / "again.svg")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.svg").read_text() == drawn, "the same numbers give the same bytes"


def test_growth_does_not_replace_a_result_by_a_small_one() -> None:
    done = growth("--small")
    assert done.returncode == 2
    assert "--small needs --out" in done.stderr
