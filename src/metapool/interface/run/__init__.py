"""Runs a recipe and writes a run folder: model, scores, training records, gallery, report."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from metapool import embed, recover, views
from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages
from metapool.base.store import Progress, Store, silent
from metapool.episodes import Episodes, sample_episodes
from metapool.evaluate import Scores, evaluate, milliseconds_per_image
from metapool.interface.recipe import (
    SHIPPED,
    Recipe,
    names_of,
    open_pool,
    recipe_text,
    scored_images,
    validation_images,
    workers,
)
from metapool.interface.report import check_installed, write_report
from metapool.interface.run.files import (
    folder_digest,
    pool_summary,
    replace_folder,
    replace_text,
    run_file,
    run_summary,
    scores_file,
    seconds_of_stages,
    write_gallery,
    write_json,
    write_training,
)
from metapool.methods import AnyMethod, load_model
from metapool.pool import ModelPool

__all__ = [
    "Job",
    "Line",
    "cost_key",
    "fit_key",
    "pool_summary",
    "prepare",
    "results",
    "run",
    "run_summary",
    "score_key",
]

VERSION = 2


def run(recipe: Recipe, progress: Progress = silent) -> Path:
    """Runs a recipe: fits its method and the rivals, scores all on the same episodes, writes the report.

    Args:
        recipe: what to run.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The report, ``<out>/<name>/report.html``.
    """
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    job = prepare(recipe, progress)
    folder = Path(recipe.out) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)

    lines = results(job, recipe.seed)
    rows, scores = ({name: getattr(line, part) for name, line in lines.items()} for part in ("row", "scores"))

    main = recipe.method.name
    replace_folder(lines[main].folder, folder / "model")
    write_training(folder, {name: lines[name].folder for name in job.methods})
    write_gallery(folder, job.pool, recipe.method, job.store, recipe.seed)
    seconds = seconds_of_stages(folder, recipe, job.store)
    write_json(folder / "scores.json", {**scores_file(main, rows, scores, job.episodes), "seconds": seconds})
    used = {kind: made for name in job.methods for kind, made in job.store.ancestry(lines[name].folder).items()}
    write_json(folder / "run.json", {**run_file(recipe, job.pool, started, main), "used": dict(sorted(used.items()))})
    replace_text(folder / "recipe.yaml", recipe_text(recipe))
    return write_report(folder)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        folder: of the saved model.
        row: what its answers cost, and whether it is made without data.
        scores: by number of shots.
    """

    folder: Path
    row: dict[str, Any]
    scores: dict[int, Scores]


def results(job: "Job", seed: int) -> dict[str, Line]:
    """Fits and scores all methods of a job, and scores its references.

    Args:
        job: what a recipe names.
        seed: of the fits.

    Returns:
        A line for each, by name.
    """
    _side_by_side(job, seed)
    found: dict[str, Line] = {}
    for name, one in {**job.methods, **job.references}.items():
        fitted = one if isinstance(one, Path) else _fit(one, job.pool, job.store, seed, job.validation)
        row = {**_cost(fitted, job.images, job.store), "data_free": not isinstance(one, Path)}
        found[name] = Line(fitted, row, _score(fitted, job.images, job.episodes, job.store))
    return found


@dataclass(frozen=True)
class Job:
    """A recipe with all that it names opened, and every mistake in it found.

    Attributes:
        pool: the models.
        store: keeps the stages; nothing is made in it yet.
        images: of the classes that models are scored on.
        validation: of the classes that checkpoints are chosen on.
        episodes: by number of shots.
        methods: by name, the recipe's own first.
        references: folders of saved models by name.
    """

    pool: ModelPool
    store: Store
    images: LabelledImages
    validation: LabelledImages | None
    episodes: dict[int, Episodes]
    methods: dict[str, AnyMethod]
    references: dict[str, Path]

    def alone(self) -> "Job":
        """The same for a worker: one process, no progress.

        Returns:
            A job that can be sent to another process.
        """
        return replace(self, store=Store(self.store.root, threads=self.store.threads))


def prepare(recipe: Recipe, progress: Progress = silent) -> Job:
    """Opens what a recipe names, and builds nothing.

    Args:
        recipe: what to run.
        progress: of the store.

    Returns:
        The job.

    Raises:
        MetapoolError: when the pool is empty.
    """
    check_installed()
    pool = open_pool(recipe.pool)[: recipe.limit]
    store = Store(Path(recipe.store), jobs=workers(recipe.jobs), progress=progress)
    if not pool.ids:
        raise MetapoolError(f"{pool.path}: the pool has no models")
    input = pool.input
    images = scored_images(recipe.evaluation, input)
    validation = validation_images(recipe.evaluation, input)
    if validation is not None:
        _check_validation(validation, images)
    episodes = {
        shot: sample_episodes(
            images, recipe.evaluation.way, shot, recipe.evaluation.query, recipe.evaluation.episodes,
            recipe.evaluation.seed,
        )
        for shot in recipe.evaluation.shots
    }  # fmt: skip
    return Job(pool, store, images, validation, episodes, recipe.methods(), _references(recipe))


