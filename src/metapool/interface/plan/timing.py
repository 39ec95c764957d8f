"""Timers of what a run does, and what they run on: images, tasks and views that are made up."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from metapool.bank import RecoveredTask, TaskBank
from metapool.base.images import InputSpec, LabelledImages
from metapool.base.networks import NetworkSpec, build
from metapool.base.store import keep_memory
from metapool.embed import ProbeSettings, task_embedding
from metapool.episodes import Episodes
from metapool.evaluate import evaluate
from metapool.learners import FewShotModel
from metapool.pool import ModelEntry, ModelPool
from metapool.recover import AnyRecovery
from metapool.views import Views, look

MADE_UP = 2048
"""Images that are made up for a step: more of them change no step's time."""


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of a call.

    Args:
        work: is called once.

    Returns:
        Seconds by the wall clock.
    """
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def seconds_at(steps: int, seconds: Callable[[int], float], few: int = 1, more: int = 4) -> float:
    """Seconds of many steps, by a line through those of a few and of some more.

    Args:
        steps: how many.
        seconds: times so many steps.
        few: at least 1.
        more: more than ``few``; so many steps or fewer are timed as they are.

    Returns:
        Seconds.
    """
    if steps <= more:
        return seconds(steps)
    first = seconds(few)
    return first + max(0.0, seconds(more) - first) / (more - few) * (steps - few)


def episode_seconds(model: FewShotModel, encoded: Tensor, images: LabelledImages, drawn: Episodes) -> float:
    """Seconds to classify one episode of images that are encoded already.

    Args:
        model: whose answers are timed.
        encoded: some images as it encodes them, which stand for all.
        images: what the episodes index.
        drawn: episodes, of which the first few are timed.

    Returns:
        Seconds.
    """
    known = cast(FewShotModel, _Encoded(model, encoded[torch.arange(len(images)) % len(encoded)]))

    def score(count: int) -> float:
        part = Episodes(drawn.support[:count], drawn.query[:count])
        return seconds_of(lambda: evaluate(known, replace(images, domains=()), part))

    if score(1) > 0.05:  # then all but the episodes themselves is small
        return score(2) / min(2, len(drawn))
    more = min(21, len(drawn))
    return max(0.0, score(more) - score(1)) / max(1, more - 1)


class _Encoded:
    """A model whose images are encoded already, so that its episodes are all that it takes time for."""

    def __init__(self, model: FewShotModel, encoded: Tensor) -> None:
        self.model = model
        self.encoded = encoded

    def encode(self, images: Tensor) -> Tensor:
        return self.encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def time_units(
    pool: ModelPool, ids: list[str], recoveries: list[AnyRecovery], probes: list[ProbeSettings], threads: int
) -> dict[str, dict[str, float]]:
    """Seconds of all that a worker does for a model, for each of some models.

    Args:
        pool: the models.
        ids: of those that are timed.
        recoveries: ways to recover a task.
        probes: networks that embed a task.
        threads: of a worker.

    Returns:
        By model id: seconds by digest of the recovery or of the probe, under ``"view"`` seconds of one image, and under
        ``"features"`` no time but their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models without batch norm: the run itself warns
            return {id: _time_model(pool, id, recoveries, probes) for id in ids}
    finally:
        torch.set_num_threads(before)


def _time_model(
    pool: ModelPool, id: str, recoveries: list[AnyRecovery], probes: list[ProbeSettings]
) -> dict[str, float]:
    model, input = pool.get(id), pool.input

    def recover(recovery: AnyRecovery, steps: int) -> float:
        short = recovery.model_copy(update={"steps": steps})
        return seconds_of(lambda: short.recover(model, torch.Generator().manual_seed(0)))

    found: dict[str, float] = {}
    for recovery in recoveries:
        recover(recovery, min(1, recovery.steps))  # the first is slow
        found[recovery.digest()] = seconds_at(recovery.steps, lambda steps, how=recovery: recover(how, steps))  # type: ignore[misc]
    task = recoveries[0].model_copy(update={"steps": 1}).recover(model, torch.Generator().manual_seed(0))
    for probe in probes:
        spec = NetworkSpec(
            architecture="conv4",
            width=probe.width,
            classes=sum(len(entry.classes) for entry in pool.manifest.models),
            channels=input.channels,
            height=input.height,
            image_width=input.width,
        )
        network = build(spec, torch.Generator().manual_seed(0))
        kept = torch.linspace(0, len(task.labels) - 1, min(probe.images, len(task.labels))).round().long()
        images, labels = task.images[kept], task.labels[kept]
        first = [int((labels == label).nonzero()[0]) for label in labels.unique()]
        task_embedding(network, input, images[first], labels[first])  # the first is slow
        found[probe.digest()] = seconds_of(lambda: task_embedding(network, input, images, labels))  # noqa: B023
    seen = noise(256, input)
    features, _ = look(model, seen[:64])
    found["view"] = seconds_of(lambda: look(model, seen)) / len(seen)
    found["features"] = float(features.shape[1])
    return found


def noise(count: int, input: InputSpec) -> Tensor:
    """Images that show nothing.

    Args:
        count: N.
        input: their size and channels.

    Returns:
        uint8 [N, C, H, W], always the same.
    """
    return torch.randint(256, (count, *input.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def made_up_bank(entries: Iterable[ModelEntry], per_class: int, folder: Path) -> TaskBank:
    """Tasks as models would give them, but of noise.

    Args:
        entries: the models.
        per_class: images of a class, if that is not too many in all.
        folder: is filled.

    Returns:
        The bank.
    """
    models = list(entries)
    count = max(1, min(per_class, MADE_UP // sum(len(entry.classes) for entry in models)))
    folders = {entry.id: folder / "bank" / entry.id for entry in models}
    for entry in models:
        labels = torch.arange(len(entry.classes)).repeat_interleave(count)
        folders[entry.id].mkdir(parents=True)
        answers = torch.zeros(len(labels), len(entry.classes))
        RecoveredTask(noise(len(labels), entry.input), labels, answers, entry.classes, {}).save(folders[entry.id])
    return TaskBank(folders)


def made_up_views(features: Mapping[str, int], input: InputSpec) -> Views:
    """Views of noise, with answers that say nothing.

    Args:
        features: number of every model's features.
        input: of the images.

    Returns:
        The views.
    """
    owner = torch.arange(MADE_UP) % len(features)
    seen = {id: torch.rand(MADE_UP, count).half() for id, count in features.items()}
    return Views(noise(MADE_UP, input), owner, torch.zeros_like(owner), seen, {})
