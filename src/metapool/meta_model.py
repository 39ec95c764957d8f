"""The product: a small network with a learner, in one folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params, half_precision, in_chunks, widen
from metapool.base.images import InputSpec
from metapool.base.networks import Network, NetworkSpec, build
from metapool.base.store import Settings
from metapool.learners import ANIL, MAML, AnyLearner, ProtoNet


class MetaModel(nn.Module):
    """The product: a small network with a learner, saved as one folder.

    Args:
        network: encoder and head.
        spec: how to build the network.
        learner: how it answers an episode.
        input: what it expects of an image.
        history: one record per step of its training, when known.
        projection: float [D, k], a linear map of the features (ProtoNet only).
    """

    KIND = "meta-model"

    def __init__(
        self,
        network: Network,
        spec: NetworkSpec,
        learner: MAML | ANIL | ProtoNet,
        input: InputSpec,
        history: Sequence[Mapping[str, Any]] = (),
        projection: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.history = list(history)
        # Convolutions of a CPU are up to twice as fast in this order.
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.spec = spec
        self.learner = learner
        self.input = input

    def encode(self, images: Tensor) -> Tensor:
        """What each image gives alone.

        Args:
            images: float [N, C', H', W'] in [0, 1].

        Returns:
            float [N, D] features for ProtoNet, prepared images for MAML and ANIL.
        """
        params, buffers = self._tensors()

        def encode(part: Tensor) -> Tensor:
            with half_precision():
                features = widen(self.learner.encode(self.network, params, buffers, self.input.prepare(part)))
            return features if self.projection is None else features @ self.projection

        return in_chunks(encode, images, 128)

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits of encoded queries.

        Args:
            support: [S, …], encoded.
            labels: int64 [S] in [0, K).
            query: [Q, …], encoded.

        Returns:
            float [Q, K].
        """
        return self.learner.classify(self.network, self._tensors()[0], support, labels, query)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits of images.

        Args:
            support: float [S, C, H, W] in [0, 1].
            labels: int64 [S] in [0, K), every class present.
            query: float [Q, C, H, W] in [0, 1].

        Returns:
            float [Q, K].
        """
        return self.classify(self.encode(support), labels, self.encode(query))

    @property
    def parameter_count(self) -> int:
        """Numbers that must be kept to answer: without the head for ProtoNet."""
        unused = "head." if isinstance(self.learner, ProtoNet) else "\n"
        projection = 0 if self.projection is None else self.projection.numel()
        kept = (p.numel() for name, p in self.network.named_parameters() if not name.startswith(unused))
        return sum(kept) + projection

    @property
    def transductive(self) -> bool:
        """Whether an answer depends on the other queries."""
        return not isinstance(self.learner, ProtoNet) and self.learner.transductive

    @property
    def models_at_inference(self) -> int:
        """One."""
        return 1

    def save(self, folder: Path) -> None:
        """Writes ``model.json``, ``model.safetensors`` and, when there is a history, ``steps.jsonl``.

        Args:
            folder: an existing folder.
        """
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        if self.projection is not None:
            weights["projection"] = self.projection.contiguous()
        save_file(weights, folder / "model.safetensors")
        about = {
            "kind": self.KIND,
            "version": 1,
            "network": self.spec.model_dump(),
            "learner": self.learner.model_dump(),
            "input": self.input.model_dump(),
        }
        (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")
        if self.history:
            (folder / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.history))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what :meth:`save` wrote.

        Args:
            folder: where.

        Returns:
            The model.

        Raises:
            MetapoolError: when a file is missing or does not fit.
        """
        try:
            about = _About.model_validate_json((folder / "model.json").read_text())
            network = build(about.network, torch.Generator())
            weights = load_file(folder / "model.safetensors")
            projection = weights.pop("projection", None)
            network.load_state_dict(weights)
            steps = folder / "steps.jsonl"
            history = [json.loads(line) for line in steps.read_text().splitlines()] if steps.is_file() else []
        except OSError as error:
            raise MetapoolError(f"{folder} is no saved model: {error.filename or error} is missing") from error
        except (ValueError, RuntimeError, SafetensorError) as error:
            raise MetapoolError(f"{folder}: its model.json and model.safetensors do not fit: {error}") from error
        return cls(network, about.network, about.learner, about.input, history, projection)

    def _tensors(self) -> tuple[Params, dict[str, Tensor]]:
        return dict(self.network.named_parameters()), dict(self.network.named_buffers())


class _About(Settings):
    kind: Literal["meta-model"]
    version: Literal[1]
    network: NetworkSpec
    learner: AnyLearner
    input: InputSpec
