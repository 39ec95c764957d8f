"""Recomputes one small row of every committed table, in a store of its own, and compares: ``make results-check``.

    python tools/check_results.py

For tables of methods these are rows that no training stands behind: the ensemble of all models and the oracle. Of a
study it is a part that ``Study.sample`` cuts off. On the machine type of a result they come out to the last digit;
other processors round otherwise, so a tenth of a point, and a hundredth of a study's number, is let pass.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from metapool.base.store import Store
from metapool.evaluate import evaluate
from metapool.interface.recipe import SHIPPED, Recipe, workers
from metapool.interface.run import prepare
from metapool.interface.studies import STUDIES
from metapool.methods import load_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
POINTS = 0.1
Found = tuple[str, float, float, float]
"""What a number is, as it is committed, as it comes out now, and how far these may lie apart."""


@cache
def accuracies(recipe: str, row: str) -> dict[str, float]:
    """Mean accuracies of one row of a table of methods; tables that share pool and episodes share them.

    Args:
        recipe: JSON of a recipe whose method is the ensemble.
        row: ``ensemble``, or a reference of the recipe.

    Returns:
        Percent by number of shots.
    """
    asked = Recipe.model_validate_json(recipe)
    job = prepare(asked)
    known = job.references.get(row)
    model = load_model(known) if known else job.methods[row].fit(job.pool, job.store, asked.seed, job.validation)
    scores = evaluate(model, job.images, job.episodes)
    return {str(shot): score.interval.mean for shot, score in scores.items()}


def rows_of_methods(name: str, recipe: dict[str, Any], table: dict[str, Any], store: Path) -> Iterator[Found]:
    """Checks a table of methods.

    Args:
        name: of the table.
        recipe: that it was made with.
        table: its rows by name of the method.
        store: of what is recomputed.

    Yields:
        One number for each row and shot.
    """
    kept = {key: recipe[key] for key in ("pool", "limit", "references", "evaluation", "seed") if key in recipe}
    cheap = Recipe.model_validate(
        {**kept, "method": {"name": "ensemble"}, "compare": [], "store": str(store), "jobs": 1}
    )
    for row in ("ensemble", "oracle"):
        if row not in table:
            continue
        for shot, now in accuracies(cheap.model_dump_json(), row).items():
            yield f"{name}: {row}, {shot}-shot", table[row]["shots"][shot]["mean"], now, POINTS


def rows_of_study(path: Path, store: Path) -> Iterator[Found]:
    """Makes a small part of a study anew, with its committed settings.

    Args:
        path: of the study's committed JSON.
        store: of what is recomputed.

    Yields:
        All numbers of the first, the middle and the last row of that part, but times.
    """
    committed = json.loads(path.read_text())
    study = STUDIES[committed["study"]].model_validate(committed["settings"])
    rows = {tuple(row[column] for column in study.named): row for row in committed["rows"]}
    now = study.sample().measure(Store(store, jobs=workers())).rows
    for index in sorted({0, len(now) // 2, len(now) - 1}):
        name = tuple(now[index][column] for column in study.named)
        for column, value in now[index].items():
            if isinstance(value, float) and column not in {*study.named, "seconds"}:
                before = rows.get(name, {}).get(column, math.nan)
                yield f"{path.stem}: {', '.join(map(str, name))}, {column}", before, value, 0.01 * abs(before)


def found(store: Path) -> Iterator[Found]:
    """Recomputes.

    Args:
        store: of what is recomputed.

    Yields:
        All numbers that are compared.
    """
    for path in sorted(RESULTS.glob("**/run.json")):
        recipe = json.loads(path.read_text())["recipe"]
        if not ((SHIPPED / recipe["pool"]).is_dir() or Path(recipe["pool"]).is_dir()):
            made = "docs/scenarios.md says how to make it"
            print(f"skipped {path.parent.name}: there is no {recipe['pool']}; {made}", flush=True)
            continue
        scores = json.loads((path.parent / "scores.json").read_text())
        yield from rows_of_methods(path.parent.name, recipe, scores["methods"], store)
    for name in ("methods", "differences"):
        if (path := RESULTS / f"{name}.json").is_file():
            result = json.loads(path.read_text())
            yield from rows_of_methods(name, result["recipe"], result["methods"], store)
    for path in sorted((RESULTS / "studies").glob("*.json")):
        yield from rows_of_study(path, store)


def main() -> None:
    """Prints every number, committed and now.

    Raises:
        SystemExit: with code 1, when one differs.
    """
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for what, committed, now, apart in found(Path(folder)):
            differs = not abs(committed - now) <= apart  # also where a number is none
            wrong += differs
            print(f"{'DIFFERS' if differs else 'same':<8}{what}: {committed:g} committed, {now:g} now", flush=True)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
