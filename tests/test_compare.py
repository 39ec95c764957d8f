"""Many methods, several seeds, one table; and the list of methods."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from metapool.base.errors import MetapoolError
from metapool.evaluate import mean_interval
from metapool.interface.cli import main
from metapool.interface.compare import compare, methods_summary, table_of
from metapool.interface.recipe import Evaluation, Recipe, recipe_text
from metapool.interface.run import prepare, results
from metapool.methods import NAMED
from metapool.methods.tgr import TGR

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("world")
    world = toys.world(root / "world", epochs=4, per_class=12)
    return Recipe(
        name="tiny",
        pool=str(world / "pool"),
        method=TGR(**{**toys.SMALL_TGR, "recovery": toys.HASTY, "steps": 4, "check_every": 2}),
        compare=("average",),
        references={"known": str(toys.saved_model(root / "known"))},
        evaluation=Evaluation(data=str(world / "images"), way=3, shots=(1, 3), query=4, episodes=20),
        jobs=1,
        out=str(root / "runs"),
        store=str(root / "store"),
    )


@pytest.fixture(scope="module")
def result(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(compare(recipe, ["untrained", "ensemble"], 2).read_text())
    return found


def test_it_holds_every_method_and_no_rival_of_the_recipe(result: dict[str, Any], recipe: Recipe) -> None:
    assert set(result["methods"]) == {"tgr", "untrained", "ensemble", "known"}
    means = [sum(shot["mean"] for shot in row["shots"].values()) for row in result["methods"].values()]
    assert means == sorted(means, reverse=True)
    assert result["seeds"] == [0, 1]
    assert result["command"] == "metapool compare tiny --methods untrained ensemble --seeds 2"
    assert result["recipe"]["evaluation"] == recipe.evaluation.model_dump(mode="json")
    assert result["methods"]["untrained"]["needs"] == "nothing"
    assert result["methods"]["ensemble"]["models_at_inference"] == 3
    assert (result["methods"]["known"]["data_free"], result["methods"]["known"]["seconds"]) == (False, None)


def test_seeds_are_averaged_episode_by_episode(result: dict[str, Any], recipe: Recipe) -> None:
    """Twice as many seeds are not twice as many episodes: the interval is that of the means."""
    job = prepare(recipe.model_copy(update={"compare": ("untrained", "ensemble")}))
    found = [results(job, seed)["untrained"].scores[1].accuracies for seed in (0, 1)]
    interval = mean_interval(100 * np.mean(found, axis=0))
    row = result["methods"]["untrained"]["shots"]["1"]
    assert (row["mean"], row["ci95"]) == (round(interval.mean, 3), round(interval.ci95, 3))
    assert row["seeds"] == [round(100 * float(one.mean()), 3) for one in found]
    assert row["between_seeds"] == pytest.approx(np.std(row["seeds"], ddof=1), abs=1e-3)
    assert row["between_seeds"] > 0
    assert result["methods"]["ensemble"]["shots"]["1"]["between_seeds"] == 0, "nothing about it is random"
    pair = next(p for p in result["paired"] if (p["b"], p["shot"]) == ("untrained", 1))
    assert pair["mean"] == pytest.approx(result["methods"]["tgr"]["shots"]["1"]["mean"] - row["mean"], abs=2e-3)


def test_seconds_are_those_of_all_parts_once(result: dict[str, Any], recipe: Recipe) -> None:
    job = prepare(recipe.model_copy(update={"compare": ("untrained", "ensemble")}))
    line = results(job, 0)["tgr"]
    parts = job.store.ancestry(line.folder)
    kinds = {name.split("/")[0] for name in parts}
    assert kinds == {"recover", "probe", "embed", "view-images", "view", "meta-model", "fit-tgr"}
    assert sum(name.startswith("recover/") for name in parts) == 3
    total = sum(made["cpu_seconds"] for made in parts.values())
    assert result["methods"]["tgr"]["seconds"][0] == pytest.approx(total, abs=0.06)
    assert {name.split("/")[0] for name in job.store.ancestry(results(job, 0)["untrained"].folder)} == {
        "recover",
        "fit-untrained",
    }


def test_the_table_says_what_it_shows(result: dict[str, Any]) -> None:
    text = table_of(result)
    assert "| *known* (real images) |" in text
    assert "mean over 2 seeds" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 5
    marked = json.loads(json.dumps(result))
    marked["methods"]["tgr"]["transductive"] = True
    assert "tgr (transductive)" in table_of(marked)
    assert "transductive" not in text


def test_variants_stand_beside_their_method(recipe: Recipe) -> None:
    varied = recipe.model_dump() | {"name": "varied", "variants": {"narrow": {"name": "untrained", "width": 4}}}
    found = json.loads(compare(Recipe.model_validate(varied), ["narrow", "untrained"], 1).read_text())
    (gap,) = [pair for pair in found["paired"] if (pair["a"], pair["shot"]) == ("narrow", 1)]
    means = {name: row["shots"]["1"]["mean"] for name, row in found["methods"].items()}
    assert gap["b"] == "untrained"
    assert gap["mean"] == pytest.approx(means["narrow"] - means["untrained"], abs=2e-3)
    assert f"| narrow | untrained | {gap['mean']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f}) |" in table_of(found)
    without = json.loads(compare(Recipe.model_validate(varied), ["narrow"], 1).read_text())
    assert "against its method" not in table_of(without)


def test_on_the_command_line(recipe: Recipe, tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(recipe))
    main(["compare", str(file), "--methods", "untrained", "ensemble", "--seeds", "2"])
    out = capsys.readouterr().out
    assert out.startswith("| method | 1-shot | 3-shot | CPU seconds |")
    assert (Path(recipe.out) / "tiny" / "compare.md").read_text() == out
    with pytest.raises(SystemExit):
        main(["compare", str(file), "--methods", "nobody"])
    assert "no method is named 'nobody'" in capsys.readouterr().err
    with pytest.raises(MetapoolError, match="--seeds"):
        compare(recipe, ["untrained"], 0)


def test_methods_are_listed(capsys: Output) -> None:
    found = methods_summary()
    assert [row["name"] for row in found] == list(NAMED)
    assert all(row["paper"] and row["needs"] and row["cost"] and row["about"] for row in found)
    main(["methods", "--json"])
    assert json.loads(capsys.readouterr().out) == found
    main(["methods"])
    out = capsys.readouterr().out
    assert "tgr-maml" in out
    assert "weights of one" in out


@pytest.mark.parametrize("name", ["methods", "differences"])
def test_committed_pages_show_the_committed_comparisons(name: str) -> None:
    root = Path(__file__).parent.parent
    tool = runpy.run_path(str(root / "tools" / "update_methods.py"))
    page = (root / "docs" / f"{name}.md").read_text()
    assert tool["page"](name) == page
    if (root / "benchmarks" / "results" / f"{name}.json").is_file():
        assert "CPU seconds" in page
