"""The report of a run: one self-contained HTML page, made from the run's files alone.

What a run left out (``steps.jsonl``, ``grouping.json``, ``gallery.npz``) is left out of the page. Names of classes,
models and methods come from strangers, so the template escapes everything but the figures that we draw ourselves.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metapool.base.errors import MetapoolError
from metapool.interface import figures
from metapool.interface.report import wording
from metapool.interface.report.files import Grouping, PoolModel, Run, Scores, read_curves, read_json
from metapool.interface.report.wording import headline_sentence, verdict_sentence

__all__ = ["check_installed", "headline_sentence", "verdict_sentence", "write_report"]

SHOWN_CLASSES, SHOWN_IMAGES, SHOWN_PER_ARCHITECTURE = 8, 6, 2
CURVES = {
    "loss": "Loss",
    "discrepancy": "Gradient discrepancy",
    "cosine": "Mean pairwise cosine of gradients",
    "validation": "Accuracy on validation tasks (%)",
    "replay": "Replay loss",
}


def check_installed() -> None:
    """Says at the start of a run what its report, which comes last, would lack.

    Raises:
        MetapoolError: when jinja2 or matplotlib is not installed.
    """
    for name in ("jinja2", "matplotlib"):
        if find_spec(name) is None:
            raise MetapoolError(f"the report needs {name}: pip install 'metapool[report]'")


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run's folder; the same files give the same bytes.

    Args:
        run: the folder, with at least ``run.json`` and ``scores.json``.

    Returns:
        The page's path.

    Raises:
        MetapoolError: when a file is missing or malformed, or jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MetapoolError("the report needs jinja2: pip install 'metapool[report]'") from error
    about = read_json(run / "run.json", Run)
    scores = read_json(run / "scores.json", Scores)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("significant", "counted", "signed", "duration", "unbroken", "side"):
        environment.filters[name] = getattr(wording, name)
    page = environment.get_template("report.html.j2").render(_context(run, about, scores))
    path = run / "report.html"
    temporary = run / f".report.html.{os.getpid()}"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _context(run: Path, about: Run, scores: Scores) -> dict[str, Any]:
    """Everything that the template shows."""
    shots = wording.common_shots(scores)
    curves = read_curves(run / "steps.jsonl", CURVES)
    trained = list(dict.fromkeys(name for measure in curves.values() for name in measure))
    colours = figures.method_colours(trained, about.headline)
    licences: dict[str, int] = {}
    for model in about.pool.models:
        licence = model.licence or "not stated"
        licences[licence] = licences.get(licence, 0) + 1
    planes = {shot: wording.points_of(scores, shot, about.headline) for shot in shots}
    return {
        "run": about,
        "scores": scores,
        "shots": sorted({shot for method in scores.methods.values() for shot in method.shots}),
        "order": wording.ranked(scores),
        "domains": list(next(iter(scores.methods.values())).domains),
        "headline": headline_sentence(scores, about.headline),
        "verdict": verdict_sentence(scores, about.headline),
        "frontier": wording.frontier_sentence(scores, about.headline),
        "cost_figures": [
            figures.accuracy_against_cost(points, f"{shot}-shot accuracy, {scores.episodes.way}-way (%)")
            for shot, points in planes.items()
        ],
        "clipped": any(p.accuracy < figures.floor_of(points) for points in planes.values() for p in points),
        "pairs": _pairs(scores, about.headline),
        "sheets": _sheets(run / "gallery.npz", about.pool.models),
        "grouping": _grouping(run / "grouping.json", about.pool.models),
        "curves": [
            figures.training_curves(curves[measure], title, colours)
            for measure, title in CURVES.items()
            if measure in curves
        ],
        "colours": colours,
        "recipe": yaml.safe_dump(about.recipe, sort_keys=False, allow_unicode=True),
        "total_seconds": sum(scores.seconds.values()),
        "licences": dict(sorted(licences.items())),
    }


def _pairs(scores: Scores, headline: str) -> dict[str, list[dict[str, Any]]]:
    """Paired differences, a row per pair of methods; our learner always first and apart from the others."""
    rows: dict[str, list[dict[str, Any]]] = {"main": [], "others": []}
    seen: list[tuple[str, str]] = []
    order = wording.ranked(scores)
    for pair in scores.paired:
        first, second = (pair.b, pair.a) if pair.b == headline else (pair.a, pair.b)
        if {first, second} <= set(scores.methods) and (first, second) not in seen and (second, first) not in seen:
            seen.append((first, second))
    for first, second in sorted(seen, key=lambda pair: (order.index(pair[0]), order.index(pair[1]))):
        shots = {pair.shot for pair in scores.paired if {pair.a, pair.b} == {first, second}}
        gaps = {shot: wording.paired_gap(scores, first, second, shot) for shot in shots}
        rows["main" if first == headline else "others"].append({"first": first, "second": second, "gaps": gaps})
    return rows


def _sheets(path: Path, models: Sequence[PoolModel]) -> dict[str, list[dict[str, Any]]]:
    """Strips of images per class and model: some models of each architecture from all over the pool, then the rest."""
    sheets: dict[str, list[dict[str, Any]]] = {"first": [], "rest": []}
    if not path.exists():
        return sheets
    shown = _spread(models)
    try:
        with np.load(path, allow_pickle=False) as gallery:
            for model in models:
                if model.id not in gallery or not model.classes:
                    continue
                images = gallery[model.id]
                per_class = len(images) // len(model.classes)
                if per_class == 0:
                    continue
                strips = [
                    (name, figures.recovered_sheet(images[i * per_class : (i + 1) * per_class][:SHOWN_IMAGES]))
                    for i, name in enumerate(model.classes[:SHOWN_CLASSES])
                ]
                place = "first" if model.id in shown else "rest"
                sheets[place].append({"model": model, "strips": strips, "more": len(model.classes) - len(strips)})
    except (ValueError, OSError) as error:
        raise MetapoolError(f"{path} is not a gallery of recovered images: {error}") from error
    return sheets


def _spread(models: Sequence[PoolModel]) -> set[str]:
    """Ids of a few models of each architecture; all together lie evenly over the pool, and so in all of its domains."""
    architectures: dict[str, list[str]] = {}
    for model in models:
        architectures.setdefault(model.architecture, []).append(model.id)
    parts = SHOWN_PER_ARCHITECTURE * len(architectures)
    return {
        ids[(turn * len(architectures) + place) * len(ids) // parts]
        for place, ids in enumerate(architectures.values())
        for turn in range(SHOWN_PER_ARCHITECTURE)
    }


def _grouping(path: Path, models: Sequence[PoolModel]) -> dict[str, Any] | None:
    """The heat map and a row per group: its models, and how unlike they are among themselves and to the others."""
    if not path.exists():
        return None
    grouping = read_json(path, Grouping)
    matrix = np.array(grouping.dissimilarity, dtype=np.float64)
    count = len(grouping.models)
    if matrix.shape != (count, count) or not all(0 <= i < count for group in grouping.groups for i in group):
        raise MetapoolError(f"{path}: dissimilarity must be {count} x {count} and groups hold indices below {count}")
    if count == 0:
        return None
    architectures = {model.id: model.architecture for model in models}
    rows = []
    for group in grouping.groups:
        members = [grouping.models[i] for i in group]
        others = [i for i in range(count) if i not in group]
        within = matrix[np.ix_(group, group)][~np.eye(len(group), dtype=bool)]
        across = matrix[np.ix_(group, others)]
        kinds = [architectures.get(member, "unknown") for member in members]
        rows.append(
            {
                "members": members,
                "mix": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
                "within": float(within.mean()) if within.size else None,
                "across": float(across.mean()) if across.size else None,
            }
        )
    return {"figure": figures.dissimilarity_map(matrix, grouping.groups, grouping.models), "rows": rows}
