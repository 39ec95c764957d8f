"""What tests of studies start from: a recipe of seconds, a study by the command line, and what it left behind."""

import json
from pathlib import Path
from typing import Any

import toys
from check_results import rows_of_study

from metapool.interface.cli import main
from metapool.interface.recipe import Recipe, recipe_text
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool


def recipe(folder: Path) -> Path:
    """A recipe whose recovery and probe take no time."""
    file = folder / "tiny.yaml"
    file.write_text(recipe_text(Recipe(name="tiny", method=TGR(**{**toys.SMALL_TGR, "recovery": toys.HASTY}))))
    return file


def study(root: Path, name: str, *flags: object) -> dict[str, Any]:
    """What ``metapool study`` writes, with its store and runs under ``root``."""
    own = ["--jobs", "1", "--store", str(root / "store"), "--out", str(root / "runs")]
    main(["study", name, *map(str, flags), *own])
    found: dict[str, Any] = json.loads((root / "runs" / f"study-{name}" / f"{name}.json").read_text())
    return found


def figures(root: Path, name: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (root / "runs" / f"study-{name}").glob("*.svg")}


def made(root: Path) -> dict[str, int]:
    """When each artifact was made: the same before and after a call that reuses all of them."""
    return {str(path): path.stat().st_mtime_ns for path in (root / "store").rglob("made.json")}


def check_sample(result: Path, store: Path) -> None:
    """What ``make results-check`` asks of a committed study: the rows of its sample are in the table, and as there."""
    found = list(rows_of_study(result, store))
    assert found
    assert [what for what, before, now, apart in found if not abs(before - now) <= apart] == []


def renamed(pool: ModelPool, folder: Path, name: str) -> Path:
    """The same models as a pool of another name, in reverse order."""
    copy = ModelPool.create(folder, name)
    for id in reversed(pool.ids):
        copy.add(pool.get(id))
    return folder
