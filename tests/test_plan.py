"""A plan says what a run would do: the same folders of the store, nothing made, what is there and what is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file

from metapool.interface.cli import main
from metapool.interface.plan import Plan, plan, plan_summary
from metapool.interface.plan.timing import seconds_at
from metapool.interface.recipe import Evaluation, Recipe, recipe_text
from metapool.interface.run import run
from metapool.learners import MAML
from metapool.methods.free import FREE
from metapool.methods.tgr import TGR
from metapool.recover import PixelRecovery
from metapool.views import ViewSettings

Output = pytest.CaptureFixture[str]
BRIEF: dict[str, Any] = {**toys.SMALL_TGR, "recovery": toys.HASTY, "steps": 6, "check_every": 2, "batch": 16}
CLASSIFY: dict[str, Any] = {**BRIEF, "task_loss": "classify", "replay": "episodes", "replay_tasks": 1}
COMPARE = (
    "untrained",
    "best-single",
    "average",
    "mean-single",
    "ensemble-2",
    "ensemble-whitened",
    "input-control",
    "maml",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pool``, and ``images/{val,test}/<class>/*.png`` of classes that the pool does not know."""
    return toys.world(tmp_path_factory.mktemp("world"), epochs=1, per_class=8)


def tiny(world: Path, home: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "tiny",
        "pool": str(world / "pool"),
        "method": TGR(**BRIEF),
        "compare": COMPARE,
        "variants": {"maml": TGR(**{**CLASSIFY, "learner": MAML(test_steps=2, inner_steps=1)})},
        "references": {"saved": str(toys.saved_model(world / "saved"))},
        "evaluation": Evaluation(data=str(world / "images"), way=3, shots=(1, 3), query=4, episodes=6),
        "jobs": 1,
        "out": str(home / "runs"),
        "store": str(home / "store"),
    }
    return Recipe(**{**fields, **changes})


def only(world: Path, home: Path, **changes: Any) -> Recipe:
    """The method alone."""
    return tiny(world, home, **{"compare": (), "variants": {}, "references": {}, **changes})


