"""The console script: each command parses, calls one function, prints."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import metapool
from metapool.base.errors import MetapoolError
from metapool.base.store import Store
from metapool.interface import recipe as recipes
from metapool.interface.cli.pools import Oracle, Pool
from metapool.interface.cli.progress import Progress
from metapool.interface.compare import compare, methods_summary
from metapool.interface.plan import plan, plan_summary
from metapool.interface.run import run, run_summary
from metapool.interface.studies import STUDIES
from metapool.interface.studies.study import write_study
from metapool.interface.use import evaluate_saved, predict

ABOUT = """From a pool of trained classifiers, without their data, to one small few-shot learner.

Start with `metapool run`: it takes the pool that comes with metapool, makes a few-shot learner of it and writes a
report. With a pool of your own: `metapool pool build`, then `metapool run --pool FOLDER`, then `metapool predict`."""


RUN = "Run a recipe (default: the main job). Flags are laid over the recipe's fields."
PLAN = """Say what `metapool run` with the same recipe and flags would do, and do nothing of it.

Minutes: of what is still to do, then of the whole, by a few steps that are timed here and now, as many at once as the
run has workers. Disk: images, answers and models that the store will hold. Memory: an estimate for meta-training, which
holds the features that all models see in all images. In the store: what is there already."""


COMPARE = """Fit the recipe's method and others with several seeds, score all on the same episodes, print one table.

--methods NAME ...: as `metapool methods` lists them (default: all). --seeds N (default: 3), from the recipe's on."""


@dataclass
class Run:
    """Make a few-shot learner of a pool, compare it with its rivals, write a report (`metapool run --help`)."""

    def __call__(self) -> None:
        """Runs the main job."""
        _run([])


@dataclass
class Plan:
    """Say what a run would do: minutes, GB, what the store has already (`metapool plan --help`)."""

    def __call__(self) -> None:
        """Plans the main job."""
        _plan([])


@dataclass
class Compare:
    """Fit many methods with several seeds, one table (`metapool compare --help`)."""

    def __call__(self) -> None:
        """Compares all, three seeds."""
        _compare([])


@dataclass
class Studies:
    """Answer a question about pools and methods by a table and a figure (`metapool study NAME --help`)."""

    def __call__(self) -> None:
        """Lists the studies."""
        _study([])


@dataclass
class Methods:
    """List the methods: paper, what each needs of the pool's models, what it costs."""

    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        """Prints."""
        found = methods_summary()
        if self.json:
            print(json.dumps(found, indent=1))
            return
        table = Table("name", "paper", "needs", "cost", show_lines=True)
        for row in found:
            table.add_row(*(escape(row[key]) for key in ("name", "paper", "needs", "cost")))
        Console().print(table)
        print("also: ensemble-K (K models of the ensemble), input-control (images of an untrained generator)")


@dataclass
class Evaluate:
    """Score a saved model on few-shot episodes of new classes."""

    model: Path
    """Folder of a saved model, for example runs/main/model."""
    data: str = "icons"
    """Folder `<class>/<images>` of any size and colour, or a shipped domain or published benchmark (its meta-test
    classes)."""
    root: str | None = None
    """Folder of a published benchmark's files."""
    way: int = 5
    """Classes of an episode."""
    shot: int = 1
    """Support images of a class."""
    query: int = 15
    """Query images of a class."""
    episodes: int = 600
    """Number of episodes."""
    seed: int = 0
    """Of the draw of episodes."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        """Scores and prints."""
        asked = (self.way, self.shot, self.query, self.episodes, self.seed)
        result = evaluate_saved(self.model, self.data, *asked, root=self.root)
        text = "{way}-way {shot}-shot: {mean:.2f} ± {ci95:.2f} % over {episodes} episodes ({hash})".format(**result)
        print(json.dumps(result) if self.json else text)


@dataclass
class Predict:
    """Label images by a few examples of each class."""

    model: Path
    """Folder of a saved model, for example runs/main/model."""
    support: Path
    """Folder `<class>/<images>`: at least two classes, at least one image each."""
    query: tuple[Path, ...]
    """Image files, or folders of them."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        """Predicts and prints."""
        found = predict(self.model, self.support, self.query)
        if self.json:
            print(json.dumps(found))
            return
        for answer in found:
            print(f"{answer['file']}\t{answer['class']}\t{answer['probability']:.3f}")


Command = (
    Annotated[Run, tyro.conf.subcommand("run", prefix_name=False)]
    | Annotated[Plan, tyro.conf.subcommand("plan", prefix_name=False)]
    | Annotated[Compare, tyro.conf.subcommand("compare", prefix_name=False)]
    | Annotated[Studies, tyro.conf.subcommand("study", prefix_name=False)]
    | Annotated[Methods, tyro.conf.subcommand("methods", prefix_name=False)]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate", prefix_name=False)]
    | Annotated[Predict, tyro.conf.subcommand("predict", prefix_name=False)]
    | Annotated[Pool, tyro.conf.subcommand("pool", prefix_name=False)]
    | Annotated[Oracle, tyro.conf.subcommand("oracle", prefix_name=False)]
)


def _run(arguments: Sequence[str]) -> None:
    """`metapool run [recipe.yaml] [--section.option value] [--print-recipe]`."""
    recipe, shown = _recipe("run", "--print-recipe", RUN, arguments)
    if shown:
        print(recipes.recipe_text(recipe), end="")
        return
    with Progress() as progress:
        report = run(recipe, progress)
    print(run_summary(report.parent))
    print(f"report: {report}")


def _plan(arguments: Sequence[str]) -> None:
    """`metapool plan [recipe.yaml] [--section.option value] [--json]`."""
    recipe, as_json = _recipe("plan", "--json", PLAN, arguments)
    with Progress() as progress:
        planned = plan(recipe, progress)
    print(json.dumps(planned.as_dict(), indent=1) if as_json else plan_summary(planned))


def _compare(arguments: Sequence[str]) -> None:
    """`metapool compare [recipe.yaml] [--methods NAME ...] [--seeds N] [--section.option value]`."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--methods", nargs="+", default=["all"])
    own.add_argument("--seeds", type=int, default=3)
    given, rest = own.parse_known_args(arguments)
    recipe, as_json = _recipe("compare", "--json", COMPARE, rest)
    recipe = recipe if recipe.name != "main" else recipe.model_copy(update={"name": "compare"})
    with Progress() as progress:
        found = compare(recipe, given.methods, given.seeds, progress)
    print(found.read_text() if as_json else found.with_suffix(".md").read_text(), end="")