def _side_by_side(job: Job, seed: int) -> None:
    """Fits and scores all methods in worker processes, one thread each; :func:`run` then finds them in the store.

    Small networks make little use of a second thread, and methods need nothing of one another. What opens the pool
    has workers of its own and is shared by methods: it comes first.
    """
    todo = [one for one in (*job.methods.values(), *job.references.values()) if not _known(job, one, seed)]
    workers = min(job.store.jobs, len(todo))
    if workers < 2:
        return
    for one in todo:
        if not isinstance(one, Path):
            one.prepare(job.pool, job.store, seed)
    started = time.perf_counter()
    calls = (joblib.delayed(_fit_and_score)(job.alone(), one, seed) for one in todo)
    for done, _ in enumerate(joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(calls)):
        job.store.progress("methods", done + 1, len(todo))
    job.store.seconds["methods"] = time.perf_counter() - started


def _known(job: Job, one: AnyMethod | Path, seed: int) -> bool:
    """Whether the store has a model and its scores; what they were made of is then not asked for."""
    fitted = one
    if not isinstance(one, Path):
        fitted = job.store.folder(f"fit-{one.name}", fit_key(one, job.pool, seed, job.validation))
    assert isinstance(fitted, Path)
    scores = job.store.folder("scores", score_key(fitted, job.images, job.episodes, job.store))
    return fitted.exists() and scores.exists()


def _fit_and_score(job: Job, one: AnyMethod | Path, seed: int) -> None:
    fitted = one if isinstance(one, Path) else _fit(one, job.pool, job.store, seed, job.validation)
    _score(fitted, job.images, job.episodes, job.store)


def _check_validation(validation: LabelledImages, images: LabelledImages) -> None:
    """Checkpoints are never chosen on the images that models are scored on, and there must be enough to choose on."""
    if validation.digest() == images.digest():
        raise MetapoolError("evaluation.validation: these are the images that models are scored on; null for none")
    try:
        sample_episodes(validation, min(5, validation.fewest_classes), 1, 5, 1, 0)
    except MetapoolError as error:
        raise MetapoolError(f"evaluation.validation: {error}; null for none") from error


def _references(recipe: Recipe) -> dict[str, Path]:
    """Folders of the saved models in the table; all are opened here, so that a wrong one is not found hours later."""
    found: dict[str, Path] = {}
    for name, path in recipe.references.items():
        where = SHIPPED / f"{name}-{'-'.join(names_of(recipe.evaluation.data))}" if path == "shipped" else Path(path)
        if path == "shipped" and not where.is_dir():
            continue  # there is none for this data
        load_model(where)
        found[name] = where
    return found


def _fit(method: AnyMethod, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None) -> Path:
    """The folder of a fitted model; fitting again answers from the store."""
    key = fit_key(method, pool, seed, validation)
    return store.artifact(
        f"fit-{method.name}", key, lambda folder: method.fit(pool, store, seed, validation).save(folder)
    )


def fit_key(method: AnyMethod, pool: ModelPool, seed: int, validation: LabelledImages | None) -> dict[str, Any]:
    """What a fitted model depends on.

    Args:
        method: with all its settings.
        pool: the models.
        seed: of the fit.
        validation: images of meta-validation classes.

    Returns:
        A key of the store, of the kind ``fit-<name of the method>``.
    """
    return {
        "method": method.model_dump(mode="json"),
        "pool": pool.digest(),
        "seed": seed,
        "validation": validation.digest() if validation else None,
        "versions": [VERSION, recover.VERSION, embed.VERSION, views.VERSION, method.version],
    }


def _score(fitted: Path, images: LabelledImages, episodes: dict[int, Episodes], store: Store) -> dict[int, Scores]:
    """Scores of a saved model, by shot."""

    def build(folder: Path) -> None:
        scores = evaluate(load_model(fitted), images, episodes, store.progress)
        for shot, found in scores.items():
            np.save(folder / f"shot-{shot}.npy", found.every)

    folder = store.artifact("scores", score_key(fitted, images, episodes, store), build)
    names = tuple(images.by_domain())
    return {shot: Scores.of(np.load(folder / f"shot-{shot}.npy", allow_pickle=False), names) for shot in episodes}


def _cost(fitted: Path, images: LabelledImages, store: Store) -> dict[str, Any]:
    """The row of the table that says what a saved model's answers cost; timed with no worker beside it."""

    def build(folder: Path) -> None:
        model = load_model(fitted)
        row = {
            "parameters": model.parameter_count,
            "models_at_inference": model.models_at_inference,
            "ms_per_image": round(milliseconds_per_image(model, images), 4),
            "transductive": getattr(model, "transductive", False),
        }
        write_json(folder / "row.json", row)

    row: dict[str, Any] = json.loads(
        (store.artifact("cost", cost_key(fitted, images, store), build) / "row.json").read_text()
    )
    return row


def score_key(fitted: Path, images: LabelledImages, episodes: dict[int, Episodes], store: Store) -> dict[str, Any]:
    """What the scores of a saved model depend on.

    Args:
        fitted: folder of the model; one in the store need not be there yet.
        images: what the episodes index.
        episodes: by number of shots.
        store: where fitted models are.

    Returns:
        A key of the store, of the kind ``scores``.
    """
    drawn = {str(shot): drawn.digest() for shot, drawn in episodes.items()}
    return {**cost_key(fitted, images, store), "episodes": drawn}


def cost_key(fitted: Path, images: LabelledImages, store: Store) -> dict[str, Any]:
    """What the cost of a saved model's answers depends on, the machine aside.

    Args:
        fitted: folder of the model; one in the store need not be there yet.
        images: some are answered.
        store: where fitted models are.

    Returns:
        A key of the store, of the kind ``cost``.
    """
    model = fitted.name if fitted.is_relative_to(store.root) else folder_digest(fitted)
    return {"model": model, "images": images.digest(), "version": VERSION}
