"""The main job in small: what a run writes and reuses, that it ends alike when killed and reads no training image."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from metapool.base.errors import MetapoolError
from metapool.base.store import Store
from metapool.episodes import sample_episodes
from metapool.evaluate import Scores, evaluate, paired_difference
from metapool.interface.cli import main
from metapool.interface.recipe import Evaluation, Recipe, evaluation_images, load_recipe, open_pool, recipe_text
from metapool.interface.run import pool_summary, run, run_summary
from metapool.learners import ANIL
from metapool.meta_model import MetaModel
from metapool.methods import load_model
from metapool.methods.baselines import EnsembleAll
from metapool.methods.tgr import TGR
from metapool.recover import GeneratorRecovery, recover_pool

BRIEF = {**toys.SMALL_TGR, "recovery": toys.HASTY, "steps": 6, "check_every": 2, "batch": 16}
COMPARE = ("untrained", "best-single", "ensemble-2", "input-control", "brief-anil")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pool``, and ``images/{val,test}/<class>/*.png`` of classes that the pool does not know."""
    return toys.world(tmp_path_factory.mktemp("world"), epochs=6, per_class=12)


def tiny(world: Path, home: Path, **changes: Any) -> Recipe:
    fields = {
        "name": "tiny",
        "pool": str(world / "pool"),
        "method": TGR(**BRIEF),
        "compare": COMPARE,
        "variants": {"brief-anil": TGR(**{**BRIEF, "learner": ANIL(test_steps=2), "task_loss": "classify"})},
        "evaluation": Evaluation(data=str(world / "images"), way=3, shots=(1, 3), query=4, episodes=20),
        "jobs": 1,
        "out": str(home / "runs"),
        "store": str(home / "store"),
    }
    return Recipe(**{**fields, **changes})


def only(world: Path, home: Path, **changes: Any) -> Recipe:
    """The method alone."""
    return tiny(world, home, **{"compare": (), "variants": {}, **changes})


def written(path: Path, recipe: Recipe) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe_text(recipe))
    return str(path)


def made(home: Path) -> dict[str, int]:
    """Every artifact of a store and when it was made, to the nanosecond."""
    store = home / "store"
    return {str(file.parent.relative_to(store)): file.stat().st_mtime_ns for file in store.rglob("made.json")}


