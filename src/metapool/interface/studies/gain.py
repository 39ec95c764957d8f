r"""Accuracy gain: what a second model, more or less unlike the first one, adds to it (TGR, definition 3.1, figure 2).

:math:`\mathrm{AG} = \mathrm{Acc}(\text{basic} + \text{auxiliary}) - \mathrm{Acc}(\text{basic})`. As in the released
code (empirical.py), a step takes an episode of either bank and both losses count alike; what a pair is compared with
is the basic model's bank taken twice, so that it sees as many episodes. The released code draws all classes from ten,
which leaves one class set without overlap; here the classes that are not shared come from all that there are.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from metapool.bank import TaskBank, fit_bytes
from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.base.images import InputSpec, LabelledImages
from metapool.base.store import Store, generator_for, seed_for
from metapool.episodes import draw_episodes
from metapool.evaluate import Interval, Scores
from metapool.gradients import Batch, mean_gradient, task_gradients
from metapool.interface.figures.gains import gains
from metapool.interface.recipe import evaluation_images, training_images
from metapool.interface.studies.study import Findings, Study, tgr_recipe
from metapool.interface.studies.training import Wanted, trained_pool
from metapool.interface.studies.trials import Exam, Shape, draw_exam, in_words, rounded
from metapool.learners import MAML, AnyLearner, ProtoNet, episode_loss
from metapool.meta_model import MetaModel
from metapool.realdata.pretrain import PoolSettings
from metapool.recover import recover_pool
from metapool.student import Student
from metapool.training import Training

VERSION = 1
RESAMPLES = 1000
SHOTS = (1, 5)
LEARNERS: Mapping[str, tuple[AnyLearner, float]] = {
    "protonet": (ProtoNet(normalise=True, temperature=0.15), 5e-3),
    "maml": (MAML(), 1e-3),
}
"""By name, with the learning rate of Adam."""
_BASIC = "basic"


class GainStudy(Study):
    """Pairs of a basic model and an auxiliary one; whether what the second adds rises and falls with heterogeneity."""

    title: ClassVar[str] = "What does a second model add, by how unlike the first one it is?"
    source: ClassVar[str] = "TGR, definition 3.1 and figure 2"
    named: ClassVar[tuple[str, ...]] = ("model",)

    data: str = "icons"
    """Real images: a shipped domain, or a folder with ``train``, ``val`` and ``test`` (read as 32×32, grey)."""
    split: Literal["test", "val"] = "test"
    """Classes that are scored on. Nothing is chosen on them: the last weights of each training are kept."""
    way: int = pydantic.Field(default=5, ge=2)
    """Classes of a model, and of an episode."""
    sets: int = pydantic.Field(default=4, ge=2)
    """Auxiliary models of each overlap and of each architecture, each with classes of its own."""
    architectures: tuple[str, ...] = pydantic.Field(default=PoolSettings().architectures, min_length=1)
    """``name:width``. The first is that of the basic model and of all overlaps; the others are tried at one overlap."""
    architectures_overlap: int = pydantic.Field(default=5, ge=0)
    """Classes that models of the other architectures share with the basic one; with all of them shared, the
    architecture is all that differs."""
    epochs: int = pydantic.Field(default=15, ge=1)
    """Passes over the training images of each model."""
    per_class: int = pydantic.Field(default=24, ge=1)
    """Images recovered of every class; else as the main recipe does."""
    recovery_steps: int = pydantic.Field(default=30, ge=0)
    """Steps of recovery; half the main recipe's."""
    learner: Literal["protonet", "maml"] = "protonet"
    """How the meta-model answers. ``maml`` is the paper's, with second derivatives, and costs about twenty times as
    much: five times in training, and more in evaluation, where every episode adapts the network anew."""
    width: int = pydantic.Field(default=32, ge=1, le=512)
    """Of the meta-model, a Conv4."""
    steps: int = pydantic.Field(default=40, ge=1)
    """Steps of its training, each on an episode of either bank."""
    shot: int = pydantic.Field(default=5, ge=1)
    """Support images of a class in a training episode."""
    query: int = pydantic.Field(default=15, ge=1)
    """Query images of a class in an episode."""
    seeds: int = pydantic.Field(default=2, ge=1)
    """Trainings of each pair; its gain is their mean."""
    episodes: int = pydantic.Field(default=600, ge=2)
    """Episodes of evaluation, the same for all."""

    @pydantic.model_validator(mode="after")
    def _overlap_within_way(self) -> "GainStudy":
        if self.architectures_overlap > self.way:
            raise ValueError(f"architectures_overlap is at most way, {self.way}, not {self.architectures_overlap}")
        return self

    def sample(self) -> Self:
        """Two auxiliary models of every overlap, and no other architectures.

        Returns:
            The study, cut down.
        """
        return self.model_copy(update={"sets": min(2, self.sets), "architectures": self.architectures[:1]})

    def measure(self, store: Store) -> Findings:
        """Trains the models, recovers their banks, trains a meta-model on each pair, and scores.

        Args:
            store: keeps models, banks and scores.

        Returns:
            A row for each auxiliary model.

        Raises:
            MetapoolError: when the data has too few classes.
        """
        real = training_images(self.data, 32, 1)
        if len(real.classes) < 2 * self.way:
            raise MetapoolError(f"way: models that share no class need {2 * self.way} classes; {self.data} has "
                                f"{len(real.classes)}")  # fmt: skip
        models, about = self._models(len(real.classes))
        pool = trained_pool(real, models, PoolSettings(epochs=self.epochs), store, seed=0)
        _, method = tgr_recipe("main")
        recovery = method.recovery.model_copy(update={"per_class": self.per_class, "steps": self.recovery_steps})
        bank, input = recover_pool(pool, recovery, store), pool.input
        images = evaluation_images(self.data, self.split, input)
        exam = draw_exam(images, [(self.way, shot) for shot in SHOTS], self.query, self.episodes, 0)
        scores = self._scores(bank, input, exam, store)

        def gain(id: str, shape: Shape) -> float:
            return float(np.mean([_percent(scores[id, seed][shape]) - _percent(scores[_BASIC, seed][shape])
                                  for seed in range(self.seeds)]))  # fmt: skip

        accuracies = {entry.id: entry.accuracy for entry in pool.manifest.models}
        rows = []
        for id, (network, overlap, by) in about.items():
            shared: dict[str, Any] = {"model": id, "varies": by, "architecture": network, "overlap": overlap}
            shared["heterogeneity"] = round(1 - overlap / (2 * self.way - overlap), 4)
            found = {f"{shape[1]}-shot gain": round(gain(id, shape), 3) for shape in exam.episodes}
            rows.append({**shared, "own accuracy": accuracies[id], **found, "seeds": self.seeds})
        basic = {
            f"{shape[1]}-shot": float(np.mean([_percent(scores[_BASIC, seed][shape]) for seed in range(self.seeds)]))
            for shape in exam.episodes
        }
        by_overlap = [row for row in rows if row["varies"] == "overlap"]
        trends = {
            f"{shot}-shot": trend(
                [row["heterogeneity"] for row in by_overlap], [row[f"{shot}-shot gain"] for row in by_overlap]
            )
            for shot in SHOTS
        }
        summary = {
            "basic alone": {name: round(value, 3) for name, value in basic.items()},
            "trend": {name: {part: rounded(found) for part, found in parts.items()} for name, parts in trends.items()},
            **exam.key(),
        }
        sentences = [f"{name}: {said(parts)}" for name, parts in trends.items()]
        head = f"{len(by_overlap)} auxiliary models at {self.way + 1} overlaps, {self.seeds} trainings of each. "
        return Findings(rows, head + " ".join(sentences), summary)

    def _models(self, classes: int) -> tuple[dict[str, Wanted], dict[str, tuple[str, int, str]]]:
        """What to train; and, of auxiliary models, architecture, overlap, and which of the two varies."""
        first, *others = self.architectures
        order = torch.randperm(classes, generator=generator_for(0, "gain", "classes")).tolist()
        own, rest = order[: self.way], order[self.way :]
        models: dict[str, Wanted] = {_BASIC: (first, tuple(own))}
        about: dict[str, tuple[str, int, str]] = {}

        def add(id: str, network: str, overlap: int, number: int, varies: str) -> None:
            generator = generator_for(0, "gain", "overlap", str(overlap), str(number))
            shared = torch.randperm(len(own), generator=generator)[:overlap].tolist()
            new = torch.randperm(len(rest), generator=generator)[: self.way - overlap].tolist()
            models[id] = (network, (*(own[place] for place in shared), *(rest[place] for place in new)))
            about[id] = (network, overlap, varies)

        for overlap in range(self.way, -1, -1):
            for number in range(self.sets):
                add(f"overlap-{overlap}-{number}", first, overlap, number, "overlap")
        for network in others:
            for number in range(self.sets):
                name = network.replace(":", "-")
                add(f"{name}-{number}", network, self.architectures_overlap, number, "architecture")
        return models, about

    def _scores(
        self, bank: TaskBank, input: InputSpec, exam: Exam, store: Store
    ) -> dict[tuple[str, int], dict[Shape, Scores]]:
        """Of every pair and seed; the basic model's pair is itself."""
        exclude = {"data", "split", "sets", "architectures", "architectures_overlap", "epochs", "per_class"}
        own = self.model_dump(mode="json", exclude={*exclude, "recovery_steps", "seeds", "episodes"})
        shared = {**own, "input": input.model_dump(), **exam.key(), "version": VERSION}
        pairs = {f"{id}/{seed}": (id, seed) for seed in range(self.seeds) for id in bank}
        keys = {
            name: {**shared, "banks": [bank.folders[_BASIC].name, bank.folders[id].name], "seed": seed}
            for name, (id, seed) in pairs.items()
        }
        folders = store.units("pair", keys, partial(_train_unit, self, bank, input, exam, pairs))
        return {pairs[name]: exam.read(folder) for name, folder in folders.items()}

    def draw(self, findings: Findings) -> dict[str, str]:
        """Gain against overlap, and by architecture.

        Args:
            findings: what was measured.

        Returns:
            A figure for each number of shots.
        """
        drawn: dict[str, str] = {}
        for shot in SHOTS:
            overlaps: dict[str, list[float]] = {}
            architectures: dict[str, list[float]] = {}
            for row in findings.rows:
                value = float(str(row[f"{shot}-shot gain"]))
                if row["varies"] == "overlap":
                    overlaps.setdefault(str(row["overlap"]), []).append(value)
                if row["overlap"] == self.architectures_overlap:
                    architectures.setdefault(str(row["architecture"]).partition(":")[0], []).append(value)
            drawn[f"{shot}-shot"] = gains(
                {f"classes shared with the basic model of {self.way}": overlaps,
                 f"architecture, {self.architectures_overlap} classes shared": architectures},
                f"{shot}-shot accuracy gain, points",
            )  # fmt: skip
        return drawn


