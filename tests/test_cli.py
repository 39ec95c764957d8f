"""The command line: every command's words, recipes under flags, and each mistake as one line on standard error."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml
from PIL import Image

import metapool
from metapool.base.errors import MetapoolError
from metapool.interface import cli
from metapool.interface.cli import main
from metapool.interface.recipe import Recipe, load_recipe
from metapool.interface.use import evaluate_saved, predict
from metapool.learners import MAML
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool, PoolManifest
from metapool.recover import PixelRecovery

Output = pytest.CaptureFixture[str]


def ended(arguments: list[str]) -> object:
    """The exit code of a command."""
    try:
        main(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []], ids=str)
def test_help_tells_a_newcomer_where_to_start(arguments: list[str], capsys: Output) -> None:
    assert ended(arguments) == 0
    out = capsys.readouterr().out
    assert "Start with `metapool run`" in " ".join(out.split())
    for command in ("run", "plan", "compare", "methods", "evaluate", "predict", "pool", "oracle"):
        assert re.search(rf"• {command}\s+\w", out), command


HELP = {
    "run": [
        "recipe.yaml",
        "--print-recipe",
        "--seed",
        "--method.task-loss",
        "--evaluation.shots",
        "--method.recovery.steps",
    ],
    "plan": ["recipe.yaml", "--json", "--seed", "--method.task-loss", "--method.recovery.steps"],
    "compare": ["recipe.yaml", "--methods", "--seeds", "--json", "--evaluation.shots"],
    "methods": ["--json"],
    "evaluate": ["--model", "--data", "--root", "--way", "--shot", "--query", "--episodes", "--seed", "--json"],
    "predict": ["--model", "--support", "--query", "--json"],
    "pool": ["build", "join", "show"],
    "pool build": ["--out", "--data", "--models", "--architectures", "--epochs", "--size", "--jobs", "--seed"],
    "pool join": ["OUT", "POOL [POOL ...]"],
    "pool show": ["--json", "icons-30"],
    "oracle": ["--data", "--out", "--steps", "--seed"],
}


@pytest.mark.parametrize("command", HELP)
def test_every_command_explains_its_flags(command: str, capsys: Output) -> None:
    assert ended([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert [word for word in HELP[command] if word not in out] == []
    assert "command." not in out, "flags have no prefix"


def test_version_and_module(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"metapool {metapool.__version__}\n"
    monkeypatch.setattr(sys, "argv", ["metapool", "--version"])
    runpy.run_module("metapool", run_name="__main__")
    assert capsys.readouterr().out == f"metapool {metapool.__version__}\n"


# Recipes under flags --------------------------------------------------------------------------------------------------


def printed(arguments: list[str], capsys: Output, tmp_path: Path) -> Recipe:
    """What ``--print-recipe`` prints, read back by :func:`load_recipe`."""
    main(["run", *arguments, "--print-recipe"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    return load_recipe(str(tmp_path / "printed.yaml"))


@pytest.mark.parametrize("name", [None, "main", "quick"])
def test_a_printed_recipe_is_read_back(name: str | None, capsys: Output, tmp_path: Path) -> None:
    assert printed([name] if name else [], capsys, tmp_path) == load_recipe(name)


def test_print_recipe_may_stand_anywhere(capsys: Output) -> None:
    texts = []
    for arguments in (
        ["quick", "--print-recipe", "--seed", "3"],
        ["--print-recipe", "quick", "--seed", "3"],
        ["quick", "--seed", "3", "--print-recipe"],
    ):
        main(["run", *arguments])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert yaml.safe_load(texts[0])["seed"] == 3


FLAGS: dict[str, tuple[list[str], Callable[[Recipe], Recipe]]] = {
    "seed": (["--seed", "7"], lambda recipe: recipe.model_copy(update={"seed": 7})),
    "none": (["--limit", "None"], lambda recipe: recipe.model_copy(update={"limit": None})),
    "limit": (["--limit", "2"], lambda recipe: recipe.model_copy(update={"limit": 2})),
    "places": (
        ["--pool", "my/pool", "--out", "there", "--store", "here", "--name", "x-1"],
        lambda recipe: recipe.model_copy(update={"pool": "my/pool", "out": "there", "store": "here", "name": "x-1"}),
    ),
    "compare": (
        ["--compare", "untrained", "ensemble-3"],
        lambda recipe: recipe.model_copy(update={"compare": ("untrained", "ensemble-3")}),
    ),
    "nobody": (["--compare"], lambda recipe: recipe.model_copy(update={"compare": ()})),
    "evaluation": (
        ["--evaluation.data", "a/folder", "--evaluation.shots", "2", "3", "--evaluation.validation", "None"],
        lambda recipe: recipe.model_copy(
            update={
                "evaluation": recipe.evaluation.model_copy(
                    update={"data": "a/folder", "shots": (2, 3), "validation": None}
                )
            }
        ),
    ),
    "method": (
        ["--method.steps", "9", "--method.task-loss", "classify", "--method.learner.no-normalise"],
        lambda recipe: recipe.model_copy(
            update={
                "method": recipe.method.model_copy(
                    update={
                        "steps": 9,
                        "task_loss": "classify",
                        "learner": recipe.method.learner.model_copy(update={"normalise": False}),
                    }
                )
            }
        ),
    ),
    "recovery": (
        ["--method.recovery.per-class", "4", "--method.recovery.weights.batch-norm", "0.5"],
        lambda recipe: recipe.model_copy(
            update={
                "method": recipe.method.model_copy(
                    update={
                        "recovery": recipe.method.recovery.model_copy(
                            update={
                                "per_class": 4,
                                "weights": recipe.method.recovery.weights.model_copy(update={"batch_norm": 0.5}),
                            }
                        )
                    }
                )
            }
        ),
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_laid_over_a_recipe(name: str, capsys: Output, tmp_path: Path) -> None:
    arguments, change = FLAGS[name]
    quick = load_recipe("quick")
    found = printed(["quick", *arguments], capsys, tmp_path)
    assert found == change(quick)
    assert found != quick


def test_flags_fit_the_kind_of_part_that_the_recipe_has(capsys: Output, tmp_path: Path) -> None:
    recipe = Recipe(
        method=TGR(learner=MAML(), task_loss="episodic", recovery=PixelRecovery()),
        variants={"mine": TGR(steps=3)},
        compare=("mine",),
        references={"older": "runs/older/model"},
    )
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert printed([str(path)], capsys, tmp_path) == recipe
    found = printed([str(path), "--method.learner.inner-steps", "2", "--method.recovery.steps", "3"], capsys, tmp_path)
    assert found.method.learner == MAML(inner_steps=2)
    assert found.method.recovery == PixelRecovery(steps=3)
    assert found.variants == recipe.variants


def test_run_prints_the_table_and_where_the_report_is(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []

    def pretend(recipe: Recipe, progress: Any) -> Path:
        progress("recover", 1, 2)
        seen.append(recipe)
        return Path("runs/x/report.html")

    monkeypatch.setattr(cli, "run", pretend)
    monkeypatch.setattr(cli, "run_summary", lambda folder: f"table of {folder}")
    main(["run", "quick", "--seed", "4"])
    assert seen == [load_recipe("quick").model_copy(update={"seed": 4})]
    assert capsys.readouterr().out == "table of runs/x\nreport: runs/x/report.html\n"


def test_an_interrupted_run_says_how_to_go_on(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(recipe: Recipe, progress: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", stop)
    assert ended(["run"]) == 130
    assert capsys.readouterr().err == "metapool: stopped; the same command goes on where it was\n"


# Pools ----------------------------------------------------------------------------------------------------------------


def test_pool_show_lists_the_shipped_pool(capsys: Output) -> None:
    main(["pool", "show"])
    out = capsys.readouterr().out
    assert "icons-30" in out
    assert "30 models, mean accuracy on held-out images of their own tasks 9" in out
    assert main(["pool", "show", "icons-30"]) is None
    assert capsys.readouterr().out == out


def test_pool_show_as_json_is_pool_json(tiny_pool: ModelPool, capsys: Output) -> None:
    main(["pool", "show", str(tiny_pool.path), "--json"])
    assert PoolManifest.model_validate_json(capsys.readouterr().out) == tiny_pool.manifest


def test_pool_show_prints_strangers_words_as_they_are(tiny_pool: ModelPool, tmp_path: Path, capsys: Output) -> None:
    """Names are not markup: neither do they colour the table nor break it."""
    shutil.copytree(tiny_pool.path, tmp_path / "pool")
    manifest = json.loads((tmp_path / "pool" / "pool.json").read_text())
    manifest["name"] = "[bold]pool[/nope]"
    manifest["models"][0]["classes"] = ["[red]", "[/x]", "c"]
    manifest["models"][0]["licence"] = "[link]"
    (tmp_path / "pool" / "pool.json").write_text(json.dumps(manifest))
    main(["pool", "show", str(tmp_path / "pool")])
    out = capsys.readouterr().out
    for words in ("[bold]pool[/nope]", "[red]", "[/x]", "[link]"):
        assert words in out


# Saved models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images to score and to label, and things that are wrong in one way each."""
    root = tmp_path_factory.mktemp("cli")
    toys.saved_model(root / "model")
    toys.write_images(root / "data", toys.stripes(toys.NEW_KINDS, 8))
    toys.write_images(root / "two", toys.stripes((0, 1), 3))
    toys.write_images(root / "one-class", toys.stripes((0,), 3))
    toys.write_images(root / "unreadable", toys.stripes((0, 1), 2))
    toys.write_images(root / "scarce", toys.stripes((0, 1), 4))
    (root / "unreadable" / "0-degrees-4-pixels" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    (root / "empty").mkdir()
    (root / "no-images" / "class").mkdir(parents=True)
    (root / "no-images" / "class" / "notes.txt").write_text("")
    (root / "file").write_text("mine")
    Image.new("L", (16, 16)).save(root / "query.png")
    shutil.copytree(root / "model", root / "garbled-model")
    (root / "garbled-model" / "model.safetensors").write_bytes(b"garbled")
    pool = toys.striped_pool(root / "pool", toys.TRAINING.model_copy(update={"epochs": 1}))
    for name in ("garbled-pool", "weightless-pool", "cut-pool"):
        shutil.copytree(pool.path, root / name)
    (root / "garbled-pool" / "pool.json").write_text('{"version": 1, "name": "x", "models": [{"id": "../../etc"}]}')
    (root / "weightless-pool" / "stripes-001.safetensors").unlink()
    cut = root / "cut-pool" / "stripes-001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    ModelPool.create(root / "pool-of-none", "none")
    recipes: dict[str, Any] = {
        "unknown-field": {"poool": "icons-30"},
        "wrong-type": {"evaluation": {"episodes": "many"}},
        "unknown-rival": {"compare": ["untrained", "oracel"]},
        "own-name": {"compare": ["tgr"]},
        "small": {"method": {"name": "tgr", "recovery": {"name": "pixels", "steps": 1}}},
        "no-reference": {"references": {"older": str(root / "older")}},
        "scored-twice": {"evaluation": {"data": str(root / "data"), "validation": str(root / "data")}},
        "scarce-validation": {"evaluation": {"data": str(root / "data"), "validation": str(root / "scarce")}},
    }
    for name, recipe in recipes.items():
        small = {"way": 3, "shots": [1], "query": 2, "episodes": 2, "data": str(root / "data")}
        recipe["evaluation"] = {**small, **recipe.get("evaluation", {})}
        recipe = {"pool": str(root / "pool"), "out": str(root / "runs"), "store": str(root / "store"), **recipe}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (root / "no-yaml.yaml").write_text("pool: [icons-30")
    (root / "code.yaml").write_text(f'pool: !!python/object/apply:os.mkdir ["{root}/hacked"]')
    return root


def test_evaluate_prints_a_line_or_json(place: Path, capsys: Output) -> None:
    asked = {"way": 3, "shot": 2, "query": 4, "episodes": 12, "seed": 1}
    flags = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    command = ["evaluate", "--model", str(place / "model"), "--data", str(place / "data"), *flags]
    expected = evaluate_saved(place / "model", str(place / "data"), **asked)
    main([*command, "--json"])
    assert json.loads(capsys.readouterr().out) == expected
    main(command)
    mean, ci95 = (f"{expected[key]:.2f}" for key in ("mean", "ci95"))
    assert capsys.readouterr().out == f"3-way 2-shot: {mean} ± {ci95} % over 12 episodes ({expected['hash']})\n"


def test_predict_prints_a_line_per_file_or_json(place: Path, capsys: Output) -> None:
    command = ["predict", "--model", str(place / "model"), "--support", str(place / "data"), "--query"]
    queries = [str(place / "query.png"), str(place / "two")]
    expected = predict(place / "model", place / "data", [Path(query) for query in queries])
    assert len(expected) == 7
    main([*command, *queries, "--json"])
    assert json.loads(capsys.readouterr().out) == expected
    main([*command, *queries])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [[a["file"], a["class"], f"{a['probability']:.3f}"] for a in expected]


# Mistakes -------------------------------------------------------------------------------------------------------------

EVALUATE = "evaluate --model model --data data --way 3 --query 2"
PREDICT = "predict --model model"
BUILD = "pool build --out new --jobs 1 --models 1 --epochs 1 --way 2 --size 16 --channels 1"
MISTAKES: dict[str, tuple[str, str]] = {
    "missing model folder": ("evaluate --model nowhere", "nowhere holds no saved model"),
    "model of which weights are garbled": ("evaluate --model garbled-model", "garbled-model: "),
    "file for a model": ("predict --model file --support data --query query.png", "file holds no saved model"),
    "support with one class": (f"{PREDICT} --support one-class --query query.png", "one-class holds one class"),
    "empty support": (f"{PREDICT} --support empty --query query.png", "empty: expected a sub-folder"),
    "support without images": (f"{PREDICT} --support no-images --query query.png", "no-images/class: expected images"),
    "missing support": (f"{PREDICT} --support nowhere --query query.png", "nowhere: expected a folder"),
    "unreadable support": (f"{PREDICT} --support unreadable --query query.png", "000.png: not a readable image"),
    "unreadable query": (f"{PREDICT} --support data --query unreadable", "000.png: not a readable image"),
    "missing query": (f"{PREDICT} --support data --query nowhere.png", "nowhere.png: no such image"),
    "query without images": (f"{PREDICT} --support data --query no-images", "no-images holds no images"),
    "no query": (f"{PREDICT} --support data --query", "--query: at least one"),
    "missing data": ("evaluate --model model --data nowhere", "nowhere: expected one of icons"),
    "empty data": ("evaluate --model model --data empty", "empty: expected a sub-folder"),
    "file for data": ("evaluate --model model --data file", "file: expected one of icons"),
    "way too large": (f"{EVALUATE} --way 50", "50-way 1-shot episodes with 2 queries need 50 classes of 3 images"),
    "way too small": (f"{EVALUATE} --way 1", "--way 1: at least 2"),
    "shot too large": (f"{EVALUATE} --shot 80", "80-shot"),
    "negative shot": (f"{EVALUATE} --shot -1", "--shot -1: at least 1"),
    "no query images": (f"{EVALUATE} --query 0", "--query 0: at least 1"),
    "no episodes": (f"{EVALUATE} --episodes 0", "--episodes 0: at least 1"),
    "benchmark without its root": ("evaluate --model model --data cub", "cub is not shipped"),
    "benchmark of which files are missing": ("evaluate --model model --data cub --root empty", "empty/images: "),
    "missing recipe": ("run nowhere.yaml", "nowhere.yaml: no such recipe file"),
    "missing recipe of a plan": ("plan nowhere.yaml", "nowhere.yaml: no such recipe file"),
    "unknown field in a recipe": ("run unknown-field.yaml", "unknown-field.yaml: poool: "),
    "wrong type in a recipe": ("run wrong-type.yaml", "wrong-type.yaml: evaluation.episodes: "),
    "recipe that is no YAML": ("run no-yaml.yaml", "no-yaml.yaml is no YAML"),
    "recipe with code": ("run code.yaml", "code.yaml is no YAML"),
    "unknown method in compare": ("run unknown-rival.yaml", "no method is named 'oracel'; known are tgr"),
    "the method itself in compare": ("run own-name.yaml", "'tgr' is the recipe's own method"),
    "missing reference": ("run no-reference.yaml", "older holds no saved model"),
    "validation on the scored images": ("run scored-twice.yaml", "evaluation.validation: these are the images"),
    "validation on too few images": ("run scarce-validation.yaml", "evaluation.validation: 2-way 1-shot"),
    "missing pool": ("run --pool nowhere", "nowhere is not a pool"),
    "pool without models": ("run --pool pool-of-none", "pool-of-none: the pool has no models"),
    "pool.json that is bad": ("run --pool garbled-pool", "garbled-pool/pool.json: models.0.id"),
    "pool of which weights are cut off": (
        "run small.yaml --pool cut-pool --jobs 1",
        "cut-pool/stripes-001.safetensors: its SHA-256",
    ),
    "run on missing data": ("run --pool pool --evaluation.data nowhere", "nowhere: expected one of icons"),
    "run on data of too few classes": ("run --pool pool --evaluation.data data --evaluation.way 9", "9-way 1-shot"),
    "run into a file": ("run small.yaml --out file", "file/main"),
    "shown pool is missing": ("pool show nowhere", "nowhere is not a pool"),
    "shown pool.json is bad": ("pool show garbled-pool", "garbled-pool/pool.json: models.0.id"),
    "shown pool lacks weights": ("pool show weightless-pool", "weightless-pool/stripes-001.safetensors"),
    "unknown study": ("study nobody", "there are cka"),
    "no study named": ("study --steps 3", "the name of a study comes first"),
    "study with workers below none": ("study cka --jobs -3", "--jobs -3"),
    "pool joined with itself": ("pool join new pool pool", "would stand twice"),
    "pool joined with none": ("pool join new pool nowhere", "nowhere is not a pool"),
    "pool joined lacks weights": (
        "pool join new weightless-pool",
        "weightless-pool/stripes-001.safetensors is missing",
    ),
    "joined pool is there": ("pool join pool pool", "pool already holds a pool"),
    "size of no pixels": (f"{BUILD} --data data --size 0", "--size 0: at least 1 pixel"),
    "out holds a pool": (f"{BUILD} --out pool --data data", "pool already holds a pool"),
    "out is a file": (f"{BUILD} --out file --data data", "file already holds a pool, or is a file"),
    "out is in a file": (f"{BUILD} --out file/pool --data data", "file/pool"),
    "out is no name for a pool": (f"{BUILD} --out . --data data", "pool name ''"),
    "unknown architecture": (f"{BUILD} --data data --architectures vgg:16", "'vgg:16': expected NAME:WIDTH"),
    "no architecture": (f"{BUILD} --data data --architectures", "architectures: "),
    "data folder is missing": (f"{BUILD} --data nowhere", "nowhere: expected one of icons"),
    "data folder is empty": (f"{BUILD} --data empty", "empty: expected a sub-folder"),
    "too few classes for a model": (f"{BUILD} --data data --way 5", "a 5-way model needs 5 classes; there are 4"),
    "too few images of a class": (f"{BUILD} --data two", "has 3 images"),
    "images too small": (f"{BUILD} --data data --size 8", "height 8: "),
    "images of two channels": (f"{BUILD} --data data --channels 2", "1 or 3 channels, not 2"),
    "no models": (f"{BUILD} --data data --models 0", "models: .*not 0"),
    "oracle on missing data": ("oracle --data nowhere --out new", "nowhere: expected one of icons"),
    "oracle without steps": ("oracle --steps 0 --out new", "steps: .*not 0"),
    "oracle of too many classes": ("oracle --data data --size 16 --steps 1 --out new", "10-way 3-shot"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, place: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, message = MISTAKES[name]
    monkeypatch.chdir(place)
    assert ended(command.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("metapool: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert re.search(message, err), err
    assert len(err) < 400
    assert "Traceback" not in out + err
    assert not (place / "new").exists()
    assert not (place / "hacked").exists()
    assert (place / "file").read_text() == "mine"


USAGE = {
    "unknown command": ("trian", "trian"),
    "unknown flag": ("evaluate --model model --shots 3", "--shots"),
    "missing flag": ("predict --model model --query query.png", "--support"),
    "word for a number": ("evaluate --model model --way five", "five"),
    "pool without a command": ("pool", "build"),
    "unknown pool command": ("pool list", "list"),
    "unknown flag of plan": ("plan --methods.steps 3", "--methods.steps"),
    "unknown flag of run": ("run --methods.steps 3", "--methods.steps"),
    "word for a number in run": ("run --method.steps few", "few"),
    "value that is refused in run": ("run --evaluation.way 1", "way"),
    "shot zero in run": ("run --evaluation.shots 0", "shots"),
    "name that is no name": ("run --name a/b", "name"),
    "second recipe": ("run main quick", "quick"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_command_that_is_not_understood(
    name: str, place: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, culprit = USAGE[name]
    monkeypatch.chdir(place)
    assert ended(command.split()) == 2
    out, err = capsys.readouterr()
    assert culprit in err
    assert "Traceback" not in out + err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user is meant to read becomes one line."""
    for error in (ZeroDivisionError, KeyError, AssertionError):
        monkeypatch.setattr(cli, "predict", lambda *_, error=error: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            main(["predict", "--model", "m", "--support", "s", "--query", "q"])
    monkeypatch.setattr(cli, "predict", lambda *_: (_ for _ in ()).throw(MetapoolError("clear words")))
    assert ended(["predict", "--model", "m", "--support", "s", "--query", "q"]) == 2
