"""What each quantity does to accuracy: one at a time is changed around the main recipe, shortened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import pydantic
import torch

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages
from metapool.base.store import Store, generator_for
from metapool.evaluate import Interval, Scores
from metapool.interface.figures.effects import Level, effects
from metapool.interface.recipe import Recipe, meta_train_images, open_pool
from metapool.interface.studies.study import Findings
from metapool.interface.studies.training import Wanted, trained_pool
from metapool.interface.studies.trials import (
    Shape,
    Trial,
    TrialStudy,
    gap_over_seeds,
    in_words,
    interval_of,
    over_seeds,
    rounded,
    scores_of,
)
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.realdata.pretrain import PoolSettings

Factor = Literal["models", "groups", "teachers", "alpha", "images", "names", "classes", "way", "shot"]
FACTORS: tuple[Factor, ...] = get_args(Factor)
AXES: Mapping[Factor, str] = {
    "models": "models of the pool",
    "groups": "groups",
    "teachers": "models of a step",
    "alpha": "α",
    "images": "recovered images of a class",
    "names": "bonus of equal class names",
    "classes": "classes of a model",
    "way": "classes of an episode",
    "shot": "support images of a class",
}
"""What the horizontal axis of each factor shows."""
_OF_POOL = frozenset({"models", "groups"})
"""Factors for which a larger pool may be given."""

Counts = Annotated[tuple[Annotated[int, pydantic.Field(ge=1)], ...], pydantic.Field(min_length=2)]


class EffectsStudy(TrialStudy):
    """One-at-a-time sweeps; values of one factor share seeds and, but for way and shot, episodes."""

    title: ClassVar[str] = "What does each quantity do: models, groups, teachers, α, images, names, classes, way, shot?"
    source: ClassVar[str] = "TGR, its ablations and settings"
    named: ClassVar[tuple[str, ...]] = ("factor", "value", "way", "shot")

    factors: tuple[Factor, ...] = pydantic.Field(default=FACTORS, min_length=1)
    """Which factors."""
    seeds: int = pydantic.Field(default=3, ge=2)
    """Trainings of each value, with the seeds 0, 1, …"""
    steps: int = pydantic.Field(default=8, ge=1)
    """Steps of each training, each with the recipe's replay."""
    pool: str | None = None
    """A larger pool, by name or folder, for models and groups; else the recipe's, as for all other factors."""
    pool_images: int | None = pydantic.Field(default=None, ge=1)
    """Images recovered of a class of that pool, since every model answers to all of them; else as in the recipe."""
    models: Counts = (1, 5, 10, 30)
    """Models of the pool, from its start."""
    groups: Counts = (1, 3, 5, 7)
    """Groups. 30 models, of which a step takes 4, make 7 groups at most; a larger pool makes more."""
    teachers: Counts = (1, 2, 4, 8)
    """Models of a step; more of them leave fewer groups, since no group may be smaller."""
    alpha: tuple[pydantic.NonNegativeFloat, ...] = pydantic.Field(default=(0.0, 1e-3, 2e-3, 1e-2), min_length=2)
    """Displacements. Twice the paper's is what its released code comes to, whose displacement keeps its graph."""
    images: Counts = (6, 12, 24)
    """Images recovered of a class."""
    names: tuple[pydantic.NonNegativeFloat, ...] = pydantic.Field(default=(0.0, 0.05), min_length=2)
    """Bonuses of equal class names; with 0, whether models share a class is not known."""
    classes: tuple[Annotated[int, pydantic.Field(ge=2)], ...] = pydantic.Field(default=(3, 5, 10, 20), min_length=2)
    """Numbers of classes that the models of a mixed pool have in turn; it is compared with one where all have as many
    as the recipe's episodes. Both are trained for this study, on real images."""
    classes_models: int = pydantic.Field(default=8, ge=2)
    """Models of the mixed pool, and of the one that it is compared with."""
    classes_epochs: int = pydantic.Field(default=20, ge=1)
    """Passes over the training images of a model of these pools."""
    way: tuple[Annotated[int, pydantic.Field(ge=2)], ...] = pydantic.Field(default=(2, 5, 10, 20), min_length=2)
    """Classes of an episode of evaluation."""
    shot: Counts = (1, 5, 10)
    """Support images of an episode of evaluation."""

    def sample(self) -> Self:
        """One factor: if it is there, one that needs no pool and no bank of its own.

        Returns:
            The study, cut down.
        """
        cheap: tuple[Factor, ...] = ("shot",) if "shot" in self.factors else self.factors[:1]
        return self.model_copy(update={"factors": cheap})

    def measure(self, store: Store) -> Findings:
        """Trains and scores all values with all seeds.

        Args:
            store: keeps pools, banks, views, models and scores.

        Returns:
            A row for each value and number of shots.
        """
        recipe, method, pool = self.opened()
        base = method.model_copy(update={"steps": self.steps, "check_every": self.steps})
        larger = self._larger(pool, base)
        asked = {
            factor: self._levels(factor, recipe, *(larger if factor in _OF_POOL else (pool, base)), store)
            for factor in self.factors
        }
        shapes = {shape: None for levels in asked.values() for level in levels for shape in level.shapes}
        exam = self.exam(recipe, pool, shapes)
        trials = {
            f"{level.name}/{seed}": Trial(level.pool, level.method, seed)
            for levels in asked.values()
            for level in levels
            for seed in range(self.seeds)
        }
        scores = scores_of(trials, exam, store)

        def runs(level: "_Level", shape: Shape) -> list[Scores]:
            return [scores[f"{level.name}/{seed}"][shape] for seed in range(self.seeds)]

        rows: list[dict[str, Any]] = []
        for factor, levels in asked.items():
            for level in levels:
                for way, shot in level.shapes:
                    found = over_seeds(own := runs(level, (way, shot)))
                    row: dict[str, Any] = {"factor": factor, "value": level.value, "way": way, "shot": shot}
                    spread = torch.tensor([100 * one.accuracies.mean() for one in own]).std().item()
                    rows.append({**row, **rounded(found), "spread": round(spread, 3), "seeds": self.seeds})
        gaps = {
            factor: (first, last, gap_over_seeds(runs(last, last.shapes[0]), runs(first, first.shapes[0])))
            for factor, (first, *_, last) in asked.items()
            if factor not in {"way", "shot"}
        }
        summary = {
            "episodes": exam.key()["episodes"],
            "first to last": {factor: rounded(gap) for factor, (_, _, gap) in gaps.items()},
        }
        return Findings(
            rows, _answer({f: (a.value, b.value, gap) for f, (a, b, gap) in gaps.items()}, self.seeds), summary
        )

    def _larger(self, pool: ModelPool, base: TGR) -> tuple[ModelPool, TGR]:
        """The pool for models and groups, and the method with its number of images."""
        if self.pool is None or not _OF_POOL & set(self.factors):
            return pool, base
        larger = open_pool(self.pool)
        if larger.input.shape != pool.input.shape:
            raise MetapoolError(
                f"pool {self.pool}: its images have shape {larger.input.shape}; "
                f"those of the recipe's pool, {pool.input.shape}, are scored on"
            )
        return larger, base if self.pool_images is None else _with_images(base, self.pool_images)

    def _levels(self, factor: Factor, recipe: Recipe, pool: ModelPool, base: TGR, store: Store) -> "Sequence[_Level]":
        """The values of one factor; the first and the last are compared in the answer."""
        way, shots = recipe.evaluation.way, recipe.evaluation.shots
        shapes = tuple((way, shot) for shot in shots)
        if factor == "models":
            if max(self.models) > len(pool):
                raise MetapoolError(f"models: the pool has {len(pool)}, not {max(self.models)}")
            return [_Level(f"models/{count}", str(count), pool[:count], base, shapes) for count in self.models]
        if factor == "way":
            return [_Level("way", str(own), pool, base, tuple((own, shot) for shot in shots)) for own in self.way]
        if factor == "shot":
            return [_Level("shot", str(shot), pool, base, ((way, shot),)) for shot in self.shot]
        if factor == "classes":
            pools = self._pools_of_classes(recipe, pool, store)
            return [_Level(f"classes/{value}", value, own, base, shapes) for value, own in pools.items()]
        changed: list[tuple[float, TGR]] = []
        for value in getattr(self, factor):
            own = _with_images(base, value) if factor == "images" else base.model_copy(update={factor: value})
            changed.append((value, own))
        return [_Level(f"{factor}/{value}", f"{value:g}", pool, own, shapes) for value, own in changed]

    def _pools_of_classes(self, recipe: Recipe, pool: ModelPool, store: Store) -> dict[str, ModelPool]:
        """Two pools that differ in the number of classes of their models."""
        input, asked = pool.input, recipe.evaluation
        real = meta_train_images(asked, input)
        if max(self.classes) > len(real.classes):
            raise MetapoolError(f"classes: the data has {len(real.classes)} to train on, not {max(self.classes)}")
        mixed = [self.classes[place % len(self.classes)] for place in range(self.classes_models)]
        settings = PoolSettings(epochs=self.classes_epochs)
        kinds = {str(asked.way): [asked.way] * len(mixed), ", ".join(map(str, self.classes)): mixed}
        return {
            value: trained_pool(real, _tasks(real, counts, settings.architectures[0]), settings, store, seed=0)
            for value, counts in kinds.items()
        }

    def draw(self, findings: Findings) -> dict[str, str]:
        """A panel for each factor.

        Args:
            findings: what was measured.

        Returns:
            One figure.
        """
        levels = [
            Level(
                factor=AXES[row["factor"]],  # type: ignore[index]
                value=str(row["value"]),
                series="" if row["factor"] == "shot" else f"{row['shot']}-shot",
                interval=interval_of(row),
            )
            for row in findings.rows
        ]
        return {"": effects(levels)}


