"""How good are recovered images, and at what cost? Several recoveries of the same models, judged in three ways.

    python benchmarks/recovery.py --out benchmarks/results/recovery.json

For every variant, on the first models of the shipped pool (its architectures take turns):

- **seconds** to recover one model, on one thread, mean over the models. ``--jobs`` models are recovered at a time, two
  as the product does on two cores. The store answers for what is in it, with the times of when it was made: remove its
  folder (``--store``) to time changed code.
- **judge accuracy**: two classifiers of real images (a Conv4 and a ResNet-10 that are not in the pool, trained on all
  classes that the pool knows) label the recovered images. Right is the class that the image was recovered for, among
  the model's own classes and among all. The row ``real images`` has the same of images that no judge was trained on:
  the ceiling. The judges see real images, so they measure and nothing else.
- **diversity**: the mean of 1 − cosine between the judge's features of two recovered images of one class of one model,
  divided by the same of real images of the same classes (such as no judge was trained on, for a judge draws together
  what it was trained on). 1 is as diverse as real images; more is no merit, for a judge scatters images that it does
  not recognise.
- **few-shot accuracy** of TGR with the main recipe's settings but fewer steps, on this bank; 5-way episodes of
  meta-*validation* classes, and no checkpoint is chosen on them: the last weights are kept.

``agreement`` and ``loss`` are the model's own view of its images: percent that it labels as asked, and the lowest loss.

How much faster the product recovers a model than straightforward code with the paper's settings (``speed`` in the JSON
file) is measured on one Conv4 of the pool, in two processes that take turns, both with ``--threads`` threads.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor
from units import machine

from metapool import recover
from metapool.base.images import InputSpec, LabelledImages
from metapool.base.networks import Architecture, NetworkSpec, build
from metapool.base.store import Store, generator_for, keep_memory
from metapool.embed import ProbeSettings
from metapool.episodes import sample_episodes
from metapool.evaluate import Interval, Scores, evaluate, paired_difference
from metapool.interface.figures import Point, pareto_frontier
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, plain_log_ticks, round_ticks, standalone
from metapool.interface.figures.labels import Box, Label, write_labels
from metapool.interface.recipe import Recipe, evaluation_images, load_recipe, names_of, open_pool, training_images
from metapool.interface.run.files import replace_text
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool, PretrainedModel
from metapool.realdata import pretrain
from metapool.realdata.pretrain import PoolSettings, fit_classifier, split_within_classes
from metapool.recover import AnyRecovery, GeneratorRecovery, recover_pool
from metapool.views import ViewSettings, look

SEED = 0
"""Of judges and of their split of the real images; no variant depends on it."""
PAPER = {"width": 64, "code": 256, "steps": 200, "learning_rate": 1e-3, "per_class": 30, "shift": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper-rate-1e-2": {**PAPER, "learning_rate": 1e-2},
    "main": {},
    "width-64-steps-60": {"width": 64, "steps": 60, "learning_rate": 0.02},
    "width-16-steps-200": {"width": 16, "steps": 200, "learning_rate": 0.01},
    "width-16-steps-30": {"width": 16, "steps": 30, "learning_rate": 0.03},
    "width-16-steps-15": {"width": 16, "steps": 15, "learning_rate": 0.05},
    "width-8-steps-60": {"width": 8, "steps": 60, "learning_rate": 0.02},
    "pixels-steps-60": {"name": "pixels", "steps": 60},
    "pixels-steps-200": {"name": "pixels", "steps": 200},
    "untrained": {"width": 16, "steps": 0},
}
"""Settings of every variant. What is not said is the default of its class, and ``per_class`` that of the main recipe;
``main`` is the main recipe's recovery as it is."""
ON_REQUEST = ("paper-rate-1e-2", "width-8-steps-60", "pixels-steps-200")
"""Variants that are left out unless they are asked for, so that a run takes a quarter of an hour."""
Measures = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    models: int = 6
    """Of the pool, from its start."""
    steps: int = 40
    """Of meta-training."""
    episodes: int = 600
    every: int = 1
    """Of the real images, one in so many is used."""
    held_out: float = 0.1
    """Share of the real images of every class that no judge is trained on."""
    judges: Mapping[Architecture, int] = field(default_factory=lambda: {"conv4": 64, "resnet10": 16})
    """Widths."""
    training: PoolSettings = field(default_factory=lambda: PoolSettings(epochs=12, batch=64))
    """Of the judges: as pool models are trained, with fewer passes over the more numerous images."""
    rounds: int = 3
    """In which straightforward code and product are timed in turn."""
    reference_steps: int = 6
    """Of straightforward code, in each round, after one that is not timed."""
    paper_steps: int = 30
    """Of the product with the paper's settings, in each round."""
    caps: Mapping[str, int] = field(default_factory=dict)
    """Upper limits of settings of every recovery."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method laid over the recipe's."""


