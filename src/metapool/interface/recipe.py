"""A recipe says what to run: pool, recovery, method, rivals, episodes. YAML, closed, never code."""

import os
import re
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
import yaml

from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec, LabelledImages
from metapool.base.store import Settings
from metapool.methods import NAMED, AnyMethod, recovery_of
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.realdata import datasets
from metapool.recover import AnyRecovery, GeneratorRecovery

SHIPPED = Path(__file__).parent.parent / "shipped"
RECIPES = Path(__file__).parent / "recipes"


class Evaluation(Settings):
    """On which episodes models are scored."""

    data: str = "icons"
    """A shipped domain or a published benchmark (meta-test classes), or a folder ``<class>/<images>``."""
    root: str | None = None
    """Folder of a published benchmark's files."""
    validation: str | None = "same"
    """Where the meta-validation classes come from that checkpoints are chosen on. ``same``: those of ``data``, where it
    has any; null: none, and the last checkpoint is kept."""
    way: int = pydantic.Field(default=5, ge=2)
    """Classes of an episode."""
    shots: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = pydantic.Field(default=(1, 5), min_length=1)
    """Support images of a class; every number is scored."""
    query: int = pydantic.Field(default=15, ge=1)
    """Query images of a class."""
    episodes: int = pydantic.Field(default=600, ge=2)
    """Number of episodes."""
    seed: int = 0
    """Of the draw of episodes; not changed by the run's seed, so that runs are paired."""