@pytest.fixture(scope="module")
def empty(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A place where nothing has run yet, and the plan for it."""
    home = tmp_path_factory.mktemp("home")
    return home, plan(tiny(world, home))


@pytest.fixture(scope="module")
def ran(world: Path, empty: tuple[Path, Plan]) -> Path:
    """The same place after the run."""
    home, _ = empty
    assert not (home / "store").exists(), "a plan makes nothing"
    run(tiny(world, home))
    return home


@pytest.fixture
def copied(ran: Path, tmp_path: Path) -> Path:
    shutil.copytree(ran, tmp_path / "home")
    return tmp_path / "home"


def made(home: Path) -> set[str]:
    store = home / "store"
    return {str(file.parent.relative_to(store)) for file in store.rglob("made.json")}


def files(home: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in home.rglob("*")}


def artifacts(planned: Plan, *stages: str) -> set[str]:
    told = planned.as_dict()["stages"]
    parts = [part for stage in told if not stages or stage["stage"] in stages for part in stage["parts"]]
    return {part["artifact"] for part in parts if part["artifact"] is not None}


def stored(planned: Plan) -> dict[str, tuple[int, int]]:
    return {stage.name: (stage.stored, len(stage.parts)) for stage in planned.stages}


def to_make(planned: Plan) -> set[str]:
    return {stage.name for stage in planned.stages if any(part.missing for part in stage.parts)}


# Against a run --------------------------------------------------------------------------------------------------------


def test_of_an_empty_store_everything_is_missing_and_costs_something(empty: tuple[Path, Plan]) -> None:
    _, planned = empty
    assert stored(planned) == {
        "recover": (0, 6),
        "probe": (0, 2),
        "embed": (0, 6),
        "view-images": (0, 2),
        "view": (0, 6),
        "meta-model tgr": (0, 1),
        "meta-model input-control": (0, 1),
        "meta-model maml": (0, 1),
        "fit": (0, 9),
        "scores": (0, 10),
        "cost": (0, 10),
    }
    for stage in planned.stages:
        assert stage.minutes == stage.minutes_whole > 0, stage.name
    told = planned.as_dict()
    assert told["minutes"] == pytest.approx(sum(stage.minutes for stage in planned.stages))
    assert 0.5 < told["memory_gigabytes"] < 1


def test_a_run_makes_what_was_planned_and_nothing_else(empty: tuple[Path, Plan], ran: Path) -> None:
    _, planned = empty
    groups = {name for name in made(ran) if name.startswith("meta-model/")}
    assert artifacts(planned) == made(ran) - groups, "only the groups can tell the keys of the meta-models"
    assert len(groups) == sum(stage.name.startswith("meta-model") for stage in planned.stages) == 3


def test_after_the_run_everything_is_there_and_nothing_remains(world: Path, ran: Path) -> None:
    before = files(ran)
    planned = plan(tiny(world, ran))
    assert artifacts(planned) == made(ran)
    assert all(there == total for there, total in stored(planned).values())
    told = planned.as_dict()
    assert told["minutes"] == 0
    assert told["minutes_whole"] > 0
    assert files(ran) == before


def test_disk_sizes_are_those_of_the_files(empty: tuple[Path, Plan], ran: Path) -> None:
    for stage in empty[1].stages:
        if stage.name in ("recover", "view-images", "view"):
            folder = ran / "store" / stage.name
            found = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
            headers = 400 * len(stage.parts)
            assert 1e9 * stage.gigabytes == pytest.approx(found, abs=headers), stage.name


def test_a_large_pool_shows_a_part_of_its_images(copied: Path, world: Path) -> None:
    recipe = only(world, copied, method=TGR(**{**BRIEF, "views": ViewSettings(copies=1, blends=1, most=40)}))
    planned = plan(recipe)
    (images,) = artifacts(planned, "view-images")
    assert {stage.name: stage.what for stage in planned.stages}["view-images"] == "1 set, 39 images each"
    run(recipe)
    assert len(load_file(copied / "store" / images / "images.safetensors")["images"]) == 39


def test_a_lost_task_is_the_only_thing_to_make(copied: Path, world: Path) -> None:
    recipe = only(world, copied)
    (lost, *_) = sorted(artifacts(plan(recipe), "recover"))
    shutil.rmtree(copied / "store" / lost)
    planned = plan(recipe)
    assert stored(planned)["recover"] == (2, 3)
    assert to_make(planned) == {"recover"}
    assert 0 < planned.stages[0].minutes < planned.stages[0].minutes_whole
    run(recipe)
    assert not to_make(plan(recipe))


def test_what_only_a_finished_model_was_made_of_is_not_made_again(copied: Path, world: Path) -> None:
    """The companion of the test above: views serve training alone, the bank is in the report too."""
    recipe = only(world, copied)
    shutil.rmtree(copied / "store" / "view")
    planned = plan(recipe)
    assert stored(planned)["view"] == (0, 3)
    assert planned.as_dict()["minutes"] == 0
    run(recipe)
    assert not (copied / "store" / "view").exists()


def test_another_seed_trains_anew_on_the_same_bank_and_views(copied: Path, world: Path) -> None:
    recipe = only(world, copied, seed=1)
    before = made(copied)
    planned = plan(recipe)
    assert to_make(planned) == {"meta-model tgr", "fit", "scores", "cost"}
    missing = {name for name in artifacts(planned) if not (copied / "store" / name).exists()}
    run(recipe)
    assert made(copied) - before == missing


def test_other_recovery_shares_nothing(copied: Path, world: Path) -> None:
    planned = plan(only(world, copied, method=TGR(**{**BRIEF, "recovery": PixelRecovery(per_class=6, steps=5)})))
    assert all(there == 0 for there, _ in stored(planned).values())


def test_training_that_was_stopped_goes_on_from_its_checkpoint(copied: Path, world: Path) -> None:
    recipe = only(world, copied)
    whole = plan(recipe)
    for kind in ("fit-tgr", "meta-model"):
        shutil.rmtree(copied / "store" / kind)
    (name,) = artifacts(whole, "meta-model tgr")
    checkpoint = copied / "store" / "checkpoints" / f"meta-train-{Path(name).name}.pt"
    torch.save({**torch.load(checkpoint, weights_only=True), "step": 4}, checkpoint)
    (training,) = (stage for stage in plan(recipe).stages if stage.name == "meta-model tgr")
    assert training.what == "6 steps, 4 done"
    assert 0 < training.minutes < training.minutes_whole


# Words ----------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(
    empty: tuple[Path, Plan], world: Path, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "tiny.yaml").write_text(recipe_text(only(world, tmp_path)))
    main(["plan", str(tmp_path / "tiny.yaml"), "--json", "--method.steps", "7"])
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"name", "minutes", "minutes_whole", "disk_gigabytes", "memory_gigabytes", "stages"}
    (training,) = (stage for stage in told["stages"] if stage["stage"] == "meta-model tgr")
    assert training["what"] == "7 steps", "flags are laid over the file"
    assert (training["stored"], training["total"]) == (0, 1)
    assert [part["name"] for part in told["stages"][0]["parts"]] == ["stripes-000", "stripes-001", "stripes-002"]

    main(["plan", str(tmp_path / "tiny.yaml")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "what", "minutes", "of", "disk", "GB", "in", "the", "store"]
    assert lines[1].startswith("recover")
    assert lines[1].endswith("0 of 3")
    assert "3 models, 2 steps each" in lines[1]
    assert lines[-2].startswith("total still to do")
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "runs").exists()

    rows = plan_summary(empty[1]).splitlines()
    assert "3 models, 2 steps each; 3 models, 0 steps each" in rows[1]
    assert "10 models, 6 episodes of 1 and 3 shots" in rows[-4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": ["oracel"]}, "no method is named 'oracel'"),
        ({"poool": "icons-30"}, "poool"),
        ({"evaluation": {"data": "nowhere"}}, "nowhere: expected one of"),
        ({"pool": "nowhere"}, "nowhere is not a pool"),
    ],
    ids=str,
)
def test_a_mistake_is_the_line_that_a_run_gives(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"store": str(tmp_path / "store"), **changes}))
    lines = []
    for command in ("plan", "run"):
        with pytest.raises(SystemExit, match="2"):
            main([command, str(tmp_path / "wrong.yaml")])
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1]
    assert lines[0].count("\n") == 1
    assert message in lines[0]


def test_the_threads_of_the_process_are_left_as_they_were(world: Path, tmp_path: Path) -> None:
    torch.set_num_threads(3)
    plan(only(world, tmp_path))
    assert torch.get_num_threads() == 3


# Scaling --------------------------------------------------------------------------------------------------------------


def test_many_steps_lie_on_the_line_through_a_few() -> None:
    assert seconds_at(100, lambda steps: 2.0 + 0.5 * steps) == pytest.approx(52)
    assert seconds_at(3, lambda steps: 2.0 + 0.5 * steps**2) == pytest.approx(6.5), "few steps are timed as they are"
    assert seconds_at(100, lambda steps: 5.0 - steps) == 4.0, "more steps never take less"


def test_a_method_that_makes_its_images_as_it_goes_is_timed_by_a_few_steps_of_its_own(
    world: Path, tmp_path: Path
) -> None:
    short, long = (FREE(**{**toys.SMALL[FREE], "steps": steps}) for steps in (12, 1200))
    planned = plan(only(world, tmp_path, method=short, compare=("long",), variants={"long": long}))
    stages = {stage.name: stage for stage in planned.stages}
    assert set(stages) == {"fit", "scores", "cost"}, "it has no bank"
    seconds = {part.name: part.seconds for part in stages["fit"].parts}
    assert seconds["long"] > 10 * seconds["free"] > 0
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").rglob("made.json"))
