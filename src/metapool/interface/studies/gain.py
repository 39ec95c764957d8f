r"""Accuracy gain: what a second model, more or less unlike the first one, adds to it (TGR, definition 3.1, figure 2).

:math:`\mathrm{AG} = \mathrm{Acc}(\text{basic} + \text{auxiliary}) - \mathrm{Acc}(\text{basic})`. As in the released
code (empirical.py), a step takes an episode of either bank and both losses count alike; what a pair is compared with
is the basic model's bank taken twice, so that it sees as many episodes. The released code draws all classes from ten,
which leaves one class set without overlap; here the classes that are not shared come from all that there are.

The same pairs are trained on real images of the models' classes too: what recovery loses cannot hide a trend there.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

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
from metapool.interface.figures import gains as figure
from metapool.interface.recipe import evaluation_images, training_images
from metapool.interface.studies.inputs import bank_of
from metapool.interface.studies.study import Findings, Study, tgr_recipe
from metapool.interface.studies.training import Wanted, trained_pool
from metapool.interface.studies.trials import Exam, Shape, draw_exam, in_words, rounded
from metapool.learners import MAML, AnyLearner, ProtoNet, episode_loss
from metapool.meta_model import MetaModel
from metapool.realdata.pretrain import PoolSettings
from metapool.student import Student
from metapool.training import Training

VERSION = 1
RESAMPLES = 1000
SHOTS = (1, 5)
COLUMNS = tuple(f"{shot}-shot gain" for shot in SHOTS)
LEARNERS: Mapping[str, tuple[AnyLearner, float]] = {
    "protonet": (ProtoNet(normalise=True, temperature=0.15), 5e-3),
    "maml": (MAML(), 1e-3),
}
"""By name, with the learning rate of Adam."""
_BASIC = "basic"

Inputs = Literal["recovered", "real images"]


class GainStudy(Study):
    """Pairs of a basic model and an auxiliary one; whether what the second adds rises and falls with heterogeneity."""

    title: ClassVar[str] = "What does a second model add, by how unlike the first one it is?"
    source: ClassVar[str] = "TGR, definition 3.1 and figure 2"
    named: ClassVar[tuple[str, ...]] = ("inputs", "model")

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
    inputs: tuple[Inputs, ...] = pydantic.Field(default=get_args(Inputs), min_length=1)
    """What meta-models are trained on. Real images know no architecture, so other architectures are not tried there."""
    per_class: int = pydantic.Field(default=24, ge=1)
    """Images of every class; else recovered as the main recipe does."""
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
        images = evaluation_images(self.data, self.split, pool.input)
        exam = draw_exam(images, [(self.way, shot) for shot in SHOTS], self.query, self.episodes, 0)
        accuracies = {entry.id: entry.accuracy for entry in pool.manifest.models}
        rows: list[dict[str, Any]] = []
        sentences: list[str] = []
        summary: dict[str, dict[str, Any]] = {"basic alone": {}, "trend": {}}
        for kind in self.inputs:
            tried = {id: found for id, found in about.items() if kind == "recovered" or found[2] == "overlap"}
            bank = bank_of(kind, pool, recovery, real, store)
            scores = self._scores(bank, [_BASIC, *tried], pool.input, exam, store)
            reached = {
                id: np.mean([[_percent(scores[id, seed][shape]) for shape in exam.episodes]
                             for seed in range(self.seeds)], axis=0)
                for id in (_BASIC, *tried)
            }  # fmt: skip
            own: list[dict[str, Any]] = []
            for id, (network, overlap, by) in tried.items():
                row: dict[str, Any] = {"inputs": kind, "model": id, "varies": by, "architecture": network}
                row |= {"overlap": overlap, "heterogeneity": round(1 - overlap / (2 * self.way - overlap), 4)}
                row |= {"own accuracy": accuracies[id]}
                gains = (reached[id] - reached[_BASIC]).round(3).tolist()
                own.append({**row, **dict(zip(COLUMNS, gains)), "seeds": self.seeds})
            rows += own
            summary["basic alone"][kind] = dict(zip(COLUMNS, reached[_BASIC].round(3).tolist()))
            varied = [row for row in own if row["varies"] == "overlap"]
            unlike = [row["heterogeneity"] for row in varied]
            summary["trend"][kind] = {}
            for column, shot in zip(COLUMNS, SHOTS):
                gained = [row[column] for row in varied]
                parts, share = trend(unlike, gained), explained(unlike, gained)
                found = {part: rounded(interval) for part, interval in parts.items()}
                summary["trend"][kind][column] = {**found, "explained": round(share, 3)}
                sentences.append(f"{kind.capitalize()}, {shot}-shot: {said(parts, share)}")
        models_tried = self.sets * (self.way + 1)
        head = f"{models_tried} auxiliary models at {self.way + 1} overlaps, {self.seeds} trainings of each. "
        return Findings(rows, head + " ".join(sentences), {**summary, **exam.key()})

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
        self, bank: TaskBank, ids: Sequence[str], input: InputSpec, exam: Exam, store: Store
    ) -> dict[tuple[str, int], dict[Shape, Scores]]:
        """Of every pair and seed; the basic model's pair is itself."""
        exclude = {"data", "split", "sets", "architectures", "architectures_overlap", "epochs", "inputs", "per_class"}
        own = self.model_dump(mode="json", exclude={*exclude, "recovery_steps", "seeds", "episodes"})
        shared = {**own, "input": input.model_dump(), **exam.key(), "version": VERSION}
        pairs = {f"{id}/{seed}": (id, seed) for seed in range(self.seeds) for id in ids}
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
            A figure for each kind of inputs and number of shots.
        """
        drawn: dict[str, str] = {}
        for kind in self.inputs:
            rows = [row for row in findings.rows if row["inputs"] == kind]
            for column, shot in zip(COLUMNS, SHOTS):
                overlaps: dict[str, list[float]] = {}
                architectures: dict[str, list[float]] = {}
                for row in rows:
                    value = float(str(row[column]))
                    if row["varies"] == "overlap":
                        overlaps.setdefault(str(row["overlap"]), []).append(value)
                    if row["overlap"] == self.architectures_overlap:
                        architectures.setdefault(str(row["architecture"]).partition(":")[0], []).append(value)
                panels = {f"classes shared with the basic model of {self.way}": overlaps}
                if len(architectures) > 1:
                    panels[f"architecture, {self.architectures_overlap} classes shared"] = architectures
                words = "recovered images" if kind == "recovered" else kind
                name = f"{words.replace(' ', '-')}-{shot}-shot"
                drawn[name] = figure.gains(panels, f"{shot}-shot accuracy gain, points; {words}")
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


def explained(heterogeneity: Sequence[float], gain: Sequence[float]) -> float:
    """Share of the gains' variance that heterogeneity explains, whatever the shape: adjusted η².

    One less the variance within values of heterogeneity over the variance of all, both unbiased, so that it is 0 in the
    mean where there is nothing to explain, and may be below.

    Args:
        heterogeneity: one for each auxiliary model.
        gain: in points.

    Returns:
        At most 1; 0 where all gains are equal.
    """
    values, gained = np.asarray(heterogeneity), np.asarray(gain, dtype=np.float64)
    strata = [gained[values == value] for value in np.unique(values)]
    within = sum(float(((stratum - stratum.mean()) ** 2).sum()) for stratum in strata) / (len(gained) - len(strata))
    every = float(gained.var(ddof=1))
    return 1 - within / every if every > 0 else 0.0


def said(parts: Mapping[str, Interval], share: float) -> str:
    """The answer for one number of shots.

    Args:
        parts: of :func:`trend`.
        share: of :func:`explained`.

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
        f"against all classes shared {in_words(alike)} points, against none {in_words(unlike)}; overlap explains "
        f"{100 * max(0.0, share):.0f} % of the variance between auxiliary models)."
    )


def _percent(scores: Scores) -> float:
    return 100 * float(scores.accuracies.mean())
