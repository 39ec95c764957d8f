"""Classifiers of chosen classes and architectures, trained on real images for a study."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from metapool.base.images import LabelledImages
from metapool.base.store import Store
from metapool.pool import ModelPool
from metapool.realdata.pretrain import VERSION, PoolSettings, named_network, pretrain

Wanted = tuple[str, tuple[int, ...]]
"""Architecture, as ``name:width``, and labels of the classes that a model is to know."""


def trained_pool(
    images: LabelledImages, wanted: Mapping[str, Wanted], settings: PoolSettings, store: Store, seed: int
) -> ModelPool:
    """Trains models, each once, and makes a pool of them that lies in the store.

    Args:
        images: of all classes.
        wanted: by the models' ids.
        settings: how; way and architectures are those wanted.
        store: keeps the models and the pool.
        seed: of everything random; every model draws from a seed of its own name.

    Returns:
        The pool, in the order wanted.
    """
    shared = settings.model_dump(mode="json", exclude={"models", "way", "architectures", "backbone_epochs"})
    shared |= {"data": images.digest(), "seed": seed, "version": VERSION}
    keys = {id: {**shared, "id": id, "network": name, "classes": classes} for id, (name, classes) in wanted.items()}
    folders = store.units("trained", keys, partial(_train_unit, images, wanted, settings, seed))

    def gather(folder: Path) -> None:
        pool = ModelPool.create(folder, "study")
        for id, own in folders.items():
            pool.add(ModelPool.open(own).get(id), torch.float16)

    return ModelPool.open(store.artifact("trained-pool", {"models": [f.name for f in folders.values()]}, gather))


def _train_unit(
    images: LabelledImages, wanted: Mapping[str, Wanted], settings: PoolSettings, seed: int, id: str, folder: Path
) -> None:
    name, classes = wanted[id]
    known = images.select(sorted(classes))
    own = settings.model_copy(update={"way": len(classes)})
    model = pretrain(known, named_network(name, images, len(classes)), own, seed, id)
    ModelPool.create(folder, id).add(model, torch.float16)
