"""The files of a run folder, each written whole: to a temporary name first."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metapool
from metapool.bank import TaskBank
from metapool.base.store import Store, digest_of, digest_of_file
from metapool.embed import dissimilarity, embed_bank
from metapool.episodes import Episodes
from metapool.evaluate import Scores, paired_difference
from metapool.interface.machine import this_machine
from metapool.interface.recipe import Recipe, recipe_text
from metapool.methods import AnyMethod, recovery_of
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.recover import recover_pool


def scores_file(
    main: str,
    rows: dict[str, dict[str, Any]],
    scores: dict[str, dict[int, Scores]],
    episodes: dict[int, Episodes],
) -> dict[str, Any]:
    """Content of ``scores.json`` but for its seconds.

    Args:
        main: name of the recipe's own method.
        rows: of the table, by method.
        scores: by method and number of shots.
        episodes: by number of shots.

    Returns:
        A value for JSON.
    """
    methods: dict[str, Any] = {}
    for name, row in rows.items():
        methods[name] = {**row, "shots": _shots(scores[name])}
        if several := by_domain(scores[name]):
            methods[name]["domains"] = {domain: _shots(alone) for domain, alone in several.items()}
    paired: list[dict[str, Any]] = []
    for name in rows:
        for shot in episodes:
            if name != main:
                difference = paired_difference(scores[main][shot], scores[name][shot])
                values = {k: round(v, 3) for k, v in vars(difference).items()}
                paired.append({"a": main, "b": name, "shot": shot, **values})
    return {
        "episodes": episodes_row(episodes, scores[main]),
        "methods": methods,
        "paired": paired,
    }


def episodes_row(episodes: dict[int, Episodes], scores: dict[int, Scores]) -> dict[str, Any]:
    """What a file of results says of its episodes.

    Args:
        episodes: by number of shots.
        scores: of some method on them.

    Returns:
        A value for JSON; ``n`` is the number of episodes of each domain.
    """
    shot, first = next(iter(episodes.items()))
    return {
        "hash": digest_of([drawn.digest() for drawn in episodes.values()]),
        "way": first.way,
        "query": first.query.shape[2],
        "n": len(scores[shot].accuracies),
    }


def by_domain(scores: Mapping[int, Scores]) -> dict[str, dict[int, Scores]]:
    """Scores of each domain alone.

    Args:
        scores: by number of shots.

    Returns:
        By domain and number of shots; empty where there is but one domain.
    """
    names = next(iter(scores.values())).domains
    return {name: {shot: score.domains[name] for shot, score in scores.items()} for name in names}


def _shots(scores: Mapping[int, Scores]) -> dict[str, dict[str, float]]:
    intervals = {shot: score.interval for shot, score in scores.items()}
    return {str(shot): {"mean": round(i.mean, 3), "ci95": round(i.ci95, 3)} for shot, i in intervals.items()}


def seconds_of_stages(folder: Path, recipe: Recipe, store: Store) -> dict[str, float]:
    """Seconds per stage; a run that is answered from the store keeps what the same recipe once took.

    Args:
        folder: of the run.
        recipe: what ran.
        store: knows what it took.

    Returns:
        Seconds by stage. ``methods`` is the time in which workers fitted and scored them side by side.
    """
    seconds = {kind: round(spent, 2) for kind, spent in store.seconds.items()}
    known = folder / "recipe.yaml"
    if known.is_file() and (folder / "scores.json").is_file() and known.read_text() == recipe_text(recipe):
        before = json.loads((folder / "scores.json").read_text())["seconds"]
        seconds = {kind: max(spent, before.get(kind, 0.0)) for kind, spent in seconds.items()}
    return seconds


def run_file(recipe: Recipe, pool: ModelPool, started: str, main: str) -> dict[str, Any]:
    """Content of ``run.json`` but for what was used of the store.

    Args:
        recipe: what ran.
        pool: the models.
        started: when, as text.
        main: name of the recipe's own method.

    Returns:
        A value for JSON.
    """
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
        "machine": this_machine(),
        "started": started,
        "pool": {"name": pool.manifest.name, "models": models},
        "headline": main,
    }


def write_training(folder: Path, fitted: dict[str, Path]) -> None:
    """All methods' training records in one file, each under its name in the table.

    Args:
        folder: of the run.
        fitted: folder of every method's model.
    """
    lines: list[str] = []
    for name, where in fitted.items():
        steps = where / "steps.jsonl"
        records = [json.loads(line) for line in steps.read_text().splitlines()] if steps.is_file() else []
        lines += [json.dumps({**record, "method": name}) + "\n" for record in records]
    replace_text(folder / "steps.jsonl", "".join(lines))


def write_gallery(
    folder: Path, pool: ModelPool, method: AnyMethod, store: Store, seed: int, per_class: int = 6
) -> None:
    """Some recovered images of every model, and the groups when the method makes any.

    Args:
        folder: of the run.
        pool: the models.
        method: the recipe's own.
        store: has the bank and the embeddings.
        seed: of the run.
        per_class: images shown of every class.
    """
    recovery = recovery_of(method)
    bank = TaskBank({}) if recovery is None else recover_pool(pool, recovery, store)
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
        embeddings = embed_bank(bank, pool.input, method.probe, store)
        groups = method.grouped(pool, bank, store, seed)
        write_json(
            folder / "grouping.json",
            {
                "models": ids,
                "dissimilarity": np.round(dissimilarity(embeddings), 6).tolist(),
                "groups": [[ids.index(id) for id in group] for group in groups],
            },
        )


def replace_folder(source: Path, target: Path) -> None:
    """Copies a folder in the place of another, at once.

    Args:
        source: is copied.
        target: is replaced.
    """
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def replace_text(path: Path, text: str) -> None:
    """Writes a file at once, its folder too when there is none.

    Args:
        path: of the file.
        text: its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file at once.

    Args:
        path: of the file.
        value: its content.
    """
    replace_text(path, json.dumps(value, indent=1) + "\n")


def folder_digest(folder: Path) -> str:
    """Hash of all files of a folder.

    Args:
        folder: which.

    Returns:
        16 hexadecimal digits.
    """
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
    for domain in rows[0][1].get("domains", ()):  # above are then the means over domains
        lines.append(f"of {domain}:")
        for name, row in rows:
            shots = "".join(f"{s['mean']:>9.2f} ± {s['ci95']:.2f}" for s in row["domains"][domain].values())
            lines.append(f"{name:<35}{shots}")
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
