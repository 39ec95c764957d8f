"""Learners: how a network answers an episode. MAML, ANIL and ProtoNet as pure functions of the parameters.

A learner splits an answer into what each image gives alone (``encode``) and what the support makes of it
(``classify``), so that evaluation encodes every image once. No query ever sees another: ProtoNet uses running
statistics once trained, MAML and ANIL the statistics of the support set (MetaBN, Bronskill et al. 2020).
"""

from pathlib import Path
from typing import Annotated, Literal, Protocol

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.functional import Params, Statistics, call, widen
from metapool.base.images import InputSpec
from metapool.base.networks import Network
from metapool.base.store import Settings


class FewShotModel(Protocol):
    """What can be evaluated and used: anything that labels queries by a support set."""

    def encode(self, images: Tensor) -> Tensor:
        """What each image gives alone: float [N, C, H, W] in [0, 1] to [N, …]."""

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits [Q, K] of encoded queries, by the encoded support [S, …] and its labels [S] in [0, K).

        Where an encoded image is a vector, also of E episodes side by side: [E, S, D] and [E, Q, D] to [E, Q, K].
        """

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
        support: float [S, D], or [E, S, D] of E episodes side by side.
        labels: int64 [S] in [0, K), every class present.
        query: float [Q, D] or [E, Q, D].
        normalise: divide every feature vector, and every centroid, by its length.

    Returns:
        float [Q, K] or [E, Q, K].
    """
    if normalise:
        support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    one_hot = F.one_hot(labels).to(support.dtype)
    centroids = (one_hot.T @ support) / one_hot.sum(0).unsqueeze(1)
    if normalise:
        centroids = F.normalize(centroids, dim=-1)
    lengths = query.square().sum(-1, keepdim=True) + centroids.square().sum(-1).unsqueeze(-2)
    return 2 * query @ centroids.mT - lengths  # one matrix product; torch.cdist without one is many times slower


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
    transductive: bool = False
    """Normalise the queries of an episode by their own statistics, as published code does: an answer then depends on
    the other queries. For comparison only; every table marks it."""

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
            return self._adapt(network, params, support, labels, query, self.test_steps, differentiable=False)

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
        with torch.set_grad_enabled(differentiable):
            if self.transductive:
                return widen(call(network, params, query))
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


def episode_loss(
    learner: AnyLearner, network: Network, params: Params, images: Tensor, labels: Tensor, shot: int
) -> Tensor:
    """Query loss of one training episode.

    Args:
        learner: how the network answers.
        network: encoder and head.
        params: its parameters.
        images: float [N, C, H, W], normalised; class-major, as many of each class.
        labels: int64 [N] in [0, K).
        shot: the first so many images of a class are its support.

    Returns:
        A scalar: mean cross-entropy of the queries.
    """
    in_support = torch.arange(len(images)) % (len(images) // (int(labels[-1]) + 1)) < shot
    logits = learner.query_logits(network, params, images[in_support], labels[in_support], images[~in_support])
    return F.cross_entropy(logits, labels[~in_support])


def _head_of(params: Params, classes: int) -> Params:
    """A head for any number of classes: the trained rows where they fit, else all rows their mean (symmetric)."""
    weight, bias = params["head.weight"], params["head.bias"]
    if classes == len(weight):
        return {}
    return {
        "head.weight": weight.detach().mean(0, keepdim=True).repeat(classes, 1).requires_grad_(),
        "head.bias": bias.detach().mean().repeat(classes).requires_grad_(),
    }
