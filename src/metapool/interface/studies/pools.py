"""What studies of pools start from: pools side by side, their recovered tasks as one bank, and features of all models.

A pool stands for a domain. Images are those that the recipe's recovery gives, so a study of a pool that was run before
finds its bank in the store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from metapool.bank import TaskBank, fit_bytes
from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec
from metapool.base.store import Store, generator_for
from metapool.embed import minibatch_cka
from metapool.interface.recipe import open_pool
from metapool.interface.studies.study import Study, tgr_recipe
from metapool.methods.tgr import TGR
from metapool.pool import ModelEntry, ModelPool, PretrainedModel, common_input
from metapool.recover import recover_pool
from metapool.views import VERSION as VIEWS_VERSION
from metapool.views import look

VERSION = 1


@dataclass(frozen=True)
class Pools:
    """Several pools as one list of models.

    Attributes:
        parts: pools by the name of their domain.
    """

    parts: Mapping[str, ModelPool]

    @property
    def entries(self) -> dict[str, ModelEntry]:
        """What the pools say of their models; ids begin with the domain where there are several."""
        return {self._id(name, entry.id): entry for name, pool in self.parts.items() for entry in pool.manifest.models}

    @property
    def domains(self) -> list[str]:
        """The domain of every model."""
        return [name for name, pool in self.parts.items() for _ in pool.ids]

    @property
    def architectures(self) -> list[str]:
        """``name:width`` of every model."""
        return [f"{entry.network.architecture}:{entry.network.width}" for entry in self.entries.values()]

    @property
    def input(self) -> InputSpec:
        """What the images of all pools are brought to."""
        return common_input([entry.input for entry in self.entries.values()])

    @property
    def overlaps(self) -> NDArray[np.int64]:
        """Class names that two models share, [M, M]."""
        known = [set(entry.classes) for entry in self.entries.values()]
        return np.array([[len(one & other) for other in known] for one in known])

    def get(self, id: str) -> PretrainedModel:
        """Reads one model.

        Args:
            id: as in ``entries``.

        Returns:
            The model.
        """
        pool, own = self._find(id)
        return pool.get(own)

    def model_digest(self, id: str) -> str:
        """Hash of one model.

        Args:
            id: as in ``entries``.

        Returns:
            16 hexadecimal digits.
        """
        pool, own = self._find(id)
        return pool.model_digest(own)

    def recover(self, method: TGR, store: Store) -> TaskBank:
        """The recovered tasks of all models.

        Args:
            method: says how.
            store: keeps them.

        Returns:
            One bank.
        """
        folders: dict[str, Path] = {}
        for name, pool in self.parts.items():
            bank = recover_pool(pool, method.recovery, store)
            folders |= {self._id(name, id): folder for id, folder in bank.folders.items()}
        return TaskBank(folders)

    def _id(self, domain: str, id: str) -> str:
        return id if len(self.parts) == 1 else f"{domain}/{id}"

    def _find(self, id: str) -> tuple[ModelPool, str]:
        domain, _, own = id.rpartition("/")
        return (self.parts[domain] if domain else next(iter(self.parts.values()))), own


class PoolsStudy(Study):
    """What studies of the models of one or several pools share."""

    pools: tuple[str, ...] = pydantic.Field(default=("icons-30",), min_length=1)
    """Shipped pools' names or folders; each counts as a domain."""
    recipe: str = "main"
    """Recipe of TGR whose recovery, probe and groups are looked at."""

    def opened(self, store: Store) -> tuple[TGR, Pools, TaskBank]:
        """The method, the pools and their recovered tasks.

        Args:
            store: keeps the tasks.

        Returns:
            All three.
        """
        (_, method), pools = tgr_recipe(self.recipe), open_pools(self.pools)
        return method, pools, pools.recover(method, store)


def open_pools(names: Sequence[str]) -> Pools:
    """Opens pools.

    Args:
        names: shipped pools or folders.

    Returns:
        The pools; a domain has the name of its pool.

    Raises:
        MetapoolError: there is none, two have one name, or they have fewer than 3 models together.
    """
    opened = [open_pool(name) for name in names]
    found = {pool.manifest.name: pool for pool in opened}
    if len(found) < len(opened) or not opened:
        raise MetapoolError(f"pools: expected one or more pools of different names, not {', '.join(names) or 'none'}")
    if sum(map(len, opened)) < 3:
        raise MetapoolError(f"pools: expected 3 or more models to compare, found {sum(map(len, opened))}")
    return Pools(found)


def pool_cka(pools: Pools, bank: TaskBank, images: int, batch: int, seed: int, store: Store) -> NDArray[np.float64]:
    """CKA of the features that all models have of the same images: equal shares of every model's recovered ones.

    Args:
        pools: the models.
        bank: their recovered tasks.
        images: in all, about; of every model the same number.
        batch: of the minibatch estimate.
        seed: of the order of the images.
        store: keeps images and features.

    Returns:
        float64 [M, M].

    Raises:
        MetapoolError: fewer than 4 images.
    """
    share = images // len(bank)
    if share < 1 or share * len(bank) < 4:
        raise MetapoolError(f"images: expected at least one for each of the {len(bank)} models, and 4, not {images}")
    key = {
        "bank": bank.digest(),
        "input": pools.input.model_dump(),
        "share": share,
        "seed": seed,
        "version": [VERSION, VIEWS_VERSION],
    }
    made = store.artifact("study-images", key, partial(_write_images, bank, pools.input, share, seed))
    keys: dict[str, dict[str, Any]] = {id: {**key, "model": pools.model_digest(id)} for id in bank}
    folders = store.units("study-features", keys, partial(_write_features, pools, made / "images.safetensors"))
    return minibatch_cka([load_file(folder / "features.safetensors")["features"] for folder in folders.values()], batch)


def _write_images(bank: TaskBank, input: InputSpec, share: int, seed: int, folder: Path) -> None:
    parts: list[Tensor] = []
    for task in bank.values():
        kept = evenly(len(task.labels), share)
        parts.append(fit_bytes(task.images[kept], input))
    images = torch.cat(parts)
    # In random order, since neighbours share a batch.
    order = torch.randperm(len(images), generator=generator_for(seed, "study-images"))
    save_file({"images": images[order]}, folder / "images.safetensors")


def _write_features(pools: Pools, images: Path, id: str, folder: Path) -> None:
    features, _ = look(pools.get(id), load_file(images)["images"])
    save_file({"features": features}, folder / "features.safetensors")


def evenly(count: int, kept: int) -> Tensor:
    """Places that are evenly spaced, so that every class keeps its share of images that are sorted by class.

    Args:
        count: of all.
        kept: how many are wanted, at most.

    Returns:
        int64, ascending.
    """
    return torch.linspace(0, count - 1, min(kept, count)).round().long()
