"""One-at-a-time sweeps: what is changed, what is shared, and a whole study in small."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import studied
from toys import study_recipe

from metapool.base.errors import MetapoolError
from metapool.base.store import Store
from metapool.evaluate import Interval
from metapool.interface.cli import main
from metapool.interface.studies.effects import FACTORS, EffectsStudy, _answer
from metapool.interface.studies.study import Findings

SMALL = {
    "models": (1, 3),
    "groups": (1, 2),
    "teachers": (1, 2),
    "alpha": (0.0, 0.1),
    "images": (4, 6),
    "classes": (2, 3),
    "way": (2, 3),
    "shot": (1, 2),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_recipe(tmp_path_factory.mktemp("study"))


def test_a_whole_study(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = [part for name, values in SMALL.items() for part in (f"--{name}", *map(str, values))]
    given = ["--recipe", str(recipe), "--seeds", "2", "--steps", "1", "--classes-models", "2", "--classes-epochs", "1"]
    places = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "runs"), "--jobs", "1"]
    main(["study", "effects", *given, *lists, *places])
    folder = tmp_path / "runs" / "study-effects"
    first = (folder / "effects.json").read_bytes()
    rows = json.loads(first)["rows"]
    assert list(dict.fromkeys(row["factor"] for row in rows)) == list(FACTORS)
    found = {(row["factor"], row["value"], row["way"], row["shot"]): row for row in rows}
    assert {value for factor, value, *_ in found if factor == "classes"} == {"3", "2, 3"}
    assert found["shot", "2", 3, 2]["mean"] == found["way", "3", 3, 2]["mean"], "the recipe itself, twice"
    assert found["names", "0.05", 3, 1]["mean"] == found["shot", "1", 3, 1]["mean"], "one value is the recipe's own"
    assert found["way", "2", 2, 1]["mean"] > found["way", "3", 3, 1]["mean"], "two classes are easier than three"
    assert all(row["low"] <= row["mean"] <= row["high"] and row["seeds"] == 2 for row in rows)
    drawn = (folder / "effects.svg").read_text()
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert "support images of a class" in drawn
    assert json.loads(first)["answer"] in capsys.readouterr().out

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")}
    main(["study", "effects", *given, *lists, *places])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")} == made
    assert (folder / "effects.json").read_bytes() == first
    studied.check_sample(folder / "effects.json", tmp_path / "store")


def test_workers_change_no_number(recipe: Path, tmp_path: Path) -> None:
    study = EffectsStudy(recipe=str(recipe), factors=("alpha", "classes"), seeds=2, steps=1, alpha=(0.0, 0.1),
                         classes=(2, 3), classes_models=2, classes_epochs=1)  # fmt: skip
    one, two = (study.measure(Store(tmp_path / str(jobs), jobs=jobs)) for jobs in (1, 2))
    assert one == two
    assert len({row["mean"] for row in one.rows}) > 2


def test_a_larger_pool_is_for_models_and_groups(recipe: Path, tmp_path: Path) -> None:
    study = EffectsStudy(recipe=str(recipe), models=(1, 3), groups=(1, 2), pool=str(tmp_path / "larger"))
    _, base, pool = study.opened()
    shutil.copytree(pool.path, tmp_path / "larger")
    larger, method = study._larger(pool, base)
    assert (larger.path, method) == (tmp_path / "larger", base)
    _, method = study.model_copy(update={"pool_images": 2})._larger(pool, base)
    assert method.recovery.per_class == 2 != base.recovery.per_class
    with pytest.raises(MetapoolError, match=r"shape \(1, 32, 32\); those of the recipe's pool, \(1, "):
        study.model_copy(update={"pool": "icons-30"})._larger(pool, base)
    assert study.sample()._larger(pool, base) == (pool, base), "a check of a result needs no pool but the recipe's"


def test_mistakes_are_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MetapoolError, match="models: the pool has 3, not 30"):
        EffectsStudy(recipe=str(recipe), factors=("models",)).measure(Store(tmp_path))
    with pytest.raises(MetapoolError, match="classes: the data has 8 to train on, not 20"):
        EffectsStudy(recipe=str(recipe), factors=("classes",)).measure(Store(tmp_path))
    with pytest.raises(SystemExit):
        main(["study", "effects", "--alpha", "-1", "0"])
    assert "alpha" in capsys.readouterr().err


def test_the_answer_follows_the_intervals() -> None:
    clear = {"alpha": ("0", "0.01", Interval(2.0, 1.0, 3.0)), "groups": ("1", "7", Interval(0.1, -1.0, 1.2))}
    said = _answer(clear, 3)
    assert "Clearly not zero: alpha 0 to 0.01 +2.0 (+1.0 to +3.0)" in said
    assert "Not told from zero: groups 1 to 7" in said
    changed = {**clear, "groups": ("1", "7", Interval(-2.0, -3.0, -1.0))}
    assert "groups 1 to 7 -2.0" in _answer(changed, 3).partition("Not told")[0]


def test_a_figure_of_one_factor() -> None:
    row = {"factor": "groups", "value": "1", "way": 5, "shot": 1, "mean": 50.0, "low": 49.0, "high": 51.0}
    drawn = EffectsStudy().draw(Findings([row, {**row, "value": "7", "mean": 52.0, "high": 53.0}], "", {}))[""]
    assert "groups" in drawn
    assert "1-shot" in drawn
