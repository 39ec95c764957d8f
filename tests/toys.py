"""A solvable world in small: images of stripes, a pool trained on some kinds of them, settings of seconds."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from metapool.base.images import InputSpec, LabelledImages
from metapool.base.networks import NetworkSpec, build
from metapool.check import KINDS, NEW_KINDS, POOL_KINDS, SIDE, TRAINING, striped_pool, stripes
from metapool.embed import ProbeSettings
from metapool.learners import AnyLearner, ProtoNet
from metapool.meta_model import MetaModel
from metapool.recover import GeneratorRecovery
from metapool.views import ViewSettings

__all__ = ["KINDS", "NEW_KINDS", "POOL_KINDS", "SIDE", "TRAINING", "striped_pool", "stripes"]

RECOVERY = GeneratorRecovery(per_class=12, steps=30, code=16, width=8, shift=1, learning_rate=0.02)
HASTY = GeneratorRecovery(per_class=6, steps=2, code=8, width=4, shift=1)
"""Enough to make a bank of, not to recover anything."""
SMALL_TGR: dict[str, Any] = {
    "probe": ProbeSettings(width=4, steps=5, batch=16),
    "groups": 1,
    "teachers": 2,
    "width": 8,
    "way": 3,
    "steps": 30,
    "batch": 32,
    "check_every": 10,
    "learning_rate": 0.01,
    "replay": "relational",
    "replay_updates": 1,
    "replay_batch": 32,
    "views": ViewSettings(copies=1, blends=1),
}


def write_images(folder: Path, data: LabelledImages) -> Path:
    """``<class>/<number>.png``, as a user has them."""
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
        place = folder / data.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(0).numpy()).save(place / f"{number:03d}.png")
    return folder


def saved_model(folder: Path, learner: AnyLearner | None = None) -> Path:
    """An untrained model on disk, for what needs some model and not a good one."""
    spec = NetworkSpec(architecture="conv4", width=4, classes=5, channels=1, height=SIDE, image_width=SIDE)
    input = InputSpec(channels=1, height=SIDE, width=SIDE, mean=(0.5,), std=(0.3,))
    network = build(spec, torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    MetaModel(network, spec, learner or ProtoNet(normalise=True), input).save(folder)
    return folder


def world(root: Path, epochs: int, per_class: int) -> Path:
    """A pool and images of classes that it does not know.

    Args:
        root: an empty folder; gets ``pool`` and ``images/{val,test}/<class>/*.png``.
        epochs: of the pool's models.
        per_class: test images of a class.

    Returns:
        The folder.
    """
    striped_pool(root / "pool", TRAINING.model_copy(update={"epochs": epochs}))
    write_images(root / "images" / "test", stripes(NEW_KINDS, per_class, seed=5))
    write_images(root / "images" / "val", stripes(POOL_KINDS[:3], 6, seed=6))
    return root
