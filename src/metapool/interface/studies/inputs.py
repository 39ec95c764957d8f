"""Images to train on in place of recovered ones: noise, drawn strokes, and real images for comparison."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metapool.bank import RecoveredTask, TaskBank, fit_bytes
from metapool.base.errors import MetapoolError
from metapool.base.functional import in_chunks
from metapool.base.images import InputSpec, LabelledImages, to_bytes, to_float
from metapool.base.store import Store, generator_for
from metapool.interface.recipe import untrained_generator
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import AnyRecovery, recover_pool

VERSION = 1

Kind = Literal["noise", "untrained generators", "drawn strokes", "recovered", "real images"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""From the least that is known of the data to the most."""

_TIMES = 4  # a drawing is made so much larger, and then averaged down


def bank_of(kind: Kind, pool: ModelPool, recovery: AnyRecovery, real: LabelledImages | None, store: Store) -> TaskBank:
    """A bank of one kind of images, as many of every class as a recovery gives.

    Args:
        kind: of images.
        pool: the models.
        recovery: that of the recovered images; its number of images and its seed are those of all kinds.
        real: images of all classes of the pool, for ``real images``.
        store: keeps the bank.

    Returns:
        A task of every model.

    Raises:
        MetapoolError: when real images of a class of the pool are missing.
    """
    if kind in {"recovered", "untrained generators"}:
        return recover_pool(pool, recovery if kind == "recovered" else untrained_generator(recovery), store)
    if kind == "real images":
        missing = {name for entry in pool.manifest.models for name in entry.classes} - set(real.classes if real else ())
        if missing:
            raise MetapoolError(f"real images: the data has no class {min(missing)!r}, which a model of the pool knows")
    shared = {"per_class": recovery.per_class, "seed": recovery.seed, "kind": kind, "version": VERSION}
    data = real.digest() if real is not None and kind == "real images" else None
    keys = {id: {**shared, "model": pool.model_digest(id), "id": id, "data": data} for id in pool.ids}
    return TaskBank(store.units("inputs", keys, partial(_write_task, kind, pool, recovery, real)))


def _write_task(
    kind: Kind, pool: ModelPool, recovery: AnyRecovery, real: LabelledImages | None, id: str, folder: Path
) -> None:
    model, generator = pool.get(id), generator_for(recovery.seed, "inputs", kind, id)
    labels = torch.arange(len(model.classes)).repeat_interleave(recovery.per_class)
    if kind == "real images":
        assert real is not None
        images = real_images(model, real, recovery.per_class, generator)
    else:
        make: dict[str, Callable[[int, InputSpec, torch.Generator], Tensor]]
        make = {"noise": noise, "drawn strokes": strokes}
        images = make[kind](len(labels), model.input, generator)
    logits = in_chunks(model, to_float(images), 128)
    RecoveredTask(images, labels, logits, model.classes, {}).save(folder)


def noise(count: int, input: InputSpec, generator: torch.Generator) -> Tensor:
    """Images that show nothing: independent pixels, uniform.

    Args:
        count: N.
        input: size and channels.
        generator: of the pixels.

    Returns:
        uint8 [N, C, H, W].
    """
    return torch.randint(256, (count, *input.shape), generator=generator).byte()


def strokes(count: int, input: InputSpec, generator: torch.Generator) -> Tensor:
    """Dark lines, arcs and outlines on white, one to four of random place, size and thickness in an image.

    What they know of the data is that it is drawn with dark strokes on a light ground; no image was looked at.

    Args:
        count: N.
        input: size and channels.
        generator: of everything random.

    Returns:
        uint8 [N, C, H, W]; grey, also in three channels.
    """
    drawn = torch.stack([_drawing(input.height, input.width, generator) for _ in range(count)])
    return fit_bytes(to_bytes(drawn), input)


def _drawing(height: int, width: int, generator: torch.Generator) -> Tensor:
    """One image, float [1, H, W]."""
    canvas = Image.new("L", (width * _TIMES, height * _TIMES), 255)
    pen = ImageDraw.Draw(canvas)
    size = min(canvas.size)
    for _ in range(int(torch.randint(1, 5, (), generator=generator))):
        figure = int(torch.randint(5, (), generator=generator))
        thick = max(1, round(size * (0.04 + 0.08 * float(torch.rand((), generator=generator)))))
        x, y = torch.rand(2, 4, generator=generator).mul(0.9).add(0.05).tolist()
        points = [(a * canvas.width, b * canvas.height) for a, b in zip(x, y)]
        (left, top), (right, bottom) = (tuple(map(pick, zip(*points[:2]))) for pick in (min, max))
        box = (left, top, max(right, left + 2 * thick), max(bottom, top + 2 * thick))
        if figure == 0:
            pen.line(points[:2], fill=0, width=thick)
        elif figure == 1:
            pen.line(points, fill=0, width=thick, joint="curve")
        elif figure == 2:
            pen.ellipse(box, outline=0, width=thick)
        elif figure == 3:
            start = 360 * float(torch.rand((), generator=generator))
            pen.arc(box, start, start + 90 + 180 * float(torch.rand((), generator=generator)), fill=0, width=thick)
        else:
            pen.rectangle(
                box, outline=0, width=thick, fill=0 if float(torch.rand((), generator=generator)) < 0.3 else None
            )
    # A mean over the larger pixels: what a resampling filter gives differs between versions of the library.
    pixels = torch.from_numpy(np.array(canvas)).float().div(255)
    return pixels.view(1, height, _TIMES, width, _TIMES).mean((2, 4))


def real_images(model: PretrainedModel, real: LabelledImages, per_class: int, generator: torch.Generator) -> Tensor:
    """Real images of a model's classes: the one place of the studies of TGR where real data trains a meta-model.

    Args:
        model: whose classes.
        real: images of them, by name.
        per_class: of each class; a class that has fewer gives some of them twice.
        generator: of the draw.

    Returns:
        uint8 [N, C, H, W], class-major.
    """
    rows: list[Tensor] = []
    for name in model.classes:
        members = torch.where(real.labels == real.classes.index(name))[0]
        order = members[torch.randperm(len(members), generator=generator)]
        rows.append(order.repeat(-(-per_class // len(order)))[:per_class])
    return fit_bytes(real.images[torch.cat(rows)], model.input)