def kinds(artifacts: Any) -> set[str]:
    return {artifact.split("/")[0] for artifact in artifacts}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def home(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny recipe has run once, through the command line."""
    root = tmp_path_factory.mktemp("home")
    main(["run", written(root / "tiny.yaml", tiny(world, root))])
    return root


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """The same place, for a test that adds to it; times of files are kept."""
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home"


# What a run writes ----------------------------------------------------------------------------------------------------


def test_a_run_writes_all_its_files_and_no_other(home: Path) -> None:
    folder = home / "runs" / "tiny"
    assert {path.name for path in folder.iterdir()} == {
        "model",
        "run.json",
        "steps.jsonl",
        "scores.json",
        "grouping.json",
        "gallery.npz",
        "report.html",
        "recipe.yaml",
    }
    assert {"model.json", "model.safetensors", "steps.jsonl"} <= {path.name for path in (folder / "model").iterdir()}
    assert not list((home / "store").rglob("*.tmp"))
    assert not list((home / "store").rglob("*.building"))


def test_scores_have_the_shape_that_others_read(home: Path, world: Path) -> None:
    scores = read(home / "runs" / "tiny" / "scores.json")
    assert set(scores) == {"episodes", "methods", "paired", "seconds"}
    assert set(scores["episodes"]) == {"hash", "way", "query", "n"}
    assert isinstance(scores["episodes"]["hash"], str)
    assert (scores["episodes"]["way"], scores["episodes"]["query"], scores["episodes"]["n"]) == (3, 4, 20)
    assert list(scores["methods"]) == ["tgr", *COMPARE]
    for row in scores["methods"].values():
        assert set(row) == {"data_free", "parameters", "models_at_inference", "ms_per_image", "transductive", "shots"}
        assert row["data_free"] is True
        assert type(row["parameters"]) is int
        assert type(row["models_at_inference"]) is int
        assert row["ms_per_image"] > 0
        assert list(row["shots"]) == ["1", "3"]
        for score in row["shots"].values():
            assert set(score) == {"mean", "ci95"}
            assert 0 <= score["mean"] <= 100
            assert score["ci95"] > 0
    assert [(pair["a"], pair["b"], pair["shot"]) for pair in scores["paired"]] == [
        ("tgr", rival, shot) for rival in COMPARE for shot in (1, 3)
    ]
    for pair in scores["paired"]:
        assert set(pair) == {"a", "b", "shot", "mean", "low", "high"}
        assert pair["low"] <= pair["mean"] <= pair["high"]
        means = [scores["methods"][pair[side]]["shots"][str(pair["shot"])]["mean"] for side in "ab"]
        assert pair["mean"] == pytest.approx(means[0] - means[1], abs=2e-3)
    assert {"recover", "probe", "embed", "view", "meta-model", "scores"} <= set(scores["seconds"])
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in scores["seconds"].values())


def test_scores_are_those_of_the_models_on_the_stored_episodes(home: Path, world: Path) -> None:
    recipe = tiny(world, home)
    scores = read(home / "runs" / "tiny" / "scores.json")
    models = {"tgr": load_model(home / "runs" / "tiny" / "model")}
    (folder,) = {path.parent for path in (home / "store" / "fit-best-single").glob("*/model.json")}
    models["best-single"] = load_model(folder)
    images = evaluation_images(str(world / "images"), "test", models["tgr"].input)
    assert len(images) == 48
    for shot in (1, 3):
        drawn = sample_episodes(images, 3, shot, 4, 20, recipe.evaluation.seed)
        found: dict[str, Scores] = {name: evaluate(model, images, drawn) for name, model in models.items()}
        for name, score in found.items():
            listed = scores["methods"][name]["shots"][str(shot)]
            assert listed == {"mean": round(score.interval.mean, 3), "ci95": round(score.interval.ci95, 3)}
        difference = paired_difference(found["tgr"], found["best-single"])
        (pair,) = (p for p in scores["paired"] if (p["b"], p["shot"]) == ("best-single", shot))
        assert (pair["mean"], pair["low"]) == (round(difference.mean, 3), round(difference.low, 3))


def test_the_kept_model_is_the_method_s(home: Path, world: Path) -> None:
    model = load_model(home / "runs" / "tiny" / "model")
    assert isinstance(model, MetaModel)
    assert [record["step"] for record in model.history] == list(range(6))
    checked = [record["validation"] for record in model.history if "validation" in record]
    assert len(checked) == 3
    assert all(0 <= accuracy <= 100 for accuracy in checked), "of the images of the val folder"


def test_training_records_of_every_method_under_its_name(home: Path) -> None:
    lines = [json.loads(line) for line in (home / "runs" / "tiny" / "steps.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["tgr"] * 6 + ["input-control"] * 6 + ["brief-anil"] * 6
    for line in lines:
        assert {"step", "group", "loss", "discrepancy", "cosine"} <= set(line)


def test_run_json_tells_what_ran_on_what(home: Path, world: Path) -> None:
    about = read(home / "runs" / "tiny" / "run.json")
    assert about["name"] == "tiny"
    assert about["headline"] == "tgr"
    assert about["quick"] is False
    assert (about["seed"], about["version"]) == (0, __import__("metapool").__version__)
    assert Recipe.model_validate(about["recipe"]) == tiny(world, home)
    assert about["command"] == f"metapool run {home}/runs/tiny/recipe.yaml"
    assert {"processor", "cpu", "cores", "torch", "platform"} == set(about["machine"])
    models = about["pool"]["models"]
    assert [model["id"] for model in models] == open_pool(str(world / "pool")).ids
    assert all(len(model["classes"]) == 3 and model["licence"] == "CC0-1.0" for model in models)


def test_the_recipe_beside_the_run_is_the_one_that_ran(home: Path, world: Path) -> None:
    assert load_recipe(str(home / "runs" / "tiny" / "recipe.yaml")) == tiny(world, home)


def test_groups_and_gallery_are_of_the_pool(home: Path, world: Path) -> None:
    ids = open_pool(str(world / "pool")).ids
    grouping = read(home / "runs" / "tiny" / "grouping.json")
    assert grouping["models"] == ids
    distances = np.array(grouping["dissimilarity"])
    assert distances.shape == (3, 3)
    assert (distances == distances.T).all()
    assert (np.diag(distances) == 0).all()
    assert sorted(index for group in grouping["groups"] for index in group) == [0, 1, 2]
    with np.load(home / "runs" / "tiny" / "gallery.npz", allow_pickle=False) as sheets:
        assert list(sheets) == ids
        assert all(sheets[id].shape == (18, 1, 16, 16) and sheets[id].dtype == np.uint8 for id in ids)


def test_the_report_is_one_page_about_this_run(home: Path) -> None:
    page = (home / "runs" / "tiny" / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    for words in ("tgr", *COMPARE, "stripes-002", "30-degrees-4-pixels"):
        assert words in page


def test_the_summary_has_a_line_per_method_best_first(home: Path) -> None:
    lines = run_summary(home / "runs" / "tiny").splitlines()
    assert lines[0].split() == ["method", "networks", "ms/image", "1-shot", "3-shot"]
    assert {line.split()[0] for line in lines[1:]} == {"tgr", *COMPARE}
    sums = [float(line.split()[3]) + float(line.split()[6]) for line in lines[1:]]
    assert sums == sorted(sums, reverse=True)


def test_the_summary_of_a_pool(world: Path) -> None:
    pool = open_pool(str(world / "pool"))
    mean = sum(entry.accuracy or 0 for entry in pool.manifest.models) / 3
    assert pool_summary(pool) == f"3 models, mean accuracy on held-out images of their own tasks {mean:.2f} %, 0.0 MB"


# What a run reuses ----------------------------------------------------------------------------------------------------


def test_running_again_answers_from_the_store(copied: Path, home: Path) -> None:
    before, scores = made(copied), read(copied / "runs" / "tiny" / "scores.json")
    assert before == made(home)
    assert len(before) > 20
    recipe = load_recipe(str(copied / "runs" / "tiny" / "recipe.yaml"))
    moved = recipe.model_copy(update={"store": str(copied / "store"), "out": str(copied / "runs")})
    model = (copied / "runs" / "tiny" / "model" / "model.safetensors").read_bytes()
    main(["run", written(copied / "again.yaml", moved)])
    assert made(copied) == before, "nothing was built, nothing was built again"
    again = read(copied / "runs" / "tiny" / "scores.json")
    for part in ("episodes", "methods", "paired"):
        assert again[part] == scores[part]
    assert (copied / "runs" / "tiny" / "model" / "model.safetensors").read_bytes() == model


def test_another_seed_reuses_bank_probe_and_views(copied: Path, world: Path) -> None:
    before = made(copied)
    model = (copied / "runs" / "tiny" / "model" / "model.safetensors").read_bytes()
    main(["run", written(copied / "tiny.yaml", only(world, copied)), "--seed", "1"])
    after = made(copied)
    assert {name: after[name] for name in before} == before
    assert kinds(set(after) - set(before)) == {"fit-tgr", "meta-model", "scores", "cost"}
    assert (copied / "runs" / "tiny" / "model" / "model.safetensors").read_bytes() != model
    assert read(copied / "runs" / "tiny" / "run.json")["seed"] == 1


def test_other_episodes_train_nothing(copied: Path, world: Path) -> None:
    before = made(copied)
    run(only(world, copied, evaluation=tiny(world, copied).evaluation.model_copy(update={"seed": 1, "shots": (2,)})))
    assert kinds(set(made(copied)) - set(before)) == {"scores"}
    assert list(read(copied / "runs" / "tiny" / "scores.json")["methods"]["tgr"]["shots"]) == ["2"]


def test_other_recovery_shares_nothing_but_the_pool(copied: Path, world: Path) -> None:
    before = made(copied)
    recovery = toys.HASTY.model_copy(update={"seed": 1})
    run(only(world, copied, method=TGR(**{**BRIEF, "recovery": recovery})))
    new = kinds(set(made(copied)) - set(before))
    assert {"recover", "probe", "embed", "view-images", "view", "meta-model", "fit-tgr", "scores", "cost"} == new


def test_fewer_models_are_the_first_ones_and_their_bank_is_there(copied: Path, world: Path) -> None:
    before = made(copied)
    run(only(world, copied, limit=2))
    assert "recover" not in kinds(set(made(copied)) - set(before))
    assert [model["id"] for model in read(copied / "runs" / "tiny" / "run.json")["pool"]["models"]] == [
        "stripes-000",
        "stripes-001",
    ]


def test_another_run_of_the_name_leaves_nothing_of_the_first(copied: Path, world: Path) -> None:
    folder = copied / "runs" / "tiny"
    (folder / "model" / "of-another-run").write_text("")
    run(only(world, copied, method=EnsembleAll(recovery=toys.HASTY), quick=True))
    assert {path.name for path in (folder / "model").iterdir()} == {
        "made.json",
        "model.json",
        "moments.safetensors",
        "pool",
    }
    assert not (folder / "grouping.json").exists(), "an ensemble has no groups"
    assert (folder / "steps.jsonl").read_text() == ""
    assert "quick" in (folder / "report.html").read_text().lower()
    assert {path.name for path in folder.parent.iterdir()} == {"tiny"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_groups_shown_are_those_trained_on(seed: int, copied: Path, world: Path) -> None:
    method = TGR(**{**BRIEF, "groups": 2, "teachers": 1, "grouping": "random", "steps": 2})
    run(only(world, copied, seed=seed, method=method))
    pool, store = open_pool(str(world / "pool")), Store(copied / "store", threads=1)
    bank = recover_pool(pool, toys.HASTY, store)
    expected = method.grouped(pool, bank, store, seed)
    shown = read(copied / "runs" / "tiny" / "grouping.json")
    assert [[shown["models"][index] for index in group] for group in shown["groups"]] == expected


def test_random_groups_depend_on_the_seed(copied: Path, world: Path) -> None:
    """The companion of the test above: it would see a wrong seed."""
    method = TGR(**{**BRIEF, "groups": 2, "teachers": 1, "grouping": "random"})
    pool, store = open_pool(str(world / "pool")), Store(copied / "store", threads=1)
    bank = recover_pool(pool, toys.HASTY, store)
    assert len({str(method.grouped(pool, bank, store, seed)) for seed in (0, 1, 2)}) > 1


# References and data --------------------------------------------------------------------------------------------------


def test_references_are_scored_each_for_itself(copied: Path, world: Path, tmp_path: Path) -> None:
    """Saved models are often in folders of one name, ``runs/<run>/model``."""
    model = copied / "runs" / "tiny" / "model"
    shutil.copytree(model, tmp_path / "first" / "model")
    shutil.copytree(toys.saved_model(tmp_path / "other" / "model"), tmp_path / "second" / "model")
    places = {name: str(tmp_path / name / "model") for name in ("first", "second")}
    run(only(world, copied, references={**places, "oracle": "shipped"}))
    scores = read(copied / "runs" / "tiny" / "scores.json")
    assert list(scores["methods"]) == ["tgr", "first", "second"], "metapool ships no oracle for these images"
    rows = {name: row["shots"] for name, row in scores["methods"].items()}
    assert rows["first"] == rows["tgr"] != rows["second"]
    assert [scores["methods"][name]["data_free"] for name in rows] == [True, False, False]


def test_a_reference_that_changed_is_scored_again(copied: Path, world: Path, tmp_path: Path) -> None:
    recipe = only(world, copied, references={"mine": str(tmp_path / "model")})
    shutil.copytree(copied / "runs" / "tiny" / "model", tmp_path / "model")
    run(recipe)
    first = read(copied / "runs" / "tiny" / "scores.json")["methods"]
    shutil.rmtree(tmp_path / "model")
    toys.saved_model(tmp_path / "model")
    run(recipe)
    second = read(copied / "runs" / "tiny" / "scores.json")["methods"]
    assert first["mine"]["shots"] != second["mine"]["shots"]
    assert first["tgr"] == second["tgr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": {"older": "no/such/model"}}, "no/such/model holds no saved model"),
        ({"compare": ("untrained", "nosuch")}, "no method is named 'nosuch'"),
        ({"evaluation": Evaluation(data="nowhere")}, "nowhere: expected one of"),
    ],
    ids=str,
)
def test_a_mistake_is_found_before_anything_is_built(
    changes: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(MetapoolError, match=message):
        run(tiny(world, tmp_path, **changes))
    assert not (tmp_path / "store").exists()


def test_a_handful_of_images_is_enough(copied: Path, world: Path, tmp_path: Path) -> None:
    """Two classes of two images: the fewest that make an episode."""
    toys.write_images(tmp_path / "few", toys.stripes((0, 1), 2))
    evaluation = Evaluation(data=str(tmp_path / "few"), way=2, shots=(1,), query=1, episodes=2)
    run(only(world, copied, evaluation=evaluation))
    row = read(copied / "runs" / "tiny" / "scores.json")["methods"]["tgr"]
    assert row["ms_per_image"] > 0
    assert set(row["shots"]) == {"1"}


def test_without_validation_classes_the_last_checkpoint_is_kept(copied: Path, world: Path) -> None:
    evaluation = tiny(world, copied).evaluation
    run(only(world, copied, evaluation=evaluation.model_copy(update={"validation": None})))
    lines = [json.loads(line) for line in (copied / "runs" / "tiny" / "steps.jsonl").read_text().splitlines()]
    assert [line["validation"] for line in lines if "validation" in line] == [None] * 3


# Workers --------------------------------------------------------------------------------------------------------------


def test_the_number_of_workers_changes_no_bit(home: Path, world: Path, tmp_path: Path) -> None:
    run(tiny(world, tmp_path, jobs=2, compare=("ensemble-2",)))
    for file in (tmp_path / "store").rglob("*.safetensors"):
        twin = home / "store" / file.relative_to(tmp_path / "store")
        assert file.read_bytes() == twin.read_bytes(), file.name
    places = [root / "runs" / "tiny" / "model" / "model.safetensors" for root in (home, tmp_path)]
    assert places[0].read_bytes() == places[1].read_bytes()
    scores = [read(root / "runs" / "tiny" / "scores.json")["methods"]["tgr"]["shots"] for root in (home, tmp_path)]
    assert scores[0] == scores[1]


def test_workers_are_not_asked_for_what_is_known(copied: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only finished models were made of may be gone."""
    shutil.rmtree(copied / "store" / "view")
    before = made(copied)
    monkeypatch.setattr(TGR, "prepare", None)
    run(tiny(world, copied, jobs=2))
    assert made(copied) == before


def test_an_error_in_a_worker_is_the_user_s_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "pool", tmp_path / "pool")
    (tmp_path / "pool" / "stripes-002.safetensors").write_bytes(b"cut")
    recipe = only(world, tmp_path, pool=str(tmp_path / "pool"), jobs=2)
    with pytest.raises(SystemExit) as stopped:
        main(["run", written(tmp_path / "tiny.yaml", recipe)])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"metapool: {tmp_path}/pool/stripes-002.safetensors: its SHA-256")
    assert err.count("\n") == 1


