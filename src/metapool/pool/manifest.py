"""What ``pool.json`` says of models, and their weights, which are refused unless they fit what it says."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec
from metapool.base.networks import NetworkSpec
from metapool.base.store import Settings, digest_of_file

MAX_TENSORS = 20_000
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class ModelEntry(Settings):
    """What ``pool.json`` says of one model."""

    id: Name
    """Unique in the pool; also the name of its file."""
    network: NetworkSpec
    """Architecture by name."""
    input: InputSpec
    """What it expects of an image."""
    classes: tuple[str, ...]
    """Names of its outputs, in order."""
    sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")
    """Hash of its safetensors file."""
    backbone: str | None = pydantic.Field(default=None, pattern="^[0-9a-f]{64}$")
    """Hash of the pool's backbone file, for a model whose own file holds only adapters and a head."""
    accuracy: float | None = pydantic.Field(default=None, ge=0, le=100)
    """Percent correct on held-out images of its own task, as its maker measured it."""
    licence: str = ""
    """Licence of the weights."""
    provenance: str = ""
    """How and from what it was trained."""


class PoolManifest(Settings):
    """The content of ``pool.json``."""

    version: Literal[1] = 1
    """Format of this file."""
    name: str
    """Name of the pool."""
    models: tuple[ModelEntry, ...] = ()
    """Entries, in the order of the pool."""


def check_entry(entry: ModelEntry, where: Path) -> None:
    """What the fields of an entry must agree on.

    Args:
        entry: of a manifest.
        where: file or folder, for the message.

    Raises:
        MetapoolError: when they do not.
    """
    if len(entry.classes) != entry.network.classes:
        raise MetapoolError(
            f"{where}: model {entry.id!r} names {len(entry.classes)} classes but has {entry.network.classes} outputs"
        )
    if entry.input.shape != (entry.network.channels, entry.network.height, entry.network.image_width):
        raise MetapoolError(f"{where}: model {entry.id!r}: its input and its network differ in channels or size")
    if (entry.backbone is None) == (entry.network.architecture == "vit-lora"):
        raise MetapoolError(f"{where}: model {entry.id!r}: adapters, and nothing else, name the backbone they stand on")


def first_problem(error: Exception) -> str:
    """An error in one line.

    Args:
        error: pydantic's, or one of reading a file.

    Returns:
        Field and message of the first problem.
    """
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    return str(error)


def read_weights(file: Path, sha256: str, entry: ModelEntry, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that fit the network; nothing is loaded before names, shapes and hash agree.

    Args:
        file: safetensors.
        sha256: what its hash must be.
        entry: of the model.
        expected: what the network has.

    Returns:
        Weights by name.

    Raises:
        MetapoolError: when the file is missing or does not fit.
    """
    if not file.is_file():
        raise MetapoolError(f"{file} is missing: pool.json names model {entry.id!r}")
    if digest_of_file(file) != sha256:
        raise MetapoolError(f"{file}: its SHA-256 is not the one in pool.json; the file was changed or cut off")
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            if len(names) > MAX_TENSORS or names != set(expected):
                wrong = sorted(names ^ set(expected))[:3]
                raise MetapoolError(f"{file}: tensors do not fit {entry.network.architecture}: {', '.join(wrong)}")
            for name, tensor in expected.items():
                if tuple(opened.get_slice(name).get_shape()) != tuple(tensor.shape):
                    raise MetapoolError(f"{file}: {name} should have shape {tuple(tensor.shape)}")
            weights = {name: opened.get_tensor(name).to(expected[name].dtype) for name in expected}
    except SafetensorError as error:
        raise MetapoolError(f"{file} is no readable safetensors file: {error}") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise MetapoolError(f"{file}: {name} holds values that are not finite")
    return weights