SMALL = Sizes(
    models=2,
    steps=1,
    episodes=4,
    every=8,
    held_out=0.3,
    judges={"conv4": 4, "resnet10": 2},
    training=PoolSettings(epochs=1, batch=64),
    rounds=1,
    reference_steps=1,
    paper_steps=1,
    caps={"width": 4, "code": 8, "steps": 2, "per_class": 4},
    method={
        "width": 8,
        "batch": 8,
        "replay_updates": 1,
        "replay_batch": 8,
        "probe": ProbeSettings(width=4, steps=2, batch=16),
        "views": ViewSettings(copies=1, blends=0),
    },
)


def recovery_of(name: str, main: AnyRecovery, sizes: Sizes, seed: int = 0) -> AnyRecovery:
    """The recovery of one variant.

    Args:
        name: of the variant.
        main: the main recipe's recovery.
        sizes: whose limits hold.
        seed: of the recovery.

    Returns:
        The recovery.
    """
    recovery = main
    if VARIANTS[name]:
        adapter: TypeAdapter[AnyRecovery] = TypeAdapter(AnyRecovery)
        recovery = adapter.validate_python({"name": "generator", "per_class": main.per_class, **VARIANTS[name]})
    limits = {key: min(getattr(recovery, key), cap) for key, cap in sizes.caps.items() if hasattr(recovery, key)}
    return recovery.model_copy(update={**limits, "seed": seed})


# The judges: what they are, and what they say.


def make_judges(real: LabelledImages, input: InputSpec, sizes: Sizes, store: Store) -> "Judges":
    """Trains the judges, or takes them from the store.

    Args:
        real: images of all classes that the pool knows.
        input: size, channels and normalisation.
        sizes: widths, training, share held out.
        store: keeps them.

    Returns:
        The judges, with the images that none of them was trained on.
    """
    training, held_out = split_within_classes(real, sizes.held_out, generator_for(SEED, "judges", "split"))
    specs = {
        f"judge-{architecture}": NetworkSpec(
            architecture=architecture,
            width=width,
            classes=len(real.classes),
            channels=input.channels,
            height=input.height,
            image_width=input.width,
        )
        for architecture, width in sizes.judges.items()
    }
    shared = {
        "training": sizes.training.model_dump(mode="json"),
        "images": training.digest(),
        "input": input.model_dump(mode="json"),
        "seed": SEED,
        "version": pretrain.VERSION,
    }
    keys = {id: {**shared, "network": spec.model_dump(mode="json")} for id, spec in specs.items()}
    folders = store.units("judge", keys, partial(_train_judge, training, input, sizes.training, specs))
    return Judges([ModelPool.open(folder).get(id) for id, folder in folders.items()], held_out)


def _train_judge(
    training: LabelledImages,
    input: InputSpec,
    settings: PoolSettings,
    specs: Mapping[str, NetworkSpec],
    id: str,
    folder: Path,
) -> None:
    generator = generator_for(SEED, "judges", id)
    network = build(specs[id], generator).to(memory_format=torch.channels_last)
    network.load_state_dict(fit_classifier(network, training, input, settings, generator))
    ModelPool.create(folder, id).add(PretrainedModel(id, network, input, training.classes, spec=specs[id]))


