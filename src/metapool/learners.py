"""Learners: how a network answers an episode. MAML, ANIL and ProtoNet as pure functions of the parameters.

A learner splits an answer into what each image gives alone (``encode``) and what the support makes of it
(``classify``), so that evaluation encodes every image once. No query ever sees another: ProtoNet uses running
statistics once trained, MAML and ANIL the statistics of the support set (MetaBN, Bronskill et al. 2020).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import pydantic
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params, Statistics, call, in_chunks, widen
from metapool.base.images import InputSpec
from metapool.base.networks import Network, NetworkSpec, build
from metapool.base.store import Settings


class FewShotModel(Protocol):
    """What can be evaluated and used: anything that labels queries by a support set."""

    def encode(self, images: Tensor) -> Tensor:
        """What each image gives alone: float [N, C, H, W] in [0, 1] to [N, …]."""

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits [Q, K] of encoded queries, by the encoded support [S, …] and its labels [S] in [0, K)."""

    @property
    def input(self) -> InputSpec:
        """Size and channels that images are best read in; other sizes are converted."""

    @property
    def parameter_count(self) -> int:
        """Numbers that must be kept to answer."""

    @property
    def models_at_inference(self) -> int:
        """Networks that run for one image."""

    def save(self, folder: Path) -> None:
        """Writes itself into an existing folder."""


