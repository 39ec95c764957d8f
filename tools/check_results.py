"""Recomputes one small row of every committed table, in a store of its own, and compares: ``make results-check``.

    python tools/check_results.py

Rows that take seconds are chosen, and that no training stands behind: the ensemble of all models and the oracle for
tables of methods; of the studies, those that need no pool. On the machine type of a result they come out to the last
digit; other processors round otherwise, so a tenth of a point, and a hundredth of a study's number, is let pass.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metapool.base.store import Store
from metapool.evaluate import evaluate
from metapool.interface.recipe import Recipe
from metapool.interface.run import Job, prepare
from metapool.interface.studies import STUDIES
from metapool.methods import load_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
POINTS = 0.1
NO_POOL = ("theorems",)
Found = tuple[str, float, float, float]
"""What a number is, as it is committed, as it comes out now, and how far these may lie apart."""


def accuracies(job: Job, name: str, seed: int) -> dict[str, float]:
    """Mean accuracies of one row of a table of methods.

    Args:
        job: the table's recipe, opened.
        name: of the row.
        seed: of the fit.

    Returns:
        Percent by number of shots.
    """
    known = job.references.get(name)
    model = load_model(known) if known else job.methods[name].fit(job.pool, job.store, seed, job.validation)
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
    job = prepare(Recipe.model_validate({**recipe, "store": str(store), "jobs": 1}))
    for row in ("ensemble", "oracle"):
        if row not in table:
            continue
        for shot, now in accuracies(job, row, recipe["seed"]).items():
            yield f"{name}: {row}, {shot}-shot", table[row]["shots"][shot]["mean"], now, POINTS


def rows_of_study(name: str, store: Path) -> Iterator[Found]:
    """Makes a study anew with its committed settings.

    Args:
        name: of the study.
        store: of what is recomputed.

    Yields:
        The number of rows, and all numbers of the table's first, middle and last row.
    """
    committed = json.loads((RESULTS / "studies" / f"{name}.json").read_text())
    now = STUDIES[name].model_validate(committed["settings"]).measure(Store(store)).rows
    yield f"{name}: rows", len(committed["rows"]), len(now), 0
    for index in sorted({0, len(now) // 2, len(now) - 1}):
        for column, value in now[index].items():
            if isinstance(value, float):
                before = committed["rows"][index][column]
                yield f"{name}: row {index}, {column}", before, value, 0.01 * abs(before)


def found(store: Path) -> Iterator[Found]:
    """Recomputes.

    Args:
        store: of what is recomputed.

    Yields:
        All numbers that are compared.
    """
    for path in sorted(RESULTS.glob("*/run.json")):
        scores = json.loads((path.parent / "scores.json").read_text())
        yield from rows_of_methods(path.parent.name, json.loads(path.read_text())["recipe"], scores["methods"], store)
    for name in ("methods", "differences"):
        if (path := RESULTS / f"{name}.json").is_file():
            result = json.loads(path.read_text())
            yield from rows_of_methods(name, result["recipe"], result["methods"], store)
    for name in NO_POOL:
        yield from rows_of_study(name, store)


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
