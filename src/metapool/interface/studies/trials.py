"""Trials: many short trainings of TGR, each with its scores a unit of the store; and what several seeds say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from metapool.bank import TaskBank
from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages
from metapool.base.store import Store
from metapool.episodes import Episodes, sample_episodes
from metapool.evaluate import Interval, Scores, evaluate, mean_interval, paired_difference
from metapool.interface.recipe import Recipe, open_pool, scored_images, validation_images
from metapool.interface.run import fit_key
from metapool.interface.studies.study import Row, Study, tgr_recipe
from metapool.learners import FewShotModel
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.recover import recover_pool
from metapool.views import view_bank

VERSION = 1

Shape = tuple[int, int]
"""Way and shot of an episode."""


@dataclass(frozen=True)
class Exam:
    """Episodes that all trials of a study are scored on.

    Attributes:
        images: what the episodes index.
        episodes: by way and shot.
    """

    images: LabelledImages
    episodes: Mapping[Shape, Episodes]

    def key(self) -> dict[str, Any]:
        """What scores depend on besides the model.

        Returns:
            A part of a store's key.
        """
        drawn = {_named(shape): episodes.digest() for shape, episodes in self.episodes.items()}
        return {"images": self.images.digest(), "episodes": drawn}

    def write(self, model: FewShotModel, folder: Path) -> None:
        """Scores a model.

        Args:
            model: any.
            folder: gets a file of accuracies for each kind of episodes.
        """
        numbered = dict(enumerate(self.episodes.values()))
        for shape, scores in zip(self.episodes, evaluate(model, self.images, numbered).values()):
            np.save(folder / f"{_named(shape)}.npy", scores.accuracies)

    def read(self, folder: Path) -> dict[Shape, Scores]:
        """What :meth:`write` wrote.

        Args:
            folder: where.

        Returns:
            Scores by way and shot.
        """
        return {shape: Scores(np.load(folder / f"{_named(shape)}.npy", allow_pickle=False)) for shape in self.episodes}


def draw_exam(images: LabelledImages, shapes: Iterable[Shape], query: int, count: int, seed: int) -> Exam:
    """Draws the episodes of an exam.

    Args:
        images: of classes that no model knows.
        shapes: ways and shots.
        query: query images of a class.
        count: episodes of each shape.
        seed: of the draw.

    Returns:
        The exam.
    """
    return Exam(
        images,
        {(way, shot): sample_episodes(images, way, shot, query, count, seed) for way, shot in dict.fromkeys(shapes)},
    )


class TrialStudy(Study):
    """What studies of TGR's parts share: a recipe whose training is shortened, and several seeds of it."""

    recipe: str = "main"
    """A recipe of TGR, by name or file: its pool, its method and its episodes."""
    split: Literal["test", "val"] = "test"
    """Classes that are scored on. Nothing is chosen on them: the last weights of each training are kept."""
    seeds: int = pydantic.Field(default=5, ge=2)
    """Trainings of each kind, with the seeds 0, 1, …"""

    def opened(self) -> tuple[Recipe, TGR, ModelPool]:
        """The recipe, its method and its whole pool.

        Returns:
            All three.
        """
        recipe, method = tgr_recipe(self.recipe)
        return recipe, method, open_pool(recipe.pool)

    def exam(self, recipe: Recipe, pool: ModelPool, shapes: Iterable[Shape]) -> Exam:
        """Episodes of the recipe's data.

        Args:
            recipe: says where images come from, how many queries and episodes.
            pool: whose input says the size of images.
            shapes: ways and shots.

        Returns:
            The exam.

        Raises:
            MetapoolError: when there are no validation classes to score on.
        """
        asked = recipe.evaluation
        images = scored_images(asked, pool.input) if self.split == "test" else validation_images(asked, pool.input)
        if images is None:
            raise MetapoolError(f"split val: recipe {self.recipe} has no validation classes")
        return draw_exam(images, shapes, asked.query, asked.episodes, asked.seed)


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        pool: the models.
        method: with its settings.
        seed: of the training.
        inputs: images to train on in place of those that the method recovers; groups are still of the recovered ones.
    """

    pool: ModelPool
    method: TGR
    seed: int
    inputs: TaskBank | None = None

    def fit(self, store: Store) -> FewShotModel:
        """Trains.

        Args:
            store: keeps every stage.

        Returns:
            The model with its last weights.
        """
        if self.inputs is None:
            return self.method.fit(self.pool, store, self.seed)
        recovered = recover_pool(self.pool, self.method.recovery, store)
        groups = self.method.grouped(self.pool, recovered, store, self.seed)
        return self.method.fit_bank(self.pool, self.inputs, groups, store, self.seed)

    def prepare(self, store: Store) -> None:
        """Makes what workers of the store make, before :meth:`fit` uses it in a worker of its own.

        Args:
            store: keeps every stage.
        """
        self.method.prepare(self.pool, store, self.seed)
        if self.inputs is not None:
            input = self.pool.input
            view_bank(self.pool, self.inputs, [self.pool.ids], input, self.method.views, store)

    def stages(self) -> str:
        """What :meth:`prepare` makes.

        Returns:
            Equal for trials that share all of it.
        """
        inputs = None if self.inputs is None else self.inputs.digest()
        return repr((self.pool.digest(), self.method.recovery, self.method.probe, self.method.views, inputs))

    def key(self) -> dict[str, Any]:
        """What the trained model depends on.

        Returns:
            A part of a store's key.
        """
        inputs = None if self.inputs is None else self.inputs.digest()
        return {**fit_key(self.method, self.pool, self.seed, None), "inputs": inputs, "trial": VERSION}


def scores_of(trials: Mapping[str, Trial], exam: Exam, store: Store) -> dict[str, dict[Shape, Scores]]:
    """Trains and scores all trials side by side; those that were there already are only read.

    Args:
        trials: by a name that is theirs alone; equal trials are trained once.
        exam: what they are scored on.
        store: keeps stages and scores.

    Returns:
        Scores by the trial's name, then by way and shot.
    """
    about = exam.key()
    keys = {name: {**trial.key(), **about} for name, trial in trials.items()}
    folders = {name: store.folder("trial", key, unit=True) for name, key in keys.items()}
    first = {folder: name for name, folder in reversed(folders.items())}  # of equal trials, the first
    seen: set[str] = set()
    for name in [name for folder, name in first.items() if not folder.exists()]:
        if (stages := trials[name].stages()) not in seen:
            trials[name].prepare(store)
            seen.add(stages)
    build = partial(_fit_and_score, trials, exam, store.root, store.threads, store.unit_threads)
    store.units("trial", {name: keys[name] for name in first.values()}, build)
    return {name: exam.read(folder) for name, folder in folders.items()}


def _fit_and_score(
    trials: Mapping[str, Trial], exam: Exam, root: Path, threads: int, unit_threads: int, name: str, folder: Path
) -> None:
    exam.write(trials[name].fit(Store(root, threads=threads, unit_threads=unit_threads)), folder)


def over_seeds(runs: Sequence[Scores]) -> Interval:
    """Accuracy with the interval that says what another seed might give.

    Args:
        runs: one for each seed, on the same episodes.

    Returns:
        Mean and 95 % interval over seeds, by Student's t.
    """
    return mean_interval(np.array([100 * run.accuracies.mean() for run in runs]))


def gap_over_seeds(first: Sequence[Scores], second: Sequence[Scores]) -> Interval:
    """Mean difference ``first - second``, seed by seed: what another seed might give.

    Args:
        first: one for each seed.
        second: of the same seeds, on the same episodes.

    Returns:
        Points and their 95 % interval over seeds, by Student's t.
    """
    return mean_interval(np.array([100 * (a.accuracies.mean() - b.accuracies.mean()) for a, b in zip(first, second)]))


def gap_over_episodes(first: Sequence[Scores], second: Sequence[Scores]) -> Interval:
    """Mean difference ``first - second``, episode by episode: what other episodes might give, with these seeds.

    Args:
        first: one for each seed.
        second: of the same seeds, on the same episodes.

    Returns:
        Points and their 95 % interval over episodes, each of which is averaged over the seeds.
    """
    one, two = (Scores(np.mean([run.accuracies for run in runs], axis=0)) for runs in (first, second))
    return paired_difference(one, two)


def in_words(gap: Interval) -> str:
    """A difference as it stands in a sentence.

    Args:
        gap: in points.

    Returns:
        For example ``+1.2 (-0.3 to +2.7)``.
    """
    return f"{gap.mean:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})"


def rounded(interval: Interval, prefix: str = "") -> dict[str, float]:
    """An interval as columns of a table.

    Args:
        interval: any.
        prefix: of the columns ``low`` and ``high``; alone, the mean's.

    Returns:
        Three numbers.
    """
    mean = prefix or "mean"
    low, high = (f"{prefix} {end}".strip() for end in ("low", "high"))
    return {mean: round(interval.mean, 3), low: round(interval.low, 3), high: round(interval.high, 3)}


def interval_of(row: Row, prefix: str = "") -> Interval:
    """What :func:`rounded` made columns of.

    Args:
        row: of a table.
        prefix: as given there.

    Returns:
        The interval.
    """
    return Interval(*(float(str(row[name])) for name in rounded(Interval(0.0, 0.0, 0.0), prefix)))


def _named(shape: Shape) -> str:
    return f"{shape[0]}-way-{shape[1]}-shot"
