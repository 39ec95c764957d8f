"""What single pieces of work cost on this machine: a few real steps, timed, and scaled to the sizes of the job.

Work of the store's workers is timed in as many workers, all at once: cores that share a memory slow one another down.
Steps are taken on models of the pool itself. Images and answers of what is not recovered yet are made up: what they
show changes no cost.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import joblib
import numpy as np
import torch

from metapool.base.functional import whitening
from metapool.base.images import place, to_float
from metapool.base.store import Settings, Store, digest_of
from metapool.embed import ProbeSettings, train_probe
from metapool.ensemble import Ensemble
from metapool.episodes import sample_episodes
from metapool.interface.plan.timing import (
    MADE_UP,
    episode_seconds,
    made_up_bank,
    made_up_views,
    noise,
    seconds_at,
    seconds_of,
    time_units,
)
from metapool.interface.run import Job
from metapool.learners import FewShotModel, ProtoNet
from metapool.methods import AnyMethod, load_model, recovery_of
from metapool.methods.baselines import Average, BestSingle, EnsembleAll, MeanSingle, Untrained
from metapool.methods.tgr import TGR
from metapool.student import CALIBRATION_IMAGES, MetaTraining, Student
from metapool.views import ViewSettings

CHOICE = 200
"""Episodes that a checkpoint is scored on, and what a baseline chooses from."""


@dataclass(frozen=True)
class Training:
    """Seconds of a meta-training.

    Attributes:
        once: before the first step and after the last.
        step: one step with its replay, by the number of blocks that no longer learn.
        frozen: to make what such blocks make of one view.
        check: one candidate on validation classes.
    """

    once: float
    step: Mapping[int, float]
    frozen: float
    check: float


@dataclass(frozen=True)
class Answers:
    """Seconds that a model takes to answer.

    Attributes:
        image: to encode one image.
        episode: to classify one episode, by number of shots.
        choice: to classify one 1-shot episode of validation classes.
        numbers: that the model stores.
    """

    image: float
    episode: Mapping[int, float]
    choice: float
    numbers: int


class Costs:
    """Seconds of the pieces of a job; every kind of work is timed once, when it is first asked for.

    Args:
        job: the pool, the images, the numbers of threads and workers.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.entries = {entry.id: entry for entry in job.pool.manifest.models}
        self.input = job.pool.input
        self._kinds = {id: entry.network.digest() for id, entry in self.entries.items()}
        self._known: dict[str, Any] = {}

    def unit(self, id: str, name: str, times: int = 1) -> float:
        """Seconds that a worker takes for one model.

        Args:
            id: of the model.
            name: digest of a recovery or of a probe's settings; ``"view"`` for one image; ``"features"``.
            times: how often.

        Returns:
            Seconds; for ``"features"`` no time but their number.
        """
        return times * self._units[self._kinds[id]][name]

    def probe(self, settings: ProbeSettings) -> float:
        """Seconds to train the probe of a bank.

        Args:
            settings: of the probe.

        Returns:
            Seconds.
        """
        return cast(float, self._once("probe", settings, lambda: self._time_probe(settings)))

    def _time_probe(self, settings: ProbeSettings) -> float:
        classes = sum(len(entry.classes) for entry in self.entries.values())
        images, labels = noise(MADE_UP, self.input), torch.arange(MADE_UP) % classes

        def train(steps: int) -> float:
            short = settings.model_copy(update={"steps": steps})
            return seconds_of(lambda: train_probe(images, labels, classes, self.input, short, torch.Generator()))

        train(1)
        return seconds_at(settings.steps, train)

    def view_images(self, settings: ViewSettings, count: int) -> float:
        """Seconds to make the images of views.

        Args:
            settings: of the views.
            count: images, nearly all of them copies and blends.

        Returns:
            Seconds.
        """
        images, plain = to_float(noise(256, self.input)), torch.zeros(self.input.channels)
        made = seconds_of(lambda: place(images, settings.scales, settings.shift, plain, torch.Generator()))
        return made * count / len(images)

    def training(self, method: TGR, views: int, done: int = 0) -> float:
        """Seconds of meta-training.

        Args:
            method: with all its settings.
            views: images that all models look at.
            done: steps that are taken already.

        Returns:
            Seconds.
        """
        training = cast(Training, self._once("training", method, lambda: self._time_training(method)))
        phases = method.phases(done)
        steps = sum(count * training.step[blocks] for blocks, count in phases.items())
        checks = -(-method.steps // method.check_every) - done // method.check_every
        return training.once + steps + checks * training.check + sum(map(bool, phases)) * views * training.frozen

    def answers(self, method: AnyMethod | Path) -> Answers:
        """What the model of a method takes to answer, by a network of the same sizes.

        Args:
            method: its model need not be made yet; or the folder of a saved model.

        Returns:
            Seconds.
        """
        return cast(Answers, self._once("answers", method, lambda: self._time_answers(method)))

    def scoring(self, method: AnyMethod | Path) -> float:
        """Seconds to score a model on all episodes.

        Args:
            method: as in :meth:`answers`.

        Returns:
            Seconds.
        """
        answers, drawn = self.answers(method), self.job.episodes
        encoding = len(self.job.images) * answers.image
        return encoding + sum(len(part) * answers.episode[shot] for shot, part in drawn.items())

    def timing(self, method: AnyMethod | Path) -> float:
        """Seconds to time the answers of a model: six times 50 queries.

        Args:
            method: as in :meth:`answers`.

        Returns:
            Seconds.
        """
        answers = self.answers(method)
        return 330 * answers.image + 6 * next(iter(answers.episode.values()))

    def fit(self, method: AnyMethod, images: int) -> float:
        """Seconds of a baseline's own work; meta-training has a cost of its own.

        Args:
            method: which.
            images: recovered images of all models.

        Returns:
            Seconds.
        """
        if isinstance(method, TGR):
            return 0.0
        if isinstance(method, MetaTraining) and recovery_of(method) is None:
            return cast(float, self._once("fit", method, lambda: self._time_fit(method)))
        answers, models = self.answers(method), len(self.entries)
        if not isinstance(method, Untrained | BestSingle | MeanSingle | EnsembleAll | Average):
            return images * models * self._image  # a newcomer: all models look at all images
        moments = method.bank_images * answers.image * (method.standardise or isinstance(method, Untrained | Average))
        chosen_on = images if self.job.validation is None else len(self.job.validation)
        choice = chosen_on * answers.image + CHOICE * answers.choice
        if isinstance(method, BestSingle | Average):
            candidates = models if isinstance(method, BestSingle) else len(set(self._kinds.values()))
            return candidates * (moments + choice)
        if not isinstance(method, EnsembleAll):
            return moments
        kept = min(method.size or models, models)
        if kept < models or method.whiten:
            moments += images * models * self._image
        if kept < models:  # greedy selection: 100 episodes with each model that is left
            moments += sum(models - done for done in range(kept)) * 100 * answers.choice
        return moments + (self._whitening(images) if method.whiten else 0.0)

    def _once(self, what: str, of: Settings | Path, measure: Callable[[], object]) -> object:
        # What a method was recovered from changes nothing but the number of its images.
        name = str(of) if isinstance(of, Path) else digest_of(of.model_dump(mode="json", exclude={"recovery"}))
        if (known := f"{what} {name}") not in self._known:
            self._known[known] = measure()
        return self._known[known]

    @cached_property
    def _units(self) -> dict[str, dict[str, float]]:
        methods, store = self.job.methods.values(), self.job.store
        found = [recovery for method in methods if (recovery := recovery_of(method)) is not None]
        recoveries = list({recovery.digest(): recovery for recovery in found}.values())
        probes = list({method.probe.digest(): method.probe for method in methods if isinstance(method, TGR)}.values())
        firsts = list({kind: id for id, kind in reversed(self._kinds.items())}.values())
        asked = (self.job.pool, firsts, recoveries, probes, store.unit_threads)
        workers = min(store.jobs, len(self.entries))
        times = joblib.Parallel(n_jobs=workers)(joblib.delayed(time_units)(*asked) for _ in range(workers))
        return {
            self._kinds[id]: {name: fmean(one[id][name] for one in times) for name in times[0][id]} for id in firsts
        }

    @cached_property
    def _models(self) -> list[Any]:
        return list(self.job.pool)

    @cached_property
    def _image(self) -> float:
        """Seconds in which one model of the pool, their mean, encodes one image."""
        return self._encoding(self._ensemble(self._models)) / len(self._models)

    def _ensemble(self, models: list[Any], **options: Any) -> Ensemble:
        sizes = [int(self.unit(model.id, "features")) for model in models]
        return Ensemble(models, [(torch.zeros(size), torch.ones(size)) for size in sizes], **options)

    def _encoding(self, model: FewShotModel) -> float:
        images = to_float(noise(64 if isinstance(model, Ensemble) and len(model.models) > 4 else 256, self.input))
        model.encode(images[:32])
        return seconds_of(lambda: model.encode(images)) / len(images)

    def _whitening(self, images: int) -> float:
        width = int(sum(self.unit(id, "features") for id in self.entries))
        half = torch.randn(max(1, images // 2), max(1, width // 2))  # half the width takes an eighth of the time
        return 8 * seconds_of(lambda: whitening(half, 0.5))

    def _stand_in(self, method: AnyMethod | Path) -> FewShotModel:
        """A model that answers in the time in which that of the method will."""
        if isinstance(method, Path):
            return load_model(method)
        if isinstance(method, MetaTraining | Untrained):
            trained = method if isinstance(method, MetaTraining) else None
            way, learner = (trained.way, trained.learner) if trained else (5, ProtoNet(normalise=True))
            whiten = method.whiten if isinstance(method, TGR) else 0.0
            images = noise(CALIBRATION_IMAGES, self.input)
            student = Student(method.width, way, learner, self.input, images, 0, whiten)
            return student.model({name: value.detach() for name, value in student.initial().items()})
        if isinstance(method, MeanSingle):
            return self._ensemble(self._models, average_over_models=True)
        models = self._models[: method.size or None] if isinstance(method, EnsembleAll) else self._models[:1]
        ensemble = self._ensemble(models)
        if isinstance(method, EnsembleAll) and method.whiten:
            width = sum(len(mean) for mean, _ in ensemble.moments)
            ensemble.projection = torch.eye(width, min(width, method.dimensions))
        return ensemble

    def _time_answers(self, method: AnyMethod | Path) -> Answers:
        model, drawn, checked = self._stand_in(method), self.job.episodes, self.job.validation
        pooled = isinstance(model, Ensemble) and not isinstance(method, Path)
        image = self._image * len(model.models) if isinstance(model, Ensemble) and pooled else self._encoding(model)
        encoded = model.encode(to_float(noise(32, self.input)))
        episode = {shot: episode_seconds(model, encoded, self.job.images, part) for shot, part in drawn.items()}
        choice = min(episode.values())
        if checked is not None:
            few = sample_episodes(checked, min(5, checked.fewest_classes), 1, 5, 24, 0)
            choice = episode_seconds(model, encoded, checked, few)
        times = len(model.models) if isinstance(method, MeanSingle) and isinstance(model, Ensemble) else 1
        return Answers(image, episode, choice, model.parameter_count * times)

    def _time_fit(self, method: Any) -> float:
        """Seconds of a method that makes its images while it trains: by one step and by six, on the pool itself."""

        def fit(steps: int) -> None:
            short = method.model_copy(update={"steps": steps, "check_every": steps})
            with tempfile.TemporaryDirectory() as folder:
                short.fit(self.job.pool, Store(Path(folder), threads=self.job.store.threads), 0)

        first, more = (seconds_of(partial(fit, steps)) for steps in (1, 6))
        return first + int(method.steps - 1) * max(more - first, 0.0) / 5

    def _time_training(self, method: TGR) -> Training:
        """Three steps of every phase, the first to warm up."""
        answers, once, step = self.answers(method), 0.0, dict[int, float]()
        for blocks in method.phases():
            short = method.model_copy(update={"steps": 3, "check_every": 3, "freeze": (0.0,) * blocks})
            whole, ticks = self._train(short)
            step[blocks] = min(later - sooner for sooner, later in pairwise(ticks))
            once = max(once, whole - 3 * step[blocks])
        check = 0.0
        if self.job.validation is not None:
            encoded = len(self.job.validation) + (2 if method.whiten else 1) * CALIBRATION_IMAGES
            check = encoded * answers.image + CHOICE * answers.choice
        return Training(once, step, answers.image, check)

    def _train(self, method: TGR) -> tuple[float, list[float]]:
        """Seconds of a training on made-up images, and when each of its steps ended."""
        ids, ticks = self.job.pool.ids, list[float]()
        features = {id: int(self.unit(id, "features")) for id in ids}
        parts = max(1, min(method.groups, len(ids) // method.teachers))
        groups = [part.tolist() for part in np.array_split(np.array(ids), parts)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bank = made_up_bank(self.entries.values(), method.recovery.per_class, folder)
            views = made_up_views(features, self.input) if method.relational else None
            clock = Store(folder, threads=self.job.store.threads, progress=lambda *_: ticks.append(time.perf_counter()))
            whole = seconds_of(lambda: method.train(bank, groups, views, self.input, clock, 0, None, {}, folder))
        return whole, ticks
