"""One pool out of several."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from metapool.base.errors import MetapoolError
from metapool.pool import BACKBONE, ModelEntry, ModelPool, PoolManifest


def join_pools(pools: Sequence[ModelPool], out: Path) -> ModelPool:
    """Copies the models of pools into a new one; weights, hashes, licences and provenance stay as they are.

    Args:
        pools: one or more. An id that several of them use gets the name of its pool before it.
        out: folder of the new pool, which has its name.

    Returns:
        The new pool, with the models in the order given.

    Raises:
        MetapoolError: when there are no pools, one is given twice, a file does not fit its entry, the pools' adapters
            stand on different backbones, or there is a pool already.
    """
    if (out / "pool.json").exists() or out.is_file():
        raise MetapoolError(f"{out} already holds a pool, or is a file; choose another folder or remove it first")
    if not pools:
        raise MetapoolError("joining needs at least one pool")
    ids = [id for pool in pools for id in pool.ids]
    sources: dict[str, tuple[ModelPool, ModelEntry]] = {}
    for pool in pools:
        for entry in pool.manifest.models:
            id = entry.id if ids.count(entry.id) == 1 else f"{pool.manifest.name}-{entry.id}"
            if id in sources:
                raise MetapoolError(f"model id {id!r} would stand twice: {pool.path} and {sources[id][0].path}")
            pool.get(entry.id)  # a file that does not fit is refused before anything is written
            sources[id] = pool, entry
    if len({entry.backbone for _, entry in sources.values()} - {None}) > 1:
        raise MetapoolError("the adapters of these pools stand on different backbones; a pool has one")
    out.mkdir(parents=True, exist_ok=True)
    for id, (pool, entry) in sources.items():
        shutil.copyfile(pool.path / f"{entry.id}.safetensors", out / f"{id}.safetensors")
        if entry.backbone is not None:
            shutil.copyfile(pool.path / BACKBONE, out / BACKBONE)
    models = [{**entry.model_dump(), "id": id} for id, (_, entry) in sources.items()]
    manifest = PoolManifest.model_validate({"name": out.name, "models": models})
    (out / "pool.json").write_text(manifest.model_dump_json(indent=1) + "\n")
    return ModelPool.open(out)
