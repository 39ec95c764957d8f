"""A recipe says what to run: pool, recovery, method, rivals, episodes. YAML, closed, never code."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic
import torch
import yaml

from metapool.bank import fit_bytes
from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec, LabelledImages, resize, to_bytes, to_float
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

    data: str | tuple[str, ...] = "icons"
    """A shipped domain or a published benchmark (meta-test classes), or a folder ``<class>/<images>``. Of several, each
    is a domain with episodes of its own, and the table has the mean over domains."""
    root: str | tuple[str, ...] | None = None
    """Folder of a published benchmark's files; of several data sets one for each, in their order (of one that needs
    none an empty text)."""
    validation: str | tuple[str, ...] | None = "same"
    """Where the meta-validation classes come from that checkpoints are chosen on. ``same``: those of ``data``, where it
    has any; null: none, and the last checkpoint is kept."""
    way: int = pydantic.Field(default=5, ge=2)
    """Classes of an episode."""
    shots: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = pydantic.Field(default=(1, 5), min_length=1)
    """Support images of a class; every number is scored."""
    query: int = pydantic.Field(default=15, ge=1)
    """Query images of a class."""
    episodes: int = pydantic.Field(default=600, ge=2)
    """Number of episodes, of every domain."""
    seed: int = 0
    """Of the draw of episodes; not changed by the run's seed, so that runs are paired."""

    @pydantic.field_validator("data", "validation")
    @classmethod
    def _some_and_each_once(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is not None and (not names_of(value) or len(set(names_of(value))) < len(names_of(value))):
            raise ValueError("name one data set, or several different ones")
        return value

    @pydantic.model_validator(mode="after")
    def _a_root_for_each(self) -> Self:
        if isinstance(self.root, tuple) and len(self.root) != len(names_of(self.data)):
            raise ValueError(f"root: {len(self.root)} folders for {len(names_of(self.data))} data sets; one for each")
        return self

    def root_of(self, name: str) -> str | None:
        """Where the files of a data set are.

        Args:
            name: of the data set; one of ``data``, or one that has no folder of its own.

        Returns:
            The folder, if one is given.
        """
        if isinstance(self.root, tuple):
            return dict(zip(names_of(self.data), self.root)).get(name) or None
        return self.root


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
        path: a YAML file, or the name of one that metapool ships (``main``, ``paper/cub``); none: the defaults, which
            are the main job.

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
        names = ", ".join(shipped_recipes())
        raise MetapoolError(f"{path}: no such recipe file, and none of the shipped ones ({names})")
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text()) or {})
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise MetapoolError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise MetapoolError(f"{file}: {field}: {first['msg']}") from error


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with metapool.

    Returns:
        Names, sorted; those in a folder with its name before a slash.
    """
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))


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


def scored_images(evaluation: Evaluation, input: InputSpec) -> LabelledImages:
    """Images of the classes that models are scored on.

    Args:
        evaluation: says where from.
        input: size and channels for the images of folders and CSV files, and for those of several domains.

    Returns:
        The images; several domains side by side.
    """
    return _images_of(evaluation, names_of(evaluation.data), "test", input)


def validation_images(evaluation: Evaluation, input: InputSpec) -> LabelledImages | None:
    """Images of meta-validation classes, if there are any.

    Args:
        evaluation: says where from.
        input: size and channels for the images of folders and CSV files, and for those of several domains.

    Returns:
        The images, or none; several domains side by side.
    """
    names = names_of(evaluation.validation)
    if names == ("same",):
        names = tuple(name for name in names_of(evaluation.data) if _has_splits(name))
    return _images_of(evaluation, names, "val", input) if names else None


def names_of(data: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Data sets as a field of a recipe names them: one, several or none.

    Args:
        data: the field's value.

    Returns:
        Their names.
    """
    return (data,) if isinstance(data, str) else data or ()


