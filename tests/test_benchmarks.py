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


def accuracy_over_time(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "accuracy_over_time.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_accuracy_over_time_adds_the_shared_stages_to_every_point_and_draws_them(tmp_path: Path) -> None:
    out = tmp_path / "new" / "accuracy.json"
    done = accuracy_over_time("--small", "--steps", 2, 1, 2, "--seed", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["accuracy.json", "accuracy.svg"], "no temporary file is left"
    result = json.loads(out.read_text())
    assert "--small" in result["command"]
    assert {"capability", "cores", "torch", "threads"} <= set(result["machine"])
    settings = result["settings"]
    assert settings["seed"] == 3
    assert settings["models"] == 3
    assert set(result["stages"]) == {"common", "recover", "probe", "embed", "view-images", "view", "group"}
    assert all(0 < stage["seconds"] < 300 for stage in result["stages"].values())
    shared = result["shared_seconds"]
    assert shared == pytest.approx(sum(stage["seconds"] for stage in result["stages"].values()), abs=0.01)
    workers = {name: stage["workers"] for name, stage in result["stages"].items()}
    assert workers["common"] == workers["probe"] == workers["group"] == 1
    assert workers["recover"] == workers["view"] == min(3, settings["jobs"])
    assert [point["steps"] for point in result["points"]] == [2, 1], "in the order asked for, each once"
    for point in result["points"]:
        assert point["training_seconds"] > 0
        assert point["seconds"] == pytest.approx(shared + point["training_seconds"], abs=0.002)
        assert set(point["shots"]) == {"1", "5"}
        assert all(0 < score["mean"] < 100 and score["ci95"] > 0 for score in point["shots"].values())
    assert "| recover |" in done.stdout

    drawn = out.with_suffix(".svg").read_text()
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    words = ("metapool, 1-shot", "metapool, 5-shot", "released TGR code, 20 minutes", "transductive", "2 steps")
    assert all(word in drawn for word in words)
    again = accuracy_over_time("--figure-only", "--out", out, "--figure", tmp_path / "again.svg")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.svg").read_text() == drawn, "the same numbers give the same bytes"


def test_accuracy_over_time_does_not_replace_a_result_by_a_small_one() -> None:
    done = accuracy_over_time("--small")
    assert done.returncode == 2
    assert "--small needs --out" in done.stderr


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("machine") / "new" / "machine.json"
    done = script("machine.py", "--small", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "| training, 1 block frozen | 8 |" in done.stdout
    return out


def test_machine_measures_peaks_layers_and_steps(measured: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in measured.parent.iterdir()) == ["machine.json", "machine.svg"]
    result = json.loads(measured.read_text())
    assert set(result) == {
        "command", "machine", "settings", "peak", "bandwidth", "convolutions", "passes", "steps",
    }  # fmt: skip
    assert all(rate > 0 for rate in result["peak"]["1"].values())
    assert all(rate > 0 for place in result["bandwidth"]["1"].values() for rate in place.values())

    layers = {(row["layer"], row["type"], row["direction"]): row for row in result["convolutions"]}
    assert len(layers) == 4 * 2 * 2
    first = layers["1→8 at 16×16", "float32", "forward"]
    # 8 images: a sum of nine products for each of 8 channels of 16×16 numbers; image, map, kernels and biases.
    assert first["gflop"] == pytest.approx(8 * 16 * 16 * 8 * 9 * 2 / 1e9, rel=1e-3)
    assert first["mb"] == pytest.approx(4 * (8 * 16 * 16 * (1 + 8) + 8 * 9 + 8) / 1e6, rel=1e-3)
    assert first["intensity"] == pytest.approx(1000 * first["gflop"] / first["mb"], rel=1e-3)
    assert first["gflops"] == pytest.approx(1000 * first["gflop"] / first["ms"], rel=1e-3)
    second, back = (layers["8→8 at 8×8", "bfloat16", way] for way in ("forward", "backward"))
    assert back["gflop"] == pytest.approx(2 * second["gflop"], rel=1e-3), "gradients of maps and of kernels"
    assert layers["1→8 at 16×16", "float32", "backward"]["gflop"] == first["gflop"], "none of the image"

    pooled = [row for row in result["passes"] if row["operation"] == "max-pool" and row["type"] == "float32"]
    assert [row["mb"] for row in pooled] == pytest.approx([4 * 8 * 8 * (16 * 16 + 8 * 8) / 1e6] * 2, rel=1e-3)
    steps = {row["step"]: row for row in result["steps"]}
    assert list(steps)[3:] == [f"recovery of a {name}" for name in ("conv4", "resnet10", "resnet18")]
    work = [steps[f"training, {frozen} frozen"]["gflop"] for frozen in ("0 blocks", "1 block", "2 blocks")]
    assert work == sorted(work, reverse=True), "frozen blocks do nothing"
    assert all(sum(row["kinds"].values()) == pytest.approx(1, abs=1e-3) for row in result["steps"])

    drawn = measured.with_suffix(".svg").read_text()
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert all(word in drawn for word in ("bfloat16 matrix products", "memory", "training, 1 frozen", "16²"))
    again = script("machine.py", "--figure-only", "--out", measured, "--figure", tmp_path / "again.svg")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.svg").read_text() == drawn, "the same numbers give the same bytes"


def test_machine_does_not_replace_a_result_by_a_small_one() -> None:
    done = script("machine.py", "--small")
    assert done.returncode == 2
    assert "--small needs --out" in done.stderr


def test_page_says_what_is_missed_and_what_is_missing(measured: Path, tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "docs" / "performance.md"
    (results / "main").mkdir(parents=True)
    (results / "machine.json").write_text(measured.read_text())
    times = {"reference_ms": 30.0, "product_ms": 10.0, "ratio": 3.0, "ratio_quartiles": [2.9, 3.1]}
    rows = {
        "maml-step": {**times, "goal": 4},
        "fisher": {**times, "goal": 3},
        "batch-gradient": {**times, "goal": None},
    }
    rows["fisher"]["product_ms"] = 120.0
    units = {"units": rows, "machine": {"threads": 2}, "command": "python benchmarks/units.py"}
    (results / "units.json").write_text(json.dumps(units))
    (results / "main" / "scores.json").write_text(json.dumps({"seconds": {"recover": 100.0, "methods": 500.0}}))
    points = [{"seconds": 9, "steps": 3, "shots": {"1": {"mean": 50, "ci95": 1}}}]
    (results / "accuracy_over_time.json").write_text(json.dumps({"points": points, "stages": {"recover": 4.0}}))
    page.parent.mkdir()
    (page.parent / "roofline.svg").write_text("<svg/>")
    where = ("--results", results, "--page", page)
    assert "is not what its results say" in script("performance_page.py", *where, "--check").stderr
    assert script("performance_page.py", *where).returncode == 0
    text = page.read_text()
    assert "- step of MAML: 3.00× of 4×, 1.3× short" in text
    assert "4.00 plain training steps instead of 3, 1.3× too many" in text
    assert "2 of 3 goals are missed:" in text
    assert "**missed by 2×**" in text, "the whole job"
    assert "| 9.0 | 3 | 50.0 ± 1.0 |" in text
    assert "![Distance to the machine's limit](roofline.svg)" in text
    assert "accuracy-over-time.svg" not in text, "there is none"
    assert "there is no `benchmarks/results/growth.json`, which `python benchmarks/growth.py` makes." in text
    assert script("performance_page.py", *where, "--check").returncode == 0


def test_committed_page_is_that_of_the_committed_results() -> None:
    done = script("performance_page.py", "--check")
    assert done.returncode == 0, done.stderr