class Recipe(Settings):
    """All that a run depends on. YAML with these fields; flags are laid over it."""

    name: str = pydantic.Field(default="main", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder."""
    quick: bool = False
    """Marks the report as a quick look, whose numbers are not to be quoted."""
    pool: str = "icons-30"
    """A shipped pool's name or a pool's folder."""
    limit: int | None = pydantic.Field(default=None, ge=1)
    """Only so many models of the pool, from its start."""
    method: AnyMethod = TGR()
    """The method whose model is kept. Its recovery serves all methods of the run, so that they share one bank."""
    compare: tuple[str, ...] = ("untrained", "best-single", "mean-single", "average", "ensemble")
    """Rivals by name: of ``metapool.methods.NAMED``, ``ensemble-K``, ``input-control``, or of ``variants``."""
    variants: dict[str, AnyMethod] = pydantic.Field(default_factory=dict)
    """Methods with settings of their own, to be named in ``compare``."""
    references: dict[str, str] = pydantic.Field(default_factory=dict)
    """Saved models that join the table, by name; ``oracle`` stands for the shipped one where there is one."""
    evaluation: Evaluation = Evaluation()
    """Episodes."""
    seed: int = 0
    """Of meta-training. Recovery, probe, views and episodes have seeds of their own and are reused."""
    jobs: int = pydantic.Field(default=0, ge=0)
    """Worker processes; 0 takes as many as there are cores. Results never depend on it."""
    out: str = "runs"
    """Folder of runs."""
    store: str = "store"
    """Folder where finished stages are kept."""

    def methods(self) -> dict[str, AnyMethod]:
        """The method and its rivals, all with the method's recovery.

        Returns:
            Methods by the name they have in the table, the recipe's own first.

        Raises:
            MetapoolError: when a rival is not known, or has the name of another line of the table.
        """
        if self.method.name in self.compare:
            raise MetapoolError(
                f"compare: {self.method.name!r} is the recipe's own method; to compare it with itself under other "
                "settings, name these in variants"
            )
        for name in self.references:
            if name in (self.method.name, *self.compare):
                raise MetapoolError(f"references: {name!r} is the name of a method in the same table")
        found: dict[str, AnyMethod] = {self.method.name: self.method}
        for name in self.compare:
            found[name] = self._named(name)
        return found

    def _named(self, name: str) -> AnyMethod:
        if name in self.variants:
            return self._with_recovery(self.variants[name])
        if name in NAMED:
            return self._with_recovery(NAMED[name])
        if match := re.fullmatch(r"ensemble-([1-9]\d*)", name):
            return self._with_recovery(NAMED["ensemble"].model_copy(update={"size": int(match[1])}))
        if name == "input-control":
            # Images of an untrained generator: whatever the method still learns, it did not learn from recovery.
            real = recovery_of(self.method)
            if real is None:
                raise MetapoolError(f"compare: {self.method.name!r} recovers no bank for an input-control to replace")
            return self.method.model_copy(update={"recovery": untrained_generator(real)})
        known = ", ".join([*NAMED, "ensemble-K", "input-control", *self.variants])
        raise MetapoolError(f"compare: no method is named {name!r}; known are {known}")

    def _with_recovery(self, method: AnyMethod) -> AnyMethod:
        shared = recovery_of(self.method)
        if shared is None or recovery_of(method) is None:
            return method
        return method.model_copy(update={"recovery": shared})


def untrained_generator(recovery: AnyRecovery) -> GeneratorRecovery:
    """The input-control of a recovery: as many images, out of generators as they are before any step.

    Args:
        recovery: which is to earn its place.

    Returns:
        A recovery of no steps.
    """
    same = {"width": recovery.width, "code": recovery.code} if isinstance(recovery, GeneratorRecovery) else {}
    return GeneratorRecovery(per_class=recovery.per_class, seed=recovery.seed, steps=0, **same)


def load_recipe(path: str | None) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file, or the name of one that metapool ships; none: the defaults, which are the main job.

    Returns:
        The recipe.

    Raises:
        MetapoolError: when the file is missing, no YAML, or a field is unknown or wrong.
    """
    if path is None:
        path = "main"
    shipped = RECIPES / f"{path}.yaml"
    file = shipped if shipped.is_file() else Path(path)
    if not file.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise MetapoolError(f"{path}: no such recipe file, and none of the shipped ones ({names})")
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text()) or {})
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise MetapoolError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise MetapoolError(f"{file}: {field}: {first['msg']}") from error


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML that :func:`load_recipe` reads back.

    Args:
        recipe: the recipe.

    Returns:
        YAML with every field.
    """
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def open_pool(name: str) -> ModelPool:
    """A shipped pool by name, or any by its folder.

    Args:
        name: for example ``icons-30``, or a path.

    Returns:
        The pool.
    """
    shipped = SHIPPED / name
    return ModelPool.open(shipped if (shipped / "pool.json").is_file() else Path(name))


def evaluation_images(
    data: str, split: Literal["val", "test"], input: InputSpec, root: str | None = None
) -> LabelledImages:
    """Images of classes that no model of the pool was trained on.

    Args:
        data: a shipped domain, a published benchmark, a folder or a CSV file.
        split: which classes; a folder without a subfolder of that name, and a CSV file, are taken whole.
        input: size and channels for the images of a folder or CSV file.
        root: folder of a published benchmark's files.

    Returns:
        The images.
    """
    whole = data not in (*datasets.SHIPPED, *datasets.BENCHMARKS) and not (Path(data) / split).is_dir()
    size = {"channels": input.channels, "height": input.height, "width": input.width}
    return datasets.load(data, None if whole else split, root=root, **size)


def validation_images(evaluation: Evaluation, input: InputSpec) -> LabelledImages | None:
    """Images of meta-validation classes, if there are any.

    Args:
        evaluation: says where from.
        input: size and channels for the images of a folder or CSV file.

    Returns:
        The images, or none.
    """
    data = evaluation.validation
    if data == "same":
        data = evaluation.data if _has_splits(evaluation.data) else None
    return None if data is None else evaluation_images(data, "val", input, evaluation.root)


def _has_splits(data: str) -> bool:
    return data in (*datasets.SHIPPED, *datasets.BENCHMARKS) or (Path(data) / "val").is_dir()


def training_images(data: str, size: int, channels: int, root: str | None = None) -> LabelledImages:
    """Real images to train a pool from; no method ever sees them.

    Args:
        data: a shipped domain or a published benchmark (its meta-train classes), a folder or a CSV file.
        size: side of the images of a folder or CSV file.
        channels: of the images of a folder or CSV file.
        root: folder of a published benchmark's files.

    Returns:
        The images.
    """
    named = data in (*datasets.SHIPPED, *datasets.BENCHMARKS)
    split = "train" if named or (Path(data) / "train").is_dir() else None
    return datasets.load(data, split, root=root, channels=channels, height=size, width=size)


def backbone_images(data: str, given: str | None, size: int, channels: int) -> LabelledImages:
    """Real images that the backbone of adapters learns from.

    Args:
        data: what the models themselves learn from.
        given: named like it; the meta-train classes of the other shipped domains when not given.
        size: side of the images of a folder or CSV file.
        channels: of the images of a folder or CSV file.

    Returns:
        The images, in colour where they come from several domains.
    """
    if given is not None:
        return training_images(given, size, channels)
    parts = {name: datasets.shipped(name, "train") for name in datasets.SHIPPED if name != data}
    first = [0, *accumulate(len(part.classes) for part in parts.values())]
    return LabelledImages(
        torch.cat([part.images.expand(-1, 3, -1, -1) for part in parts.values()]),
        torch.cat([part.labels + start for part, start in zip(parts.values(), first)]),
        tuple(f"{name}/{label}" for name, part in parts.items() for label in part.classes),
    )


def cores() -> int:
    """Processor cores of this machine.

    Returns:
        At least 1.
    """
    return os.cpu_count() or 1