def _images_of(
    evaluation: Evaluation, names: tuple[str, ...], split: Literal["val", "test"], input: InputSpec
) -> LabelledImages:
    """Of one data set as it is; of several all as the meta-model sees them, since they stand in one tensor."""
    parts = {name: evaluation_images(name, split, input, evaluation.root_of(name)) for name in names}
    if len(parts) == 1:
        return parts[names[0]]
    fitting = {name: replace(part, images=fit_bytes(part.images, input)) for name, part in parts.items()}
    domains = tuple(name for name, part in parts.items() for _ in part.classes)
    return replace(_beside(fitting), domains=domains)


def _beside(parts: Mapping[str, LabelledImages]) -> LabelledImages:
    """Images of one shape with their classes side by side."""
    first = [0, *accumulate(len(part.classes) for part in parts.values())]
    return LabelledImages(
        torch.cat([part.images for part in parts.values()]),
        torch.cat([part.labels + start for part, start in zip(parts.values(), first)]),
        tuple(f"{name}/{label}" for name, part in parts.items() for label in part.classes),
    )


def _has_splits(data: str) -> bool:
    return data in (*datasets.SHIPPED, *datasets.BENCHMARKS) or (Path(data) / "val").is_dir()


def training_images(data: str, size: int | None, channels: int, root: str | None = None) -> LabelledImages:
    """Real images to train a pool from; no method ever sees them.

    Args:
        data: a shipped domain or a published benchmark (its meta-train classes), a folder or a CSV file.
        size: side of the images in pixels; none: that of the domain or benchmark, 32 for a folder or CSV file.
        channels: of the images of a folder or CSV file.
        root: folder of a published benchmark's files.

    Returns:
        The images.

    Raises:
        MetapoolError: when there are no such images, or a side is no number of pixels.
    """
    if size is not None and size < 1:
        raise MetapoolError(f"--size {size}: at least 1 pixel")
    named = data in (*datasets.SHIPPED, *datasets.BENCHMARKS)
    split = "train" if named or (Path(data) / "train").is_dir() else None
    side = size or 32
    images = datasets.load(data, split, root=root, channels=channels, height=side, width=side)
    if images.images.shape[-2:] == (side, side) or size is None:
        return images
    resized = [to_bytes(resize(to_float(part), size, size)) for part in images.images.split(1024)]
    return replace(images, images=torch.cat(resized))


def meta_train_images(evaluation: Evaluation, input: InputSpec) -> LabelledImages:
    """Real images of the meta-train classes beside those that models are scored on; for studies alone.

    Args:
        evaluation: says where from.
        input: size and channels for the images of a folder or CSV file.

    Returns:
        The images.

    Raises:
        MetapoolError: when there are several data sets.
    """
    names = names_of(evaluation.data)
    if len(names) > 1:
        raise MetapoolError(f"evaluation.data: a study that trains on real images takes one data set, not {len(names)}")
    return training_images(names[0], input.height, input.channels, evaluation.root_of(names[0]))


def backbone_images(data: str, given: str | None, size: int | None, channels: int) -> LabelledImages:
    """Real images that the backbone of adapters learns from.

    Args:
        data: what the models themselves learn from.
        given: named like it; the meta-train classes of the other shipped domains when not given.
        size: side of the given images, as in :func:`training_images`.
        channels: of the images of a folder or CSV file.

    Returns:
        The images, in colour where they come from several domains.
    """
    if given is not None:
        return training_images(given, size, channels)
    parts = {name: datasets.shipped(name, "train") for name in datasets.SHIPPED if name != data}
    return _beside({name: replace(part, images=part.images.expand(-1, 3, -1, -1)) for name, part in parts.items()})


def workers(jobs: int = 0) -> int:
    """Worker processes, as many as a command is told.

    Args:
        jobs: how many; 0 for as many as there are processor cores.

    Returns:
        At least 1.

    Raises:
        MetapoolError: when there are fewer than none.
    """
    if jobs < 0:
        raise MetapoolError(f"--jobs {jobs}: a number of worker processes, or 0 for as many as there are cores")
    return jobs or os.cpu_count() or 1