class Judges:
    """Classifiers of real images.

    Args:
        models: the classifiers, all of the same classes.
        held_out: real images of these classes that none of them was trained on.
    """

    def __init__(self, models: Sequence[PretrainedModel], held_out: LabelledImages) -> None:
        self.models = models
        self.held_out = held_out

    def accuracies(self) -> list[dict[str, Any]]:
        """How good the judges are: percent of all held-out images that each labels right, among all classes."""
        return [
            {
                "architecture": judge.spec.architecture,
                "width": judge.spec.width,
                "accuracy": _percent(look(judge, self.held_out.images)[1].argmax(1) == self.held_out.labels),
                "held_out_images": len(self.held_out),
            }
            for judge in self.models
            if judge.spec is not None
        ]

    def real(self, classes: Sequence[str]) -> LabelledImages:
        """Held-out images of one model's classes.

        Args:
            classes: names.

        Returns:
            The images, labelled as the model labels them.
        """
        return self.held_out.select([self.held_out.classes.index(name) for name in classes])

    def judge(self, images: LabelledImages) -> list[Measures]:
        """What every judge says of labelled images.

        Args:
            images: of some of the judges' classes, by name.

        Returns:
            For each judge: ``own``, percent right among the classes of these images; ``all``, among all classes of the
            judge; ``distance``, mean of 1 − cosine between two images of a class.
        """
        rows = torch.tensor([self.held_out.classes.index(name) for name in images.classes])
        found: list[Measures] = []
        for model in self.models:
            features, logits = look(model, images.images)
            found.append(
                {
                    "own": _percent(logits[:, rows].argmax(1) == images.labels),
                    "all": _percent(logits.argmax(1) == rows[images.labels]),
                    "distance": within_class_distance(features.float(), images.labels),
                }
            )
        return found


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def within_class_distance(features: Tensor, labels: Tensor) -> float:
    """Mean of 1 − cosine over all pairs of different images of one class, then over the classes.

    Args:
        features: float [N, D].
        labels: int64 [N]; classes of a single image have no pair and do not count.

    Returns:
        A number in [0, 2], whose expectation does not depend on the number of images.
    """
    directions = F.normalize(features.double(), dim=1)
    distances: list[float] = []
    for label in labels.unique():
        members = directions[labels == label]
        count = len(members)
        if count > 1:
            # The squared length of the sum is the sum of all cosines, those of an image with itself among them.
            itself = members.square().sum().item()
            cosines = members.sum(0).square().sum().item() - itself
            distances.append(1 - cosines / (count * (count - 1)))
    return statistics.fmean(distances)


def measures(seen: Mapping[str, Sequence[Measures]], real: Mapping[str, Sequence[Measures]]) -> Measures:
    """Accuracy and diversity over models, averaged over the judges.

    Args:
        seen: what each judge says of a model's images, by model.
        real: what it says of real images of the same classes.

    Returns:
        ``judge_own`` and ``judge_all`` in percent, and ``diversity``.
    """
    diversity = [
        statistics.fmean(one["distance"] for one in judged) / statistics.fmean(one["distance"] for one in wanted)
        for judged, wanted in zip(zip(*seen.values()), zip(*(real[id] for id in seen)))
    ]
    return {
        "judge_own": statistics.fmean(one["own"] for judged in seen.values() for one in judged),
        "judge_all": statistics.fmean(one["all"] for judged in seen.values() for one in judged),
        "diversity": statistics.fmean(diversity),
    }


# One variant.