def train_pair(tasks: Sequence[LabelledImages], input: InputSpec, settings: GainStudy, seed: int) -> MetaModel:
    """A meta-model of two banks, each of whose episodes count alike.

    Args:
        tasks: the banks; the same one twice for a model alone.
        input: the meta-model's.
        settings: learner, width, episodes and steps.
        seed: of initial weights and episodes.

    Returns:
        The model with its last weights.
    """
    learner, rate = LEARNERS[settings.learner]
    student = Student(settings.width, settings.way, learner, input, torch.cat([task.images for task in tasks]), seed)
    training = Training(student.initial(), settings.steps, rate, 0.0)

    def loss(params: Params, episode: Batch) -> Tensor:
        return episode_loss(learner, student.network, params, episode[0], episode[1], settings.shot)

    for step in range(settings.steps):
        generator = generator_for(seed, "gain", "step", str(step))
        per_class = settings.shot + settings.query
        drawn = [draw_episodes(task, input, settings.way, per_class, 1, generator) for task in tasks]
        gradients, _ = task_gradients(loss, training.params, tuple(map(torch.cat, zip(*drawn))))
        training.descend(mean_gradient(gradients))
    return student.model(training.kept())


def _train_unit(
    settings: GainStudy, bank: TaskBank, input: InputSpec, exam: Exam, pairs: Mapping[str, tuple[str, int]], name: str,
    folder: Path,
) -> None:  # fmt: skip
    id, seed = pairs[name]
    found = [bank[_BASIC], bank[id]]
    tasks = [LabelledImages(fit_bytes(task.images, input), task.labels, task.classes) for task in found]
    exam.write(train_pair(tasks, input, settings, seed), folder)


