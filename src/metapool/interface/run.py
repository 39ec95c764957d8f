"""Runs a recipe and writes a run folder: model, scores, training records, gallery, report."""

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metapool
from metapool import embed, recover, views
from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages
from metapool.base.store import Progress, Store, digest_of, digest_of_file, silent
from metapool.embed import dissimilarity, embed_bank
from metapool.episodes import Episodes, sample_episodes
from metapool.evaluate import Scores, evaluate, milliseconds_per_image, paired_difference
from metapool.interface.recipe import (
    SHIPPED,
    Recipe,
    cores,
    evaluation_images,
    open_pool,
    recipe_text,
    validation_images,
)
from metapool.interface.report import check_installed, write_report
from metapool.methods import AnyMethod, load_model, tgr
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.recover import recover_pool

VERSION = 1


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
    pool, store, images, validation, episodes = job.pool, job.store, job.images, job.validation, job.episodes
    methods, references = job.methods, job.references
    folder = Path(recipe.out) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)

    rows: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[int, Scores]] = {}
    for name, method in methods.items():
        fitted = _fit(method, pool, store, recipe.seed, validation)
        scores[name], rows[name] = _score(fitted, images, episodes, store)
        rows[name]["data_free"] = True
    for name, where in references.items():
        scores[name], rows[name] = _score(where, images, episodes, store)
        rows[name]["data_free"] = False

    main = recipe.method.name
    _replace_folder(_fit(methods[main], pool, store, recipe.seed, validation), folder / "model")
    _write_training(folder, {n: _fit(m, pool, store, recipe.seed, validation) for n, m in methods.items()})
    _write_gallery(folder, pool, methods[main], store, recipe.seed)
    seconds = _seconds(folder, recipe, store)
    _write_json(folder / "scores.json", {**_scores_file(main, rows, scores, episodes), "seconds": seconds})
    _write_json(folder / "run.json", {**_run_file(recipe, pool, started, main), "used": store.used})
    _replace_text(folder / "recipe.yaml", recipe_text(recipe))
    return write_report(folder)


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
    jobs = recipe.jobs or cores()
    store = Store(Path(recipe.store), jobs=jobs, progress=progress)
    if not pool.ids:
        raise MetapoolError(f"{pool.path}: the pool has no models")
    input = pool.manifest.models[0].input
    images = evaluation_images(recipe.evaluation.data, "test", input, recipe.evaluation.root)
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


def _check_validation(validation: LabelledImages, images: LabelledImages) -> None:
    """Checkpoints are never chosen on the images that models are scored on, and there must be enough to choose on."""
    if validation.digest() == images.digest():
        raise MetapoolError("evaluation.validation: these are the images that models are scored on; null for none")
    try:
        sample_episodes(validation, min(5, len(validation.classes)), 1, 5, 1, 0)
    except MetapoolError as error:
        raise MetapoolError(f"evaluation.validation: {error}; null for none") from error


def _references(recipe: Recipe) -> dict[str, Path]:
    """Folders of the saved models in the table; all are opened here, so that a wrong one is not found hours later."""
    found: dict[str, Path] = {}
    for name, path in recipe.references.items():
        where = SHIPPED / f"{name}-{recipe.evaluation.data}" if path == "shipped" else Path(path)
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
        "versions": [VERSION, recover.VERSION, embed.VERSION, views.VERSION, tgr.VERSION],
    }


def _score(
    fitted: Path, images: LabelledImages, episodes: dict[int, Episodes], store: Store
) -> tuple[dict[int, Scores], dict[str, Any]]:
    """Scores by shot and the row of the table, for a saved model."""
    key = score_key(fitted, images, episodes, store)

    def build(folder: Path) -> None:
        model = load_model(fitted)
        for shot, drawn in episodes.items():
            np.save(folder / f"shot-{shot}.npy", evaluate(model, images, drawn, store.progress).accuracies)
        row = {
            "parameters": model.parameter_count,
            "models_at_inference": model.models_at_inference,
            "ms_per_image": round(milliseconds_per_image(model, images), 4),
        }
        _write_json(folder / "row.json", row)

    folder = store.artifact("scores", key, build)
    scores = {shot: Scores(np.load(folder / f"shot-{shot}.npy", allow_pickle=False)) for shot in episodes}
    return scores, json.loads((folder / "row.json").read_text())


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
    return {
        "model": fitted.name if fitted.is_relative_to(store.root) else _folder_digest(fitted),
        "images": images.digest(),
        "episodes": {str(shot): drawn.digest() for shot, drawn in episodes.items()},
        "version": VERSION,
    }


def _scores_file(
    main: str,
    rows: dict[str, dict[str, Any]],
    scores: dict[str, dict[int, Scores]],
    episodes: dict[int, Episodes],
) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for name, row in rows.items():
        intervals = {shot: score.interval for shot, score in scores[name].items()}
        shots = {str(shot): {"mean": round(i.mean, 3), "ci95": round(i.ci95, 3)} for shot, i in intervals.items()}
        methods[name] = {**row, "shots": shots}
    paired: list[dict[str, Any]] = []
    for name in rows:
        for shot in episodes:
            if name != main:
                difference = paired_difference(scores[main][shot], scores[name][shot])
                values = {k: round(v, 3) for k, v in vars(difference).items()}
                paired.append({"a": main, "b": name, "shot": shot, **values})
    first = next(iter(episodes.values()))
    return {
        "episodes": {
            "hash": digest_of([drawn.digest() for drawn in episodes.values()]),
            "way": first.way,
            "query": first.query.shape[2],
            "n": len(first),
        },
        "methods": methods,
        "paired": paired,
    }


