"""A saved model in use: score it on new classes, label images by a few examples."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from metapool.base.errors import MetapoolError
from metapool.base.images import to_float
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.interface.recipe import evaluation_images
from metapool.learners import FewShotModel
from metapool.methods import load_model
from metapool.realdata import datasets

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"}


def evaluate_saved(
    model: Path, data: str, way: int, shot: int, query: int, episodes: int, seed: int, *, root: str | None = None
) -> dict[str, Any]:
    """Few-shot accuracy of a saved model on classes it has not seen.

    Args:
        model: its folder.
        data: a shipped domain or a published benchmark (its meta-test classes), or a folder ``<class>/<images>``.
        way: classes of an episode.
        shot: support images of a class.
        query: query images of a class.
        episodes: number of episodes.
        seed: of the draw.
        root: folder of a published benchmark's files.

    Returns:
        Mean and 95 % interval in percent, the episodes' hash and settings.

    Raises:
        MetapoolError: when way, shot, query or episodes is too small.
    """
    for name, value, least in (("way", way, 2), ("shot", shot, 1), ("query", query, 1), ("episodes", episodes, 1)):
        if value < least:
            raise MetapoolError(f"--{name} {value}: at least {least}")
    loaded = load_model(model)
    images = evaluation_images(data, "test", loaded.input, root)
    drawn = sample_episodes(images, way, shot, query, episodes, seed)
    interval = evaluate(loaded, images, drawn).interval
    return {
        "model": str(model),
        "data": data,
        "way": way,
        "shot": shot,
        "query": query,
        "episodes": episodes,
        "seed": seed,
        "hash": drawn.digest(),
        "mean": round(interval.mean, 3),
        "ci95": round(interval.ci95, 3),
    }


def predict(model: Path, support: Path, queries: Iterable[Path]) -> list[dict[str, Any]]:
    """Labels images by the examples in a folder.

    Args:
        model: folder of a saved model.
        support: folder ``<class>/<images>``; at least two classes, any number of images ≥ 1 in each.
        queries: image files, or folders of image files.

    Returns:
        For every query file: file, class, probability, and the probabilities of all classes.

    Raises:
        MetapoolError: when there are fewer than two classes, or no query.
    """
    loaded = load_model(model)
    channels, height, width = loaded.input.shape
    examples = datasets.folder(support, channels=channels, height=height, width=width)
    if len(examples.classes) < 2:
        raise MetapoolError(f"{support} holds one class, {examples.classes[0]!r}; at least two are needed to choose")
    files = [file for query in queries for file in _image_files(query)]
    if not files:
        raise MetapoolError("--query: at least one image file or folder of images")
    images = torch.stack([datasets.read_image(file, channels, height, width) for file in files])
    probabilities = class_probabilities(loaded, examples.images, examples.labels, images)
    answers: list[dict[str, Any]] = []
    for file, row in zip(files, probabilities.tolist()):
        best = max(range(len(row)), key=row.__getitem__)
        named = {name: round(value, 6) for name, value in zip(examples.classes, row)}
        answers.append(
            {"file": str(file), "class": examples.classes[best], "probability": round(row[best], 6), "all": named}
        )
    return answers


def class_probabilities(
    model: FewShotModel, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """Probabilities of every class for every query.

    Args:
        model: any few-shot model.
        support: uint8 [S, C, H, W].
        labels: int64 [S] in [0, K).
        query: uint8 [Q, C, H, W].

    Returns:
        float [Q, K]; rows sum to 1.
    """
    logits = model.classify(model.encode(to_float(support)), labels, model.encode(to_float(query)))
    probabilities = logits.softmax(-1)
    return probabilities.mean(0) if probabilities.dim() == 3 else probabilities


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MetapoolError(f"{path}: no such image or folder")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise MetapoolError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found
