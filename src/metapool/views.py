"""Views: what pool models say of recovered images that are not their own, cached so that training runs no teacher.

The images looked at are those of one group of models: every recovered image and, since a student should see more than
its teachers gave, copies and blends of pairs. Recovered images fill their frame: batch-norm statistics, which are
pooled over all positions, say what strokes look like, not where they lie. Copies and blends are therefore shown at
several sizes on a plain background of the images' commonest colour (docs/lab-notes.md has what that gains). All are
rounded to uint8 first: features belong to the images that are stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pydantic
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metapool.bank import TaskBank, fit_bytes
from metapool.base.functional import half_precision, in_chunks
from metapool.base.images import InputSpec, Scales, commonest, place, to_bytes, to_float
from metapool.base.store import Settings, Store, generator_for
from metapool.pool import ModelPool, PretrainedModel

VERSION = 3


class ViewSettings(Settings):
    """Which images the models look at."""

    copies: int = pydantic.Field(default=2, ge=0)
    """Copies of every recovered image, scaled and moved, beside the image itself."""
    blends: int = pydantic.Field(default=2, ge=0)
    """Times the number of recovered images: blends of two images drawn at random."""
    shift: int = pydantic.Field(default=4, ge=0)
    """Largest shift of a copy or blend, in pixels."""
    scales: Scales = (0.4, 1.0)
    """Least and largest size of a copy or blend, relative to the image; smaller ones have a plain border."""
    most: int = pydantic.Field(default=20_000, ge=10)
    """Images that are looked at, at most, copies and blends included: in a large pool, a part of those recovered, drawn
    at random. Every model looks at all of them, so the cost grows with the number of models and not with its square."""
    seed: int = 0
    """Of copies, blends and the part that is drawn."""


@dataclass(frozen=True)
class Views:
    """What the models of one group say of the group's images.

    Attributes:
        images: uint8 [N, C, H, W], at the student's input size.
        owner: int64 [N]: position in the group of the model whose recovered image this is (or is a copy of).
        labels: int64 [N] in [0, K) of the owner; −1 for blends.
        features: by model id, float16 [N, D].
        logits: by model id, float16 [N, K].
    """

    images: Tensor
    owner: Tensor
    labels: Tensor
    features: dict[str, Tensor]
    logits: dict[str, Tensor]


def view_bank(
    pool: ModelPool,
    bank: TaskBank,
    groups: Sequence[Sequence[str]],
    input: InputSpec,
    settings: ViewSettings,
    store: Store,
) -> list[Views]:
    """Every model of a group looks at the images of all models of the group.

    Args:
        pool: the models.
        bank: their recovered tasks.
        groups: model ids of every group.
        input: the student's input: size and channels of the images.
        settings: which images.
        store: keeps images and views.

    Returns:
        The views of every group.
    """
    inputs: list[Path] = []
    keys: dict[str, dict[str, object]] = {}
    where: dict[str, tuple[str, Path]] = {}
    for index, group in enumerate(groups):
        key = images_key(bank, group, input, settings)
        build = partial(_write_images, bank, list(group), input, settings)
        inputs.append(store.artifact("view-images", key, build) / "images.safetensors")
        # A unit is a model in a group: it would be another view were the model in two groups.
        keys |= {f"{index}/{id}": view_key(key, pool, id) for id in group}
        where |= {f"{index}/{id}": (id, inputs[-1]) for id in group}
    folders = store.units("view", keys, partial(_view_unit, pool, where))
    found: list[Views] = []
    for index, group in enumerate(groups):
        stored = load_file(inputs[index])
        seen = {id: load_file(folders[f"{index}/{id}"] / "view.safetensors") for id in group}
        found.append(
            Views(
                stored["images"],
                stored["owner"],
                stored["labels"],
                {id: view["features"] for id, view in seen.items()},
                {id: view["logits"] for id, view in seen.items()},
            )
        )
    return found


def images_key(bank: TaskBank, group: Sequence[str], input: InputSpec, settings: ViewSettings) -> dict[str, object]:
    """What the images of a group depend on; the bank need not be recovered yet.

    Args:
        bank: recovered tasks.
        group: model ids.
        input: the student's input.
        settings: which images.

    Returns:
        A key of the store.
    """
    tasks = [[id, bank.folders[id].name] for id in group]
    return {"settings": settings.model_dump(), "input": input.model_dump(), "version": VERSION, "tasks": tasks}


def view_key(images: Mapping[str, object], pool: ModelPool, id: str) -> dict[str, object]:
    """What a model's view of a group's images depends on.

    Args:
        images: the images' key.
        pool: the models.
        id: of the model that looks.

    Returns:
        A key of the store.
    """
    return {**images, "model": pool.model_digest(id)}


def _write_images(bank: TaskBank, group: list[str], input: InputSpec, settings: ViewSettings, folder: Path) -> None:
    generator = generator_for(settings.seed, "views", *group)
    tasks = [bank[id] for id in group]
    images = torch.cat([fit_bytes(task.images, input) for task in tasks])
    labels = torch.cat([task.labels for task in tasks])
    owner = torch.cat([torch.full_like(task.labels, index) for index, task in enumerate(tasks)])
    originals = settings.most // (1 + settings.copies + settings.blends)
    if originals < len(images):
        kept = torch.randperm(len(images), generator=generator)[:originals].sort().values
        images, labels, owner = images[kept], labels[kept], owner[kept]
    floats, background = to_float(images), to_float(commonest(images))
    parts = [images]
    for _ in range(settings.copies):
        parts.append(to_bytes(place(floats, settings.scales, settings.shift, background, generator)))
    blends = settings.blends * len(images)
    if blends:
        first, second = torch.randint(len(images), (2, blends), generator=generator)
        share = torch.rand(blends, 1, 1, 1, generator=generator)
        mixed = share * floats[first] + (1 - share) * floats[second]
        parts.append(to_bytes(place(mixed, settings.scales, settings.shift, background, generator)))
    times = 1 + settings.copies
    none = torch.full((blends,), -1)
    save_file(
        {
            "images": torch.cat(parts),
            "owner": torch.cat([owner.repeat(times), none]),
            "labels": torch.cat([labels.repeat(times), none]),
        },
        folder / "images.safetensors",
    )


def _view_unit(pool: ModelPool, where: dict[str, tuple[str, Path]], unit: str, folder: Path) -> None:
    id, path = where[unit]
    model = pool.get(id)
    images = load_file(path)["images"]
    features, logits = look(model, images)
    save_file({"features": features, "logits": logits}, folder / "view.safetensors")


def look(model: PretrainedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """What one model says of many images.

    Args:
        model: the model.
        images: uint8 [N, C, H, W].

    Returns:
        Features [N, D] and logits [N, K], float16.
    """

    def both(part: Tensor) -> Tensor:
        with half_precision():
            features, logits = model.features_and_logits(to_float(part))
        return torch.cat([features, logits], 1).half()

    seen = in_chunks(both, images, 128)
    split = seen.shape[1] - len(model.classes)
    return seen[:, :split].contiguous(), seen[:, split:].contiguous()
