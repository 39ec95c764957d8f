r"""Neurons of one network put in the order of another's by optimal transport, so that their weights can be combined.

A hidden neuron of model i is described by its incoming weights, batch norm folded in. Between the n neurons of a layer
and those of the reference, all of mass 1/n, the transport problem

.. math:: P = \arg\min_{P \ge 0,\; P 1 = P^\top 1 = 1/n} \sum_{jk} P_{jk}\, \|\hat w_j - w_k\|_2

has a permutation among its solutions (vertices of the Birkhoff polytope), so that :math:`T = n P` only reorders.
Layers are taken from the image to the features; :math:`\hat w` has its inputs in the order found one layer before
(Singh & Jaggi, NeurIPS 2020, arXiv 1910.05653, algorithm 1, mode "weights").

Maps that are added must share one order: along a residual stream the stem's, or the latest shortcut's. The head stays
out of it, because its outputs are classes, and those differ between models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params, running_statistics
from metapool.base.networks import ConvBlock, Network, ResidualBlock
from metapool.pool import ModelPool, PretrainedModel

PER_NEURON = ("weight", "bias", "running_mean", "running_var")
IMAGE = "image"


@dataclass(frozen=True)
class Layer:
    """A convolution with its batch norm, and the orders of channels that it joins.

    Attributes:
        convolution: its name in the network.
        norm: name of the batch norm.
        inputs: name of the order of its input channels; that of an image never changes.
        outputs: name of the order of its neurons; layers whose maps are added have the same.
        eps: of the batch norm.
    """

    convolution: str
    norm: str
    inputs: str
    outputs: str
    eps: float = 1e-5


def layers_of(network: Network) -> list[Layer]:
    """The layers of a Conv4 or a ResNet, in the order in which they are aligned.

    Args:
        network: built by name.

    Returns:
        From the image on; of layers that share an order the one that decides it comes first.
    """
    found: list[Layer] = []
    stream = IMAGE
    for name, module in network.encoder.named_children():
        place = f"encoder.{name}"
        if isinstance(module, ConvBlock):
            found.append(Layer(f"{place}.0", f"{place}.1", stream, place))
            stream = place
        elif isinstance(module, nn.Conv2d):  # the stem of a ResNet; its batch norm is the next part
            found.append(Layer(place, f"encoder.{int(name) + 1}", stream, place))
            stream = place
        elif isinstance(module, ResidualBlock):
            after = stream
            if isinstance(module.shortcut, nn.Sequential):
                after = place
                found.append(Layer(f"{place}.shortcut.0", f"{place}.shortcut.1", stream, after))
            found.append(Layer(f"{place}.conv1", f"{place}.norm1", stream, f"{place}.conv1"))
            found.append(Layer(f"{place}.conv2", f"{place}.norm2", f"{place}.conv1", after))
            stream = after
    return found


def encoder_of(network: Network) -> Params:
    """Weights and running statistics before the head.

    Args:
        network: not changed.

    Returns:
        Detached copies by name, each with one row per neuron.
    """
    state = network.state_dict()
    return {name: value.clone() for name, value in state.items() if name.startswith("encoder.") and value.dim()}


def folded_rows(encoder: Params, layer: Layer) -> Tensor:
    r"""What describes a neuron: the affine map :math:`[\,s w,\; \beta + (b - \mu) s\,]` of convolution and batch norm.

    Here :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}`.

    Args:
        encoder: weights and running statistics by name.
        layer: O neurons with I inputs.

    Returns:
        float64 [O, I * k * k + 1].
    """
    norm = {kind: encoder[f"{layer.norm}.{kind}"].double() for kind in PER_NEURON}
    scale = norm["weight"] * torch.rsqrt(norm["running_var"] + layer.eps)
    offset = norm["bias"] - norm["running_mean"] * scale
    if (bias := encoder.get(f"{layer.convolution}.bias")) is not None:
        offset = offset + bias.double() * scale
    rows = encoder[f"{layer.convolution}.weight"].double().flatten(1)
    return torch.cat([rows * scale[:, None], offset[:, None]], 1)


def transport(cost: Tensor) -> Tensor:
    """The optimal plan between two layers of n equally heavy neurons.

    Args:
        cost: float [n, n], of taking neuron j of the model to place k of the reference.

    Returns:
        int64 [n]: for every place of the reference the neuron that comes there; T[j, k] = 1 where j = plan[k].
    """
    places, neurons = linear_sum_assignment(cost.T.numpy())
    plan = torch.empty(len(cost), dtype=torch.int64)
    plan[torch.from_numpy(places)] = torch.from_numpy(neurons)
    return plan


def align(encoder: Params, reference: Params, layers: Sequence[Layer]) -> tuple[Params, dict[str, Tensor]]:
    """A model's encoder with its neurons in the order of a reference; it computes what it did, in another order.

    Args:
        encoder: of the model.
        reference: of the model that others are aligned to.
        layers: of both.

    Returns:
        The aligned encoder, and the plan of every order: which neuron came to each place. The last layer's plan orders
        the features.

    Raises:
        MetapoolError: when the two are not of one architecture and width.
    """
    if {n: v.shape for n, v in encoder.items()} != {n: v.shape for n, v in reference.items()}:
        raise MetapoolError("only networks of one architecture and width can be aligned; these two differ in shape")
    aligned: Params = {}
    plans: dict[str, Tensor] = {}
    for layer in layers:
        names = [f"{layer.convolution}.{kind}" for kind in PER_NEURON] + [f"{layer.norm}.{kind}" for kind in PER_NEURON]
        own = {name: encoder[name] for name in names if name in encoder}
        if layer.inputs in plans:
            own[names[0]] = own[names[0]][:, plans[layer.inputs]]
        if layer.outputs not in plans:
            # Not by a matrix product, whose rounding would put two equal neurons at a distance.
            cost = torch.cdist(
                folded_rows(own, layer),
                folded_rows(reference, layer),
                compute_mode="donot_use_mm_for_euclid_dist",
            )
            plans[layer.outputs] = transport(cost)
        aligned.update({name: value[plans[layer.outputs]] for name, value in own.items()})
    return aligned, plans


def encoders_of(models: Sequence[PretrainedModel], *, aligned: bool) -> list[Params]:
    """Encoders of models of one architecture.

    Args:
        models: at least one; their networks are built by name.
        aligned: whether their neurons are put in the order of the first model's.

    Returns:
        Weights and running statistics by name, of every model; the first one's are as they are.
    """
    encoders = [encoder_of(network_of(model)) for model in models]
    if not aligned:
        return encoders
    layers = layers_of(network_of(models[0]))
    return encoders[:1] + [align(encoder, encoders[0], layers)[0] for encoder in encoders[1:]]


@dataclass(frozen=True)
class Span:
    r"""Trainable weights of M encoders as coordinates in the span of their deviations from the mean.

    A tensor of d numbers is standardised: less its mean over the models, number by number, and divided by one
    deviation. Its coordinates c in orthonormal directions are divided by :math:`\sqrt d`, so that they are about as
    large whatever d: a squared distance of standardised weights is :math:`\sum d\, (c - c')^2`.

    Attributes:
        mean: of every tensor, over the models.
        basis: [r, *shape] of every tensor: what a coordinate of 1 adds to its mean, r <= M.
        coordinates: float [M, R], those of all tensors side by side.
        shares: float [R], d / D for the tensor of each coordinate, D numbers in all.
    """

    mean: Params
    basis: Params
    coordinates: Tensor
    shares: Tensor

    @classmethod
    def of(cls, encoders: Sequence[Params]) -> "Span":
        """The span of models.

        Args:
            encoders: M of them, of one architecture; running statistics are left out.

        Returns:
            Their coordinates, in the weights' own precision.
        """
        mean: Params = {}
        basis: Params = {}
        coordinates: list[Tensor] = []
        shares: list[Tensor] = []
        for name, like in encoders[0].items():
            if ".running_" in name:
                continue
            rows = torch.stack([encoder[name].flatten() for encoder in encoders]).double()
            deviations = rows - rows.mean(0)
            deviation = deviations.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            left, strengths, directions = torch.linalg.svd(deviations / deviation, full_matrices=False)
            unit = math.sqrt(like.numel())
            mean[name] = rows.mean(0).view_as(like).to(like.dtype)
            basis[name] = (directions * deviation * unit).view(-1, *like.shape).to(like.dtype)
            coordinates.append((left * strengths / unit).to(like.dtype))
            shares.append(torch.full_like(strengths, like.numel(), dtype=like.dtype))
        sizes = torch.cat(shares)
        return cls(mean, basis, torch.cat(coordinates, 1), sizes / sum(value.numel() for value in mean.values()))

    def weights(self, coordinates: Tensor) -> Params:
        """A model from its coordinates.

        Args:
            coordinates: float [R].

        Returns:
            Weights by name.
        """
        parts = coordinates.split([len(basis) for basis in self.basis.values()])
        return {n: self.mean[n] + torch.tensordot(part, self.basis[n], 1) for n, part in zip(self.mean, parts)}


def alike(pool: ModelPool) -> list[list[str]]:
    """Models whose weights can be combined: those of one architecture, width and input size.

    Args:
        pool: the models.

    Returns:
        Ids of every group, in the order of the pool; heads may differ.

    Raises:
        MetapoolError: when the pool is empty.
    """
    if not pool:
        raise MetapoolError(f"{pool.path}: the pool has no models; fusing needs at least one")
    groups: dict[str, list[str]] = {}
    for entry in pool.manifest.models:
        groups.setdefault(entry.network.model_copy(update={"classes": 1}).digest(), []).append(entry.id)
    return list(groups.values())


def with_encoder(model: PretrainedModel, encoder: Params, images: Tensor) -> Network:
    """A model's network with other weights before its head, and the batch-norm statistics that belong to them.

    Args:
        model: its network is changed.
        encoder: weights by name.
        images: float [N, C', H', W'] in [0, 1]; statistics are estimated on them.

    Returns:
        The network.
    """
    network = network_of(model)
    statistics = running_statistics(network, encoder, model.input.prepare(images))
    network.load_state_dict({**network.state_dict(), **encoder, **statistics})
    return network


def network_of(model: PretrainedModel) -> Network:
    """A model's network, when it is one of ours.

    Args:
        model: of a pool.

    Returns:
        The network.

    Raises:
        MetapoolError: when its layers are not known.
    """
    if not isinstance(model.network, Network):
        raise MetapoolError(f"model {model.id!r} is no conv4, resnet10 or resnet18: its layers cannot be aligned")
    return model.network