def trend(heterogeneity: Sequence[float], gain: Sequence[float]) -> dict[str, Interval]:
    """How gains change with heterogeneity, with intervals over auxiliary models.

    Models of one heterogeneity are resampled among themselves (a stratified bootstrap), :data:`RESAMPLES` times.

    Args:
        heterogeneity: one for each auxiliary model, of three values or more.
        gain: in points.

    Returns:
        ``rank correlation`` (Spearman), and the mean gain of the values between the ends less that ``above the alike``
        and that ``above the unlike`` end.
    """
    values, gained = np.asarray(heterogeneity), np.asarray(gain, dtype=np.float64)
    strata = [np.flatnonzero(values == value) for value in np.unique(values)]
    random = np.random.default_rng(seed_for(0, "gain", "bootstrap"))
    draws = [_trend(values, gained, strata)]
    for _ in range(RESAMPLES):
        rows = [random.choice(stratum, len(stratum)) for stratum in strata]
        draws.append(_trend(values, gained, rows))
    low, high = np.percentile(np.array(draws[1:]), [2.5, 97.5], axis=0)
    names = ("rank correlation", "above the alike", "above the unlike")
    return {name: Interval(*map(float, ends)) for name, *ends in zip(names, draws[0], low, high)}


def _trend(
    values: NDArray[np.float64], gained: NDArray[np.float64], rows: Sequence[NDArray[np.int64]]
) -> tuple[float, float, float]:
    every = np.concatenate(rows)
    means = [float(gained[stratum].mean()) for stratum in rows]
    flat = len(np.unique(gained[every])) == 1
    correlation = 0.0 if flat else float(stats.spearmanr(values[every], gained[every]).statistic)
    middle = float(np.mean(means[1:-1]))
    return correlation, middle - means[0], middle - means[-1]


def said(parts: Mapping[str, Interval]) -> str:
    """The answer for one number of shots.

    Args:
        parts: of :func:`trend`.

    Returns:
        A sentence.
    """
    rank, alike, unlike = (parts[name] for name in ("rank correlation", "above the alike", "above the unlike"))
    if alike.low > 0 and unlike.low > 0:
        shape = "the gain rises with heterogeneity and then falls"
    elif rank.low > 0:
        shape = "the gain only rises with heterogeneity"
    elif rank.high < 0:
        shape = "the gain only falls with heterogeneity"
    else:
        shape = "the gain neither rises nor falls clearly with heterogeneity"
    return (
        f"{shape} (rank correlation {rank.mean:+.2f}, {rank.low:+.2f} to {rank.high:+.2f}; overlaps between the ends "
        f"against all classes shared {in_words(alike)} points, against none {in_words(unlike)})."
    )


def _percent(scores: Scores) -> float:
    return 100 * float(scores.accuracies.mean())
