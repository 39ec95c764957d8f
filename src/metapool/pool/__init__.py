"""The input: a pool of frozen classifiers, each with its input spec, class names and provenance.

On disk a pool is a folder: ``pool.json`` (pydantic, versioned), one safetensors file per model, and one more for the
backbone that models share which are adapters of it (``vit-lora``). Nothing in it is code; a file that does not fit its
entry (hash, names, shapes, finite values) is refused before it is used.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec
from metapool.base.networks import NetworkSpec, build
from metapool.base.store import digest_of, digest_of_file
from metapool.base.transformer import own_and_shared
from metapool.pool.manifest import ModelEntry as ModelEntry
from metapool.pool.manifest import PoolManifest as PoolManifest
from metapool.pool.manifest import check_entry, first_problem, read_weights

BACKBONE = "_backbone.safetensors"  # no model can have this name
Access = Literal["weights", "weights of one architecture", "adapters of one backbone", "answers", "nothing"]
"""What a method must have of the pool's models: all of it, no more than what a service answers, or less."""


class PretrainedModel(nn.Module):
    """A frozen classifier that takes images in [0, 1] of any size and number of channels.

    Args:
        id: unique name in its pool.
        network: any module from normalised images to logits [N, K]; when it has no ``features`` method, its features
            are what enters its last linear layer.
        input: what the network expects of an image.
        classes: K names.
        spec: how to build the network by name; needed only to store the model.
        accuracy: percent on held-out images of its own task, when known.
        licence: of the weights.
        provenance: how it was made.
    """

    def __init__(
        self,
        id: str,
        network: nn.Module,
        input: InputSpec,
        classes: Sequence[str],
        *,
        spec: NetworkSpec | None = None,
        accuracy: float | None = None,
        licence: str = "",
        provenance: str = "",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.id = id
        self.input = input
        self.classes = tuple(classes)
        self.accuracy = accuracy
        self.licence = licence
        self.provenance = provenance
        # Convolutions of a CPU are up to twice as fast in this order.
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: float [N, C', H', W'] in [0, 1].

        Returns:
            float [N, K].
        """
        out: Tensor = self.network(self.input.prepare(images))
        return out

    def features(self, images: Tensor) -> Tensor:
        """Features before the head.

        Args:
            images: float [N, C', H', W'] in [0, 1].

        Returns:
            float [N, D].
        """
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both at the cost of one pass.

        Args:
            images: float [N, C', H', W'] in [0, 1].

        Returns:
            float [N, D] and float [N, K].

        Raises:
            MetapoolError: when the network has neither a ``features`` method and a head, nor a linear layer.
        """
        prepared = self.input.prepare(images)
        network: Any = self.network
        if hasattr(network, "features") and hasattr(network, "head"):
            features: Tensor = network.features(prepared)
            return features, network.head(features)
        linears = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise MetapoolError(f"model {self.id!r}: its network has no linear layer whose input could be its features")
        seen: list[Tensor] = []
        hook = linears[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.network(prepared)
        finally:
            hook.remove()
        return seen[-1].flatten(1), logits

    def train(self, mode: bool = True) -> "PretrainedModel":
        """Stays in eval mode: the model is frozen.

        Args:
            mode: ignored.

        Returns:
            The model itself.
        """
        return super().train(False)

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())


class ModelPool(Sequence[PretrainedModel]):
    """A pool on disk; a model is read when it is asked for, so that one at a time is in memory.

    Args:
        path: the folder.
        manifest: what is in it.
    """

    def __init__(self, path: Path, manifest: PoolManifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: Path, name: str) -> "ModelPool":
        """A new, empty pool.

        Args:
            path: folder to make.
            name: of the pool.

        Returns:
            The pool.

        Raises:
            MetapoolError: when there is a pool already.
        """
        if (path / "pool.json").exists():
            raise MetapoolError(f"{path} already holds a pool; choose another folder or remove it first")
        path.mkdir(parents=True, exist_ok=True)
        pool = cls(path, PoolManifest(name=name))
        pool._write(pool.manifest)
        return pool

    @classmethod
    def open(cls, path: Path) -> "ModelPool":
        """Reads ``pool.json``; no weights yet.

        Args:
            path: the folder.

        Returns:
            The pool.

        Raises:
            MetapoolError: when the file is missing, no JSON, of another version or inconsistent.
        """
        file = Path(path) / "pool.json"
        if not file.is_file():
            raise MetapoolError(f"{path} is not a pool: it has no pool.json (make one with `metapool pool build`)")
        try:
            manifest = PoolManifest.model_validate_json(file.read_text())
        except (pydantic.ValidationError, UnicodeDecodeError) as error:
            raise MetapoolError(f"{file}: {first_problem(error)}") from error
        ids = [entry.id for entry in manifest.models]
        if repeated := sorted({name for name in ids if ids.count(name) > 1}):
            raise MetapoolError(f"{file}: model id {repeated[0]!r} stands twice; ids must be unique")
        for entry in manifest.models:
            check_entry(entry, file)
        if len({entry.backbone for entry in manifest.models} - {None}) > 1:
            raise MetapoolError(f"{file}: its models name different backbones; a pool has one")
        return cls(Path(path), manifest)

    def add(self, model: PretrainedModel, dtype: torch.dtype = torch.float32) -> None:
        """Writes a model into the pool, weights first and manifest last.

        Args:
            model: its network must be what its ``spec`` builds.
            dtype: of the stored weights.

        Raises:
            MetapoolError: when the id is taken or no file name, the model has no spec, its classes or input do not fit
                it, or it stands on another backbone than the pool's.
        """
        if model.spec is None:
            raise MetapoolError(f"model {model.id!r} has no architecture by name, so it cannot be stored in a pool")
        if model.id in self.ids:
            raise MetapoolError(f"{self.path}: a model {model.id!r} is there already")
        weights = {
            name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
            for name, value in model.network.state_dict().items()
        }
        temporary, shared = (self.path / f"{name}.{os.getpid()}.tmp" for name in ("weights", "backbone"))
        own, common = own_and_shared(weights)
        save_file(own, temporary)
        try:
            if common:
                save_file(common, shared)
            entry = ModelEntry(
                id=model.id,
                network=model.spec,
                input=model.input,
                classes=model.classes,
                sha256=digest_of_file(temporary),
                backbone=digest_of_file(shared) if common else None,
                accuracy=model.accuracy,
                licence=model.licence,
                provenance=model.provenance,
            )
            check_entry(entry, self.path)
            if common and any(other.backbone not in (None, entry.backbone) for other in self.manifest.models):
                raise MetapoolError(f"{self.path}: model {model.id!r} stands on another backbone than the pool's")
            if common:
                shared.replace(self.path / BACKBONE)
            temporary.replace(self.path / f"{entry.id}.safetensors")
        except pydantic.ValidationError as error:
            raise MetapoolError(f"model {model.id!r} cannot be stored: {first_problem(error)}") from error
        finally:
            temporary.unlink(missing_ok=True)
            shared.unlink(missing_ok=True)
        self._write(self.manifest.model_copy(update={"models": (*self.manifest.models, entry)}))

    @property
    def ids(self) -> list[str]:
        """Ids of the models, in order."""
        return [entry.id for entry in self.manifest.models]

    @property
    def input(self) -> InputSpec:
        """What a meta-model of this pool is to expect of an image."""
        return common_input([entry.input for entry in self.manifest.models])

    def digest(self) -> str:
        """Hash of everything that results depend on: weights, inputs and class names, not the pool's name or place.

        Returns:
            16 hexadecimal digits.
        """
        return digest_of([self.model_digest(name) for name in self.ids])

    def model_digest(self, id: str) -> str:
        """Hash of one model.

        Args:
            id: its name.

        Returns:
            16 hexadecimal digits.
        """
        entry = self._entry(id)
        files = [entry.sha256] if entry.backbone is None else [entry.sha256, entry.backbone]
        return digest_of([*files, entry.input.model_dump(), entry.classes, entry.network.model_dump()])

    def get(self, id: str) -> PretrainedModel:
        """Reads one model.

        Args:
            id: its name.

        Returns:
            The model, frozen, in float32; adapters together with their backbone.
        """
        entry = self._entry(id)
        network = build(entry.network, torch.Generator())
        own, common = own_and_shared(network.state_dict())
        weights = read_weights(self.path / f"{id}.safetensors", entry.sha256, entry, own)
        if entry.backbone is not None:
            weights |= read_weights(self.path / BACKBONE, entry.backbone, entry, common)
        network.load_state_dict(weights)
        return PretrainedModel(
            id, network, entry.input, entry.classes,
            spec=entry.network, accuracy=entry.accuracy, licence=entry.licence, provenance=entry.provenance,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.manifest.models)

    def __iter__(self) -> Iterator[PretrainedModel]:
        return (self.get(name) for name in self.ids)

    @overload
    def __getitem__(self, index: int) -> PretrainedModel: ...
    @overload
    def __getitem__(self, index: slice) -> "ModelPool": ...
    def __getitem__(self, index: int | slice) -> "PretrainedModel | ModelPool":
        if isinstance(index, slice):
            chosen = self.manifest.models[index]
            return ModelPool(self.path, self.manifest.model_copy(update={"models": chosen}))
        return self.get(self.ids[index])

    def _entry(self, id: str) -> ModelEntry:
        for entry in self.manifest.models:
            if entry.id == id:
                return entry
        raise MetapoolError(f"{self.path}: no model {id!r}; there are {', '.join(self.ids) or 'none'}")

    def _write(self, manifest: PoolManifest) -> None:
        temporary = self.path / f"pool.json.{os.getpid()}.tmp"
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n")
        temporary.replace(self.path / "pool.json")
        self.manifest = manifest


def common_input(inputs: Sequence[InputSpec]) -> InputSpec:
    """Something that the images of all models fit into.

    Args:
        inputs: of the models, at least one.

    Returns:
        As many channels as any model has, and the size that most models have (of equals the first), normalised as for
        the first model that is like that.
    """
    channels = max(input.channels for input in inputs)
    sizes = Counter((input.height, input.width) for input in inputs)
    height, width = size = max(sizes, key=sizes.__getitem__)
    like = max(inputs, key=lambda one: (one.channels == channels, (one.height, one.width) == size))
    return like.model_copy(update={"height": height, "width": width})