def _study(arguments: Sequence[str]) -> None:
    """`metapool study NAME [--option value] [--jobs N] [--store FOLDER] [--out FOLDER] [--json]`."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--jobs", type=int, default=0)
    own.add_argument("--store", type=Path, default=Path("store"))
    own.add_argument("--out", type=Path, default=Path("runs"))
    own.add_argument("--json", action="store_true")
    given, rest = own.parse_known_args(arguments)
    if rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help"):
        raise MetapoolError(f"study {rest[0]}: the name of a study comes first; there are {', '.join(STUDIES)}")
    if not rest or rest[0].startswith("-"):
        for name, study in STUDIES.items():
            print(f"{name:<14}{study.title} ({study.source})")
        return
    name = rest.pop(0)
    if name not in STUDIES:
        raise MetapoolError(f"{name}: no such study; there are {', '.join(STUDIES)}")
    about = f"{STUDIES[name].title}. Also: --jobs N, --store FOLDER, --out FOLDER, --json."
    study = _parsed(STUDIES[name], prog=f"metapool study {name}", description=about, args=rest)
    with Progress() as progress:
        store = Store(given.store, jobs=recipes.workers(given.jobs), progress=progress)
        folder = write_study(name, study, store, given.out)
    found = (folder / f"{name}.json").read_text()
    print(found if given.json else f"{json.loads(found)['answer']}\n{folder}")


def _recipe(command: str, switch: str, about: str, arguments: Sequence[str]) -> tuple[recipes.Recipe, bool]:
    """The recipe that a command line means, flags laid over the file, and whether the command's own switch is set."""
    rest = [argument for argument in arguments if argument != switch]
    given = rest.pop(0) if rest and not rest[0].startswith("-") else None
    recipe = _parsed(
        tyro.conf.AvoidSubcommands[recipes.Recipe],
        prog=f"metapool {command} [recipe.yaml] [{switch}]",
        description=about,
        default=recipes.load_recipe(given),
        args=rest,
    )
    return recipe, switch in arguments


def _parsed(form: Any, **options: Any) -> Any:
    """What tyro makes of a command line; a value that a setting refuses is an error that names the setting."""
    try:
        return tyro.cli(form, **options)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or error.title
        raise MetapoolError(f"{field}: {first['msg']}, not {first['input']!r}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; a user's mistake is one line on standard error and exit code 2.

    Args:
        arguments: command line without the program's name; the process's own when not given.

    Raises:
        SystemExit: after an error, with code 2, or 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["--version"]:
            print(f"metapool {metapool.__version__}")
        elif given[:1] == ["run"]:
            _run(given[1:])
        elif given[:1] == ["plan"]:
            _plan(given[1:])
        elif given[:1] == ["compare"]:
            _compare(given[1:])
        elif given[:1] == ["study"]:
            _study(given[1:])
        else:
            _parsed(Command, prog="metapool", description=ABOUT, args=given or ["--help"])()
    except BrokenPipeError:  # the reader went away (`| head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MetapoolError, OSError) as error:  # an OSError names the file: no permission, no space, gone meanwhile
        print(f"metapool: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("metapool: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