class Learner(Protocol):
    """How a network answers an episode."""

    def query_logits(self, network: Network, params: Params, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Training: logits of the queries, differentiable in ``params``."""


class ProtoNet(Settings):
    """Prototypical networks (Snell et al. 2017): negative squared distance to a class's mean support features."""

    name: Literal["protonet"] = "protonet"
    """Which learner this is."""
    normalise: bool = False
    """Divide features by their length first, so that the distance is that of directions."""
    temperature: float = pydantic.Field(default=1.0, gt=0)
    """Logits are divided by it."""

    def query_logits(self, network: Network, params: Params, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits with the batch statistics of support and query together (training only).

        Args:
            network: whose features are used.
            params: its parameters.
            support: float [S, C, H, W], normalised.
            labels: int64 [S].
            query: float [Q, C, H, W], normalised.

        Returns:
            float [Q, K].
        """
        features = widen(call(network, params, torch.cat([support, query]), method="features"))
        return self.classify(network, params, features[: len(support)], labels, features[len(support) :])

    def encode(self, network: Network, params: Params, statistics: Statistics, images: Tensor) -> Tensor:
        """Features with running statistics.

        Args:
            network: whose features are used.
            params: its parameters.
            statistics: running statistics.
            images: float [N, C, H, W], normalised.

        Returns:
            float [N, D].
        """
        return call(network, params, images, statistics=statistics, method="features")

    def classify(self, network: Network, params: Params, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Negative squared distances to the prototypes.

        Args:
            network: not used.
            params: not used.
            support: float [S, D].
            labels: int64 [S].
            query: float [Q, D].

        Returns:
            float [Q, K].
        """
        return centroid_logits(support, labels, query, normalise=self.normalise) / self.temperature


def centroid_logits(support: Tensor, labels: Tensor, query: Tensor, *, normalise: bool) -> Tensor:
    """Nearest centroid as logits: −‖q − c_k‖² (Snell et al. 2017, equation 2).

    Args:
        support: float [S, D].
        labels: int64 [S] in [0, K), every class present.
        query: float [Q, D].
        normalise: divide every feature vector, and every centroid, by its length.

    Returns:
        float [Q, K].
    """
    if normalise:
        support, query = F.normalize(support, dim=1), F.normalize(query, dim=1)
    one_hot = F.one_hot(labels).to(support.dtype)
    centroids = (one_hot.T @ support) / one_hot.sum(0).unsqueeze(1)
    if normalise:
        centroids = F.normalize(centroids, dim=1)
    lengths = query.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return 2 * query @ centroids.T - lengths  # one matrix product; torch.cdist without one is many times slower


class _GradientLearner(Settings):
    """Gradient descent on the support loss, then the queries; what of the parameters descends is the subclass's."""

    inner_steps: int = pydantic.Field(default=5, ge=0)
    """Steps in training."""
    test_steps: int = pydantic.Field(default=10, ge=0)
    """Steps on a new task."""
    inner_rate: float = pydantic.Field(default=0.01, gt=0)
    """Learning rate of the steps."""
    first_order: bool = False
    """Leave second derivatives out (FOMAML)."""

    def _adapts(self, name: str) -> bool:
        raise NotImplementedError

    def query_logits(self, network: Network, params: Params, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits after the inner loop, differentiable through it (training).

        Args:
            network: with a head of K or more outputs.
            params: the initialisation.
            support: float [S, C, H, W], normalised.
            labels: int64 [S] in [0, K).
            query: float [Q, C, H, W], normalised.

        Returns:
            float [Q, K].
        """
        return self._adapt(network, params, support, labels, query, self.inner_steps, differentiable=True)

    def encode(self, network: Network, params: Params, statistics: Statistics, images: Tensor) -> Tensor:
        """The images themselves: every task adapts the whole network.

        Args:
            network: not used.
            params: not used.
            statistics: not used.
            images: float [N, C, H, W], normalised.

        Returns:
            The same.
        """
        return images

    def classify(self, network: Network, params: Params, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits after ``test_steps`` steps; any number of classes.

        Args:
            network: the network.
            params: the initialisation.
            support: float [S, C, H, W], normalised.
            labels: int64 [S] in [0, K).
            query: float [Q, C, H, W], normalised.

        Returns:
            float [Q, K].
        """
        params = {name: value.detach().requires_grad_() for name, value in params.items()}
        params.update(_head_of(params, int(labels.max()) + 1))
        with torch.enable_grad():
            return self._adapt(network, params, support, labels, query, self.test_steps, differentiable=False).detach()

    def _adapt(
        self,
        network: Network,
        params: Params,
        support: Tensor,
        labels: Tensor,
        query: Tensor,
        steps: int,
        *,
        differentiable: bool,
    ) -> Tensor:
        second_order = differentiable and not self.first_order
        adapted = [name for name in params if self._adapts(name)]
        for _ in range(steps):
            loss = F.cross_entropy(widen(call(network, params, support)), labels)
            gradients = torch.autograd.grad(loss, [params[name] for name in adapted], create_graph=second_order)
            moved = {n: params[n] - self.inner_rate * g for n, g in zip(adapted, gradients)}
            if not differentiable:
                moved = {name: value.detach().requires_grad_() for name, value in moved.items()}
            params = {**params, **moved}
        return widen(call(network, params, torch.cat([support, query]), first=len(support))[len(support) :])


class MAML(_GradientLearner):
    """Model-agnostic meta-learning (Finn et al. 2017): all parameters take the inner steps."""

    name: Literal["maml"] = "maml"
    """Which learner this is."""

    def _adapts(self, name: str) -> bool:
        return True


class ANIL(_GradientLearner):
    """Almost no inner loop (Raghu et al. 2020): only the head takes the inner steps."""

    name: Literal["anil"] = "anil"
    """Which learner this is."""

    def _adapts(self, name: str) -> bool:
        return name.startswith("head.")


AnyLearner = Annotated[MAML | ANIL | ProtoNet, pydantic.Field(discriminator="name")]


def _head_of(params: Params, classes: int) -> Params:
    """A head for any number of classes: the trained rows where they fit, else all rows their mean (symmetric)."""
    weight, bias = params["head.weight"], params["head.bias"]
    if classes == len(weight):
        return {}
    return {
        "head.weight": weight.detach().mean(0, keepdim=True).repeat(classes, 1).requires_grad_(),
        "head.bias": bias.detach().mean().repeat(classes).requires_grad_(),
    }


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
        self.network = network.eval()
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
            features = self.learner.encode(self.network, params, buffers, self.input.prepare(part))
            return features if self.projection is None else features @ self.projection

        return in_chunks(encode, images)

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