def _seconds(folder: Path, recipe: Recipe, store: Store) -> dict[str, float]:
    """Seconds per stage; a run that is answered from the store keeps what the same recipe once took."""
    seconds = {kind: round(spent, 2) for kind, spent in store.seconds.items()}
    known = folder / "recipe.yaml"
    if known.is_file() and (folder / "scores.json").is_file() and known.read_text() == recipe_text(recipe):
        before = json.loads((folder / "scores.json").read_text())["seconds"]
        seconds = {kind: max(spent, before.get(kind, 0.0)) for kind, spent in seconds.items()}
    return seconds


def _run_file(recipe: Recipe, pool: ModelPool, started: str, main: str) -> dict[str, Any]:
    models = [
        {
            "id": entry.id,
            "architecture": entry.network.architecture,
            "width": entry.network.width,
            "classes": entry.classes,
            "accuracy": entry.accuracy,
            "licence": entry.licence,
            "parameters": pool.get(entry.id).parameter_count,
        }
        for entry in pool.manifest.models
    ]
    return {
        "name": recipe.name,
        "command": f"metapool run {recipe.out}/{recipe.name}/recipe.yaml",
        "version": metapool.__version__,
        "seed": recipe.seed,
        "quick": recipe.quick,
        "recipe": recipe.model_dump(mode="json"),
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        },
        "started": started,
        "pool": {"name": pool.manifest.name, "models": models},
        "headline": main,
    }


def _write_training(folder: Path, fitted: dict[str, Path]) -> None:
    """All methods' training records in one file, each under its name in the table."""
    lines: list[str] = []
    for name, where in fitted.items():
        steps = where / "steps.jsonl"
        records = [json.loads(line) for line in steps.read_text().splitlines()] if steps.is_file() else []
        lines += [json.dumps({**record, "method": name}) + "\n" for record in records]
    _replace_text(folder / "steps.jsonl", "".join(lines))


def _write_gallery(
    folder: Path, pool: ModelPool, method: AnyMethod, store: Store, seed: int, per_class: int = 6
) -> None:
    """Some recovered images of every model, and the groups when the method makes any."""
    bank = recover_pool(pool, method.recovery, store)
    sheets: dict[str, Any] = {}
    for id, task in bank.items():
        rows = [torch.where(task.labels == label)[0][:per_class] for label in range(len(task.classes))]
        sheets[id] = task.images[torch.cat(rows)].numpy()
    with (folder / "gallery.npz.tmp").open("wb") as file:
        np.savez_compressed(file, **sheets)
    (folder / "gallery.npz.tmp").replace(folder / "gallery.npz")
    (folder / "grouping.json").unlink(missing_ok=True)  # of an earlier run of this name
    if isinstance(method, TGR):
        ids = pool.ids
        embeddings = embed_bank(bank, pool.manifest.models[0].input, method.probe, store)
        groups = method.grouped(pool, bank, store, seed)
        _write_json(
            folder / "grouping.json",
            {
                "models": ids,
                "dissimilarity": np.round(dissimilarity(embeddings), 6).tolist(),
                "groups": [[ids.index(id) for id in group] for group in groups],
            },
        )


def _replace_folder(source: Path, target: Path) -> None:
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _write_json(path: Path, value: object) -> None:
    _replace_text(path, json.dumps(value, indent=1) + "\n")


def _folder_digest(folder: Path) -> str:
    return digest_of([[p.name, digest_of_file(p)] for p in sorted(folder.rglob("*")) if p.is_file()])


def run_summary(folder: Path) -> str:
    """The table of a finished run, for a terminal.

    Args:
        folder: of the run.

    Returns:
        A line per method, best first.
    """
    scores = json.loads((folder / "scores.json").read_text())
    rows = sorted(scores["methods"].items(), key=lambda item: -sum(s["mean"] for s in item[1]["shots"].values()))
    lines = [
        f"{'method':<16}{'networks':>9}{'ms/image':>10}" + "".join(f"{s + '-shot':>16}" for s in rows[0][1]["shots"])
    ]
    for name, row in rows:
        shots = "".join(f"{score['mean']:>9.2f} ± {score['ci95']:.2f}" for score in row["shots"].values())
        lines.append(f"{name:<16}{row['models_at_inference']:>9}{row['ms_per_image']:>10.3f}{shots}")
    return "\n".join(lines)


def pool_summary(pool: ModelPool) -> str:
    """One line about a pool.

    Args:
        pool: the pool.

    Returns:
        Number of models, mean accuracy, size on disk.
    """
    known = [entry.accuracy for entry in pool.manifest.models if entry.accuracy is not None]
    mean = f"{sum(known) / len(known):.2f} %" if known else "unknown"
    size = sum((pool.path / f"{id}.safetensors").stat().st_size for id in pool.ids) / 1e6
    return f"{len(pool)} models, mean accuracy on held-out images of their own tasks {mean}, {size:.1f} MB"