class Bench:
    """What all variants share: models, judges, episodes.

    Args:
        recipe: whose method and recovery are meant.
        sizes: how much is done.
        store: keeps recoveries, judges and learners.
    """

    def __init__(self, recipe: Recipe, sizes: Sizes, store: Store) -> None:
        assert isinstance(recipe.method, TGR)
        self.method = recipe.method.model_copy(update={"steps": sizes.steps, **sizes.method})
        self.main = recipe.method.recovery
        self.sizes, self.store = sizes, store
        self.pool = open_pool(recipe.pool)[: sizes.models]
        input = self.pool.manifest.models[0].input
        (data,) = names_of(recipe.evaluation.data)
        real = training_images(data, input.height, input.channels)
        unknown = {name for entry in self.pool.manifest.models for name in entry.classes} - set(real.classes)
        if unknown:
            raise SystemExit(f"no judge can be trained on classes of the pool such as {min(unknown)!r}")
        self.judges = make_judges(real.take(torch.arange(0, len(real), sizes.every)), input, sizes, store)
        self.real = {
            entry.id: self.judges.judge(self.judges.real(entry.classes)) for entry in self.pool.manifest.models
        }
        self.validation = evaluation_images(data, "val", input)
        self.episodes = {
            shot: sample_episodes(self.validation, 5, shot, 15, sizes.episodes, recipe.evaluation.seed)
            for shot in (1, 5)
        }

    def measure(self, name: str, seeds: Sequence[int]) -> tuple[dict[str, Any], dict[int, Scores]]:
        """Recovers with one variant, judges, meta-trains and scores.

        Args:
            name: of the variant.
            seeds: of recovery and meta-training.

        Returns:
            The row of the result file, and scores by shot, averaged over the seeds for each episode.
        """
        runs: list[dict[str, Any]] = []
        accuracies: dict[int, list[NDArray[np.float64]]] = {shot: [] for shot in self.episodes}
        for seed in seeds:
            recovery = recovery_of(name, self.main, self.sizes, seed)
            runs.append({"seed": seed, **self._images(recovery)})
            method = self.method.model_copy(update={"recovery": recovery})
            model = method.fit(self.pool, self.store, seed, validation=None)
            for shot, drawn in self.episodes.items():
                accuracies[shot].append(evaluate(model, self.validation, drawn).accuracies)
                runs[-1][f"shot_{shot}"] = 100 * float(accuracies[shot][-1].mean())
        scores = {shot: Scores(np.mean(found, axis=0)) for shot, found in accuracies.items()}
        mean = _mean(runs)
        row = {
            "settings": recovery_of(name, self.main, self.sizes).model_dump(mode="json", exclude={"seed"}),
            **{key: mean[key] for key in ("seconds", "agreement", "loss", "judge_own", "judge_all", "diversity")},
            "shots": {str(shot): _interval(score.interval) for shot, score in scores.items()},
            "by_architecture": mean["by_architecture"],
            "seeds": runs,
        }
        return row, scores

    def _images(self, recovery: AnyRecovery) -> dict[str, Any]:
        """Cost and quality of the recovered images, over all models and for each architecture."""
        bank = recover_pool(self.pool, recovery, self.store)
        made = [self.store.used[f"recover/{folder.name}"]["made"] for folder in bank.folders.values()]
        seen: dict[str, list[Measures]] = {}
        records: dict[str, Measures] = {}
        for id, task in bank.items():
            seen[id] = self.judges.judge(LabelledImages(task.images, task.labels, task.classes))
            records[id] = {key: task.record[key] for key in ("seconds", "agreement", "loss")}
        members: dict[str, list[str]] = {}
        for entry in self.pool.manifest.models:
            members.setdefault(entry.network.architecture, []).append(entry.id)

        def over(ids: Sequence[str]) -> Measures:
            return {**_mean([records[id] for id in ids]), **measures({id: seen[id] for id in ids}, self.real)}

        return {
            **over(self.pool.ids),
            "by_architecture": {architecture: over(ids) for architecture, ids in members.items()},
            "recovered": [min(made), max(made)],
        }


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of all numbers, in nested dictionaries too."""
    found: dict[str, Any] = {}
    for key, value in runs[0].items():
        if isinstance(value, Mapping):
            found[key] = _mean([run[key] for run in runs])
        elif isinstance(value, float):
            found[key] = statistics.fmean(run[key] for run in runs)
    return found


def _interval(interval: Interval) -> Measures:
    return {"mean": interval.mean, "ci95": interval.ci95}


# How much faster than straightforward code.


def measure_speed(bench: Bench, threads: int) -> dict[str, Any]:
    """Times the recovery of the pool's first Conv4, straightforward code and product in turn.

    Args:
        bench: whose pool and settings.
        threads: of torch, on either side.

    Returns:
        Part ``speed`` of the result file, without the qualities.
    """
    sizes = bench.sizes
    paper, main = (recovery_of(name, bench.main, sizes) for name in ("paper", "main"))
    assert isinstance(paper, GeneratorRecovery)
    id = next(entry.id for entry in bench.pool.manifest.models if entry.network.architecture == "conv4")
    key = {
        "model": bench.pool.model_digest(id),
        "recoveries": [paper.model_dump(mode="json"), main.model_dump(mode="json")],
        "sizes": [sizes.rounds, sizes.reference_steps, sizes.paper_steps],
        "version": recover.VERSION,
        "on": threads,
    }

    def build_times(folder: Path) -> None:
        times = _times(bench.pool, id, paper, main, sizes, threads)
        (folder / "times.json").write_text(json.dumps(times) + "\n")

    folder = bench.store.artifact("recovery-speed", key, build_times)
    times: dict[str, list[float]] = json.loads((folder / "times.json").read_text())
    middle = {side: statistics.median(found) for side, found in times.items()}
    return {
        "model": id,
        "architecture": "conv4",
        "threads": threads,
        "reference_seconds": paper.steps * middle["reference_step"],
        "paper_seconds": paper.steps * middle["paper_step"],
        "main_seconds": middle["main"],
        "ratio": paper.steps * middle["reference_step"] / middle["main"],
        "kernel_ratio": middle["reference_step"] / middle["paper_step"],
        "images": {"paper": 5 * paper.per_class, "main": 5 * main.per_class},
        "times": times,
        "measured": bench.store.used[f"recovery-speed/{folder.name}"]["made"],
        "remark": f"reference_seconds: benchmarks/reference.py with the paper's settings, {paper.steps} times the "
        f"median step of {len(times['reference_step'])}; paper_seconds: the product with the same, from runs of "
        f"{sizes.paper_steps} steps; main_seconds: the product with the main recipe's settings, whole recoveries",
    }


def _times(
    pool: ModelPool, id: str, paper: GeneratorRecovery, main: AnyRecovery, sizes: Sizes, threads: int
) -> dict[str, list[float]]:
    """Seconds of a step or of a whole recovery; each side in a process of its own, since memory is kept by process."""
    times: dict[str, list[float]] = {"reference_step": [], "paper_step": [], "main": []}
    short = paper.model_copy(update={"steps": sizes.paper_steps})
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as plain,
        ProcessPoolExecutor(1, context, _start_product, (threads,)) as product,
    ):
        product.submit(product_seconds, pool, id, main).result()  # both sides are warm when the clock starts
        for _ in range(sizes.rounds):
            times["reference_step"] += plain.submit(reference_steps, pool, id, paper, sizes.reference_steps).result()
            time.sleep(0.02)  # until the other's idle threads have stopped spinning
            times["paper_step"].append(product.submit(product_seconds, pool, id, short).result() / sizes.paper_steps)
            times["main"].append(product.submit(product_seconds, pool, id, main).result())
            time.sleep(0.02)
    return times


def _start_product(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_memory()  # as the store does before it builds anything


def product_seconds(pool: ModelPool, id: str, recovery: AnyRecovery) -> float:
    """Time of one recovery as the product does it.

    Args:
        pool: the models.
        id: which of them.
        recovery: how.

    Returns:
        Seconds.
    """
    return recovery.recover(pool.get(id), generator_for(recovery.seed, "recover", id)).record["seconds"]


def reference_steps(pool: ModelPool, id: str, paper: GeneratorRecovery, steps: int) -> list[float]:
    """Times of steps of straightforward code, from the product's initial generator and codes.

    Args:
        pool: the models.
        id: a Conv4.
        paper: the settings.
        steps: that are timed, after one that is not.

    Returns:
        Seconds of every step.
    """
    model, generator = pool.get(id), generator_for(paper.seed, "recover", id)
    input = model.input
    size = (input.height, input.width)
    assert model.spec is not None
    teacher = reference.Conv4(input.channels, model.spec.width, len(model.classes), size)
    teacher.load_state_dict({name: value.contiguous() for name, value in model.network.state_dict().items()})
    painter = reference.Painter(paper.code, paper.width, input.channels, size)
    painter.load_state_dict(recover.Generator(paper.code, paper.width, input).initialise(generator).state_dict())
    labels = torch.arange(len(model.classes)).repeat_interleave(paper.per_class)
    state = reference.Recovery(
        teacher.requires_grad_(False),
        painter.train(),
        torch.randn(len(labels), paper.code, generator=generator),
        labels,
        input.mean,
        input.std,
        paper.shift,
        paper.learning_rate,
    )
    times: list[float] = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        state.step(generator)
        times.append(time.perf_counter() - started)
    return times[1:]


def with_quality(speed: dict[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the qualities that were bought beside the times.

    Args:
        speed: what :func:`measure_speed` gave.
        rows: of the result file.

    Returns:
        The same with ``quality`` of ``paper`` and ``main``, as far as they are measured.
    """
    quality = {
        name: {
            **{key: rows[name][key] for key in ("judge_own", "judge_all", "diversity")},
            "judge_own_same_architecture": rows[name]["by_architecture"][speed["architecture"]]["judge_own"],
            "shots": rows[name]["shots"],
        }
        for name in ("paper", "main")
        if name in rows
    }
    return {**speed, "quality": quality}


