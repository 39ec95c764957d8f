"""A solvable world in small: images of stripes, a pool trained on some kinds of them, settings of seconds."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from metapool.base.images import InputSpec, LabelledImages
from metapool.base.networks import NetworkSpec, build
from metapool.blackbox import ZeroOrderRecovery
from metapool.check import KINDS, NEW_KINDS, POOL_KINDS, SIDE, TRAINING, striped_pool, stripes
from metapool.embed import ProbeSettings
from metapool.interface.recipe import Evaluation, Recipe, recipe_text
from metapool.learners import AnyLearner, ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.baselines import Average, BestSingle, EnsembleAll, MeanSingle, Untrained
from metapool.methods.bidf_mkd import BiDfMKD
from metapool.methods.dro import DRO
from metapool.methods.free import FREE
from metapool.methods.ota import OTA
from metapool.methods.purer import PURER
from metapool.methods.teapot import Teapot
from metapool.methods.tgr import TGR
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

SMALL_VISIT = GeneratorRecovery(per_class=8, steps=5, code=16, width=8, shift=1, learning_rate=0.02)
_SMALL = {"width": 8, "way": 3, "learning_rate": 0.01}
SMALL: dict[type, dict[str, Any]] = {
    TGR: SMALL_TGR,
    FREE: {**_SMALL, "visit": SMALL_VISIT, "teachers": 3, "steps": 12, "check_every": 5, "replay_updates": 1},
    PURER: {
        **_SMALL,
        **{"query": 2, "per_class": 4, "teachers": 2, "episodes": 2, "curriculum_start": 5, "patience": 1},
        **{"steps": 12, "check_every": 5},
    },
    BiDfMKD: {
        **_SMALL,
        **{"steps": 12, "check_every": 5, "visit_every": 3, "query": 3, "replay_updates": 2, "replay_tasks": 2},
        "zero_order": ZeroOrderRecovery(steps=10, directions=5, code=16, width=8, shift=1),
    },
    Teapot: {**_SMALL, "query": 2, "steps": 12, "check_every": 5, "teachers": 2, "memory_tasks": 2, "shift": 1},
    OTA: {"bank_images": 50},
    DRO: {"bank_images": 50, "dimension": 4, "hidden": 8, "gamma": 1.0, "steps": 7, "check_every": 2},
    Untrained: {"bank_images": 50, "width": 8},
    **{kind: {"bank_images": 50} for kind in (Average, BestSingle, EnsembleAll, MeanSingle)},
}
"""Settings of seconds for every method, with which it solves the striped world."""


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


def study_recipe(root: Path) -> Path:
    """A recipe of seconds for studies of TGR's parts, with a pool and images of all three splits.

    Args:
        root: an empty folder.

    Returns:
        The file.
    """
    write_images(world(root, 2, 20) / "images" / "train", stripes(POOL_KINDS, 12))
    recipe = Recipe(
        pool=str(root / "pool"),
        method=TGR(recovery=HASTY, **SMALL_TGR),
        evaluation=Evaluation(data=str(root / "images"), way=3, shots=(1, 2), query=5, episodes=30),
    )
    file = root / "recipe.yaml"
    file.write_text(recipe_text(recipe))
    return file