@dataclass(frozen=True)
class _Level:
    """One value of a factor: a pool, a method and the episodes that it is scored on."""

    name: str
    value: str
    pool: ModelPool
    method: TGR
    shapes: tuple[Shape, ...]


def _with_images(method: TGR, count: int) -> TGR:
    return method.model_copy(update={"recovery": method.recovery.model_copy(update={"per_class": count})})


def _tasks(images: LabelledImages, counts: Sequence[int], network: str) -> dict[str, Wanted]:
    """Random classes, as many as wanted for each model; a model that has fewer than another has some of the other's."""
    wanted: dict[str, Wanted] = {}
    for place, count in enumerate(counts):
        drawn = torch.randperm(len(images.classes), generator=generator_for(0, "effects", "classes", str(place)))
        wanted[f"model-{place:03d}"] = (network, tuple(drawn[:count].tolist()))
    return wanted


def _answer(gaps: Mapping[str, tuple[str, str, Interval]], seeds: int) -> str:
    """Which factors matter from their first value to their last."""
    said = {factor: f"{factor} {first} to {last} {in_words(gap)}" for factor, (first, last, gap) in gaps.items()}
    clear = [text for factor, text in said.items() if not gaps[factor][2].low <= 0 <= gaps[factor][2].high]
    unclear = [text for factor, text in said.items() if text not in clear]
    parts = [f"Points of accuracy from the first value to the last (95 % interval over {seeds} seeds)"]
    if clear:
        parts.append(f"clearly not zero: {'; '.join(clear)}")
    if unclear:
        parts.append(f"not told from zero: {'; '.join(unclear)}")
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."