# What is shown.


def table(result: Mapping[str, Any]) -> str:
    """The result in Markdown.

    Args:
        result: content of the result file.

    Returns:
        A table and, when both sides are measured, the statement about speed.
    """
    settings, real = result["settings"], result["real"]
    lines = [
        "| recovery | seconds / model | judges, own classes | judges, all classes | diversity | 1-shot | 5-shot "
        "| agreement | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(result["rows"].items(), key=lambda item: -item[1]["seconds"]):
        cells = [f"**{name}**" if name == "main" else name, f"{row['seconds']:.2f}"]
        cells += [f"{row['judge_own']:.1f}", f"{row['judge_all']:.1f}", f"{row['diversity']:.2f}"]
        cells += [f"{shot['mean']:.1f} ± {shot['ci95']:.1f}" for shot in row["shots"].values()]
        cells += [f"{row['agreement']:.1f}", f"{row['loss']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| *real images* | | {real['judge_own']:.1f} | {real['judge_all']:.1f} | 1.00 | | | | |")
    judges = " and ".join(f"{one['architecture']} {one['accuracy']:.1f} %" for one in result["judges"])
    lines += [
        "",
        f"{len(settings['models'])} models; seconds on one thread, {settings['jobs']} models at a time; seeds "
        f"{', '.join(map(str, settings['seeds']))}; {settings['steps']} steps of meta-training, {settings['episodes']} "
        "5-way episodes of meta-validation classes, ± 95 % intervals over episodes. Judges on real images of all "
        f"{settings['classes']} classes that they were not trained on: {judges}.",
    ]
    speed = result["speed"]
    if {"paper", "main"} <= speed.get("quality", {}).keys():
        lines += ["", statement(speed, result["rows"]["main"]["shots"])]
    return "\n".join(lines) + "\n"


def statement(speed: Mapping[str, Any], shots: Mapping[str, Mapping[str, Any]]) -> str:
    """How much faster, and what it costs in quality.

    Args:
        speed: part ``speed`` of the result file, with both qualities.
        shots: accuracies of the row ``main``.

    Returns:
        Two sentences.
    """
    paper, main = speed["quality"]["paper"], speed["quality"]["main"]
    changes = [
        f"the judges' accuracy from {paper['judge_own']:.1f} to {main['judge_own']:.1f} %",
        f"on {speed['architecture']} alone from {paper['judge_own_same_architecture']:.1f} to "
        f"{main['judge_own_same_architecture']:.1f} %",
    ]
    for shot, score in shots.items():
        gap = score["difference_to_paper"]
        changes.append(f"{shot}-shot accuracy by {gap['mean']:+.1f} points ({gap['low']:+.1f} to {gap['high']:+.1f})")
    return (
        f"Recovery of one {speed['architecture']} on {speed['threads']} threads: straightforward code with the paper's "
        f"settings {speed['reference_seconds']:.1f} s, the product with the same {speed['paper_seconds']:.1f} s "
        f"({speed['kernel_ratio']:.1f}×), with the main recipe's {speed['main_seconds']:.2f} s: "
        f"**{speed['ratio']:.0f}×** in all. From the paper's settings to the main recipe's, {', '.join(changes)}."
    )


PANELS = {
    "judge_own": "Judges' accuracy among the model's own classes (%)",
    "shot_1": "5-way 1-shot accuracy after short meta-training (%)",
    "diversity": "Diversity within a class, relative to real images (best: 1)",
}


def figure(result: Mapping[str, Any]) -> str:
    """Three panels over one another: what a recovery gives, against the seconds that it takes.

    Args:
        result: content of the result file.

    Returns:
        A whole SVG file.
    """
    rows = result["rows"]
    width, height, top, bottom = 760, 300, 34, 48
    with panel(width, len(PANELS) * height, "Quality of recovered images against seconds per model") as (drawn, draw):
        for index, (measure, title) in enumerate(PANELS.items()):
            low = (len(PANELS) - 1 - index) * height + bottom
            box = (0.09, low / (len(PANELS) * height), 0.89, (height - top - bottom) / (len(PANELS) * height))
            axes = drawn.add_axes(box)
            points = [
                Point(
                    name,
                    row["seconds"],
                    row["shots"]["1"]["mean"] if measure == "shot_1" else row[measure],
                    row["shots"]["1"]["ci95"] if measure == "shot_1" else 0.0,
                    highlight=name == "main",
                )
                for name, row in rows.items()
            ]
            # The frontier of diversity is that of nearness to real images.
            merits = [-abs(math.log(point.accuracy)) if measure == "diversity" else point.accuracy for point in points]
            _draw_panel(axes, points, merits, title, result["real"].get(measure))
        inline = draw()
    return standalone(inline)


def _draw_panel(axes: Any, points: Sequence[Point], merits: Sequence[float], title: str, real: float | None) -> None:
    """Points with their names and intervals, the Pareto frontier, and a dashed line at what real images have."""
    costs = [point.cost for point in points]
    spread = float(np.log10(max(costs) / min(costs)))
    axes.set_xscale("log")
    axes.set_xlim(min(costs) * 10 ** -max(0.2, 0.06 * spread), max(costs) * 10 ** max(0.3, 0.18 * spread))
    ends = [point.accuracy + side * point.ci95 for point in points for side in (-1, 1)]
    ends += [] if real is None else [real]
    room = 0.1 * max(max(ends) - min(ends), 0.05)
    axes.set_ylim(min(ends) - room, max(ends) + room)
    bare(axes, title)
    plain_log_ticks(axes.xaxis, spread + 0.5)
    round_ticks(axes.yaxis)
    axes.set_xlabel("seconds to recover one model, one thread (logarithmic)", labelpad=4)

    def pixels(cost: float, value: float) -> tuple[float, float]:
        x, y = axes.transData.transform((cost, value))
        return float(x), float(y)

    obstacles: list[Box] = []
    labels: list[Label] = []
    ranked = pareto_frontier([Point(one.name, one.cost, merit, 0.0) for one, merit in zip(points, merits)])
    by_name = {point.name: point for point in points}
    frontier = [by_name[one.name] for one in ranked]
    xs = [point.cost for point in frontier] + [axes.get_xlim()[1]]
    ys = [point.accuracy for point in frontier] + [frontier[-1].accuracy]
    axes.step(xs, ys, where="post", color="#b9c3cf", linewidth=1.6, zorder=1)
    corners = [pixels(x, y) for x, y in zip(xs, ys)]
    for (x0, y0), (x1, y1) in pairwise(corners):
        obstacles += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
    if real is not None:
        axes.axhline(real, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        y = pixels(1, real)[1]
        obstacles.append((0, y - 1, 1e4, y + 1))
        labels.append(Label("real images", 0, y, MUTED, line=True))
    for point in points:
        colour = ACCENT if point.highlight else INK if point in frontier else MUTED
        x, y = pixels(point.cost, point.accuracy)
        reach = pixels(point.cost, point.accuracy + point.ci95)[1] - y
        obstacles += [(x - 5, y - 5, x + 5, y + 5), (x - 1.5, y - reach, x + 1.5, y + reach)]
        labels.append(Label(point.name, x, y, colour, bold=point.highlight))
        axes.errorbar(
            *(point.cost, point.accuracy, point.ci95 or None),
            fmt="o",
            color=colour,
            markersize=7 if point.highlight else 5.5,
            elinewidth=1.2,
            zorder=4 if point.highlight else 3,
        )
    write_labels(axes, labels, obstacles)


def main(arguments: list[str] | None = None) -> None:
    """Measures all variants; writes one JSON file after each, and a figure at the end.

    Args:
        arguments: of the command line.
    """
    usual = [name for name in VARIANTS if name not in ON_REQUEST]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=usual,
        choices=[*VARIANTS, "all"],
        metavar="NAME",
        help=f"all, or some of {', '.join(VARIANTS)}; without: all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of recovery and meta-training")
    parser.add_argument("--models", type=int, default=Sizes.models, help="of the pool, from its start; it has 30")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="of meta-training")
    parser.add_argument("--jobs", type=int, default=2, help="models recovered at a time, each on one thread")
    parser.add_argument("--threads", type=int, default=2, help="of either side when speed is measured")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works; nothing to quote")
    parser.add_argument("--store", type=Path, help="default: store/recovery, and another one for --small")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/recovery.json; in the store for --small")
    parser.add_argument("--figure", type=Path, help="default: docs/recovery.svg; in the store for --small")
    parser.add_argument("--figure-only", action="store_true", help="draw from the JSON file and run nothing")
    options = parser.parse_args(arguments)
    store_folder = options.store or Path("store/recovery-small" if options.small else "store/recovery")
    out = options.out or (store_folder / "recovery.json" if options.small else Path("benchmarks/results/recovery.json"))
    picture = options.figure or (store_folder / "recovery.svg" if options.small else Path("docs/recovery.svg"))
    if options.figure_only:
        replace_text(picture, figure(json.loads(out.read_text())))
        return
    sizes = SMALL if options.small else Sizes(models=options.models, steps=options.steps)
    names = list(VARIANTS) if "all" in options.variants else [name for name in VARIANTS if name in options.variants]
    bench = Bench(load_recipe("main"), sizes, Store(store_folder, jobs=options.jobs))
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/recovery.py", *given]),
        "machine": machine(options.threads),
        "settings": {
            "models": bench.pool.ids,
            "classes": len(bench.judges.held_out.classes),
            "seeds": options.seeds,
            "jobs": options.jobs,
            "unit_threads": bench.store.unit_threads,
            "steps": sizes.steps,
            "episodes": sizes.episodes,
            "episode_hashes": {str(shot): drawn.digest() for shot, drawn in bench.episodes.items()},
            "method": bench.method.model_dump(mode="json", exclude={"recovery"}),
        },
        "judges": bench.judges.accuracies(),
        "real": measures(bench.real, bench.real),
        "speed": {},
        "rows": {},
    }
    speed = measure_speed(bench, options.threads)
    paper: dict[int, Scores] | None = None
    for name in names:
        started = time.perf_counter()
        row, scores = bench.measure(name, options.seeds)
        paper = scores if name == "paper" else paper
        for shot, score in scores.items():
            gap = None if paper is None else vars(paired_difference(score, paper[shot]))
            row["shots"][str(shot)]["difference_to_paper"] = gap
        result["rows"][name] = row
        result["speed"] = with_quality(speed, result["rows"])
        replace_text(out, json.dumps(rounded(result), indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    replace_text(picture, figure(rounded(result)))
    print(table(rounded(result)))


def rounded(value: Any) -> Any:
    """Numbers with five significant digits: more would be noise in a committed file.

    Args:
        value: of JSON.

    Returns:
        The same value with rounded floats.
    """
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    # Workers get a module's functions by name, but those of a script as code with its globals, not all of which can go.
    importlib.import_module("recovery").main()