# Killed ---------------------------------------------------------------------------------------------------------------


def started(recipe: str) -> subprocess.Popen[bytes]:
    """The command as a user types it, in a process of its own."""
    command = [sys.executable, "-m", "metapool", "run", recipe]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[bytes]) -> None:
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err.decode()


def killed_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """SIGKILL at the first moment that something is true; it must become true before the process ends."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1].decode()}"
        assert time.monotonic() < deadline
        time.sleep(0.003)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_in_recovery_and_in_meta_training_it_ends_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    recovery = GeneratorRecovery(per_class=12, steps=40, code=16, width=8)
    method = TGR(**{**BRIEF, "recovery": recovery, "steps": 30, "check_every": 10, "batch": 32})
    places = {name: tmp_path / name for name in ("unbroken", "killed")}
    recipes = {name: written(place / "tiny.yaml", only(world, place, method=method)) for name, place in places.items()}
    finished(started(recipes["unbroken"]))
    store = places["killed"] / "store"

    def units() -> int:
        return len(list((store / "recover").glob("*/made.json")))

    def checkpoints() -> list[Path]:
        return list((store / "checkpoints").glob("meta-train-*.pt"))

    killed_when(started(recipes["killed"]), lambda: units() >= 1)
    assert 1 <= units() < 3, "in the middle of recovery: some models, not all"
    assert kinds(made(places["killed"])) == {"recover"}
    first = made(places["killed"])

    killed_when(started(recipes["killed"]), lambda: bool(checkpoints()))
    steps = torch.load(checkpoints()[0], weights_only=True)["step"]
    assert 10 <= steps < 30, "in the middle of meta-training"
    assert not kinds(made(places["killed"])) & {"meta-model", "fit-tgr", "scores"}
    assert units() == 3
    second = made(places["killed"])
    assert {name: second[name] for name in first} == first, "what was whole was not made again"
    assert not (places["killed"] / "runs" / "tiny" / "report.html").exists()

    finished(started(recipes["killed"]))
    third = made(places["killed"])
    assert {name: third[name] for name in second} == second
    assert set(third) == set(made(places["unbroken"]))
    for name in ("model.safetensors", "steps.jsonl"):
        files = [place / "runs" / "tiny" / "model" / name for place in places.values()]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    scores = [read(place / "runs" / "tiny" / "scores.json")["methods"]["tgr"]["shots"] for place in places.values()]
    assert scores[0] == scores[1]
    assert not list(store.rglob("*.building"))


# Without data ---------------------------------------------------------------------------------------------------------

WITHOUT_TRAINING_IMAGES = """
    import pathlib, sys
    from metapool.interface.cli import main
    from metapool.realdata.datasets import DATA

    opened = []

    def refuse(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = pathlib.Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())
            if path.is_relative_to(DATA):
                opened.append(path.name)
                if path.name.endswith("-train.npz"):
                    raise RuntimeError(f"{path.name} is a meta-train file")

    sys.addaudithook(refuse)
    main(["run", sys.argv[1]])
    assert set(opened) == {"icons-test.npz", "icons-val.npz"}, opened
    for command in (["oracle", "--steps", "1"], ["pool", "build", "--data", "icons", "--models", "1", "--epochs", "1"]):
        try:
            main([*command, "--out", sys.argv[2]])
        except RuntimeError as error:
            assert str(error) == "icons-train.npz is a meta-train file"
        else:
            raise AssertionError(f"{command} did not read the meta-train images: the hook sees nothing")
    print("data-free")
"""


def test_the_main_job_reads_no_meta_train_image(tmp_path: Path) -> None:
    recipe = load_recipe("main").model_copy(
        update={
            "name": "tiny",
            "limit": 4,
            "jobs": 1,  # all of it in the process that has the hook
            "method": TGR(**{**BRIEF, "steps": 2, "check_every": 1, "width": 4}),
            "compare": ("ensemble",),
            "evaluation": Evaluation(data="icons", episodes=10),
            "out": str(tmp_path / "runs"),
            "store": str(tmp_path / "store"),
        }
    )
    assert recipe.pool == "icons-30"
    script = [sys.executable, "-c", textwrap.dedent(WITHOUT_TRAINING_IMAGES)]
    found = subprocess.run(
        [*script, written(tmp_path / "tiny.yaml", recipe), str(tmp_path / "new")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("data-free\n")
    scores = read(tmp_path / "runs" / "tiny" / "scores.json")
    assert {name: row["data_free"] for name, row in scores["methods"].items() if name != "oracle"} == {
        "tgr": True,
        "ensemble": True,
    }
    assert not (tmp_path / "new").exists()
