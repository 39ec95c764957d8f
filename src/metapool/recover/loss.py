"""The inversion loss: what a model says of images, and how far their batch-norm statistics are from its own."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.base.functional import BatchNorm, normalised_by, widen
from metapool.base.store import Settings
from metapool.pool import PretrainedModel


class LossWeights(Settings):
    """Weights of the inversion loss."""

    batch_norm: float = pydantic.Field(default=1.0, ge=0)
    """Of the distance to the running statistics."""
    total_variation: float = pydantic.Field(default=0.0, ge=0)
    """Of the mean absolute difference between neighbouring pixels."""
    l2: float = pydantic.Field(default=0.0, ge=0)
    """Of the root mean square of the pixels."""


PRIORS = LossWeights(batch_norm=0.0, total_variation=0.5, l2=0.05)
"""What a model without batch norm is recovered with: natural images are smooth and dark or bright only in places."""


class _NormaliseAndMeasure(torch.autograd.Function):
    """scale · x + offset, and mean and biased variance of x, per channel: few passes forward and two back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows(images)
        mean, variance = _moments(rows)
        ctx.save_for_backward(rows, scale, mean)
        return _affine(rows, scale, offset, images.shape), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, mean_gradient: Tensor, variance_gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        # d mean / dx = 1/n and d variance / dx = 2 (x - mean) / n, so theirs is affine in x.
        rows, scale, mean = ctx.saved_tensors
        slope = 2 * variance_gradient / len(rows)
        found = _affine(rows, slope, mean_gradient / len(rows) - slope * mean, gradient.shape)
        return _affine(_rows(gradient), scale, found, gradient.shape), None, None


def _rows(images: Tensor) -> Tensor:
    """[N, C, H, W] to [N H W, C], a view in channels-last order."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _affine(rows: Tensor, scale: Tensor, offset: Tensor, shape: torch.Size) -> Tensor:
    """Scale · rows + offset of [n, C], as [N, C, H, W]; ``offset`` is [C] or [N, C, H, W]."""
    out = torch.empty(shape, dtype=rows.dtype, memory_format=torch.channels_last)
    # Several rows side by side: a processor wants long ones.
    times = math.gcd(len(rows), max(1, 1024 // rows.shape[1]))
    wide = -1, times * rows.shape[1]
    scale = scale.to(rows.dtype).repeat(times)
    offset = offset.to(rows.dtype).repeat(times) if offset.dim() == 1 else _rows(offset).view(wide)
    torch.addcmul(offset, rows.view(wide), scale, out=_rows(out).view(wide))
    return out


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of rows [n, C], at least float32; ``var_mean`` is several times slower."""
    rows = widen(rows)
    weights = rows.new_full((1, len(rows)), 1 / len(rows))  # a matrix product sums faster than a reduction
    with torch.autocast("cpu", enabled=False):  # square - mean² would leave nothing of eight bits
        mean, square = (weights @ rows)[0], (weights @ rows.square())[0]
    return mean, (square - mean.square()).clamp(min=0)


def normalise_and_measure(images: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An affine map of every channel, and the moments of what it is applied to; differentiable once, in the images.

    Args:
        images: float [N, C, H, W]; fastest in channels-last order.
        scale: float [C], a constant.
        offset: float [C], a constant.

    Returns:
        ``scale * images + offset`` [N, C, H, W], and mean and biased variance of the images, [C], at least float32.
    """
    out, mean, variance = _NormaliseAndMeasure.apply(images, scale, offset)
    return out, mean, variance


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, differentiable once.

    Args:
        images: float [N, C, H, W]; fastest in channels-last order.

    Returns:
        Two float tensors [C], at least float32.
    """
    ones = images.new_ones(images.shape[1])
    return normalise_and_measure(images, ones, torch.zeros_like(ones))[1:]


@contextmanager
def batch_norm_distances(network: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context, every forward pass appends each batch norm's distance to its running statistics.

    Args:
        network: frozen, in eval mode.

    Yields:
        The list that fills: one scalar per layer and pass, ‖μ − μ̄‖₂ + ‖σ² − σ̄²‖₂ of the layer's *input*.
    """
    distances: list[Tensor] = []

    def compare(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        distances.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())

    def normalise(layer: BatchNorm, images: Tensor) -> Tensor:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        scale = layer.weight * torch.rsqrt(layer.running_var + layer.eps)
        out, mean, variance = normalise_and_measure(images, scale, layer.bias - layer.running_mean * scale)
        compare(layer, mean, variance)
        return out

    def watch(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        compare(layer, *channel_moments(inputs[0]))

    others = [layer for layer in batch_norms(network) if not isinstance(layer, BatchNorm)]
    hooks = [layer.register_forward_pre_hook(watch) for layer in others]
    try:
        with normalised_by(normalise):
            yield distances
    finally:
        for hook in hooks:
            hook.remove()


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch-norm layers that keep running statistics.

    Args:
        network: any module.

    Returns:
        The layers, in order of definition.
    """
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]


def inversion_loss(model: PretrainedModel, images: Tensor, labels: Tensor, weights: LossWeights) -> Tensor:
    """The loss of the module's docstring, for images as they are (no shift).

    Args:
        model: frozen.
        images: float [N, C, H, W] in [0, 1].
        labels: int64 [N].
        weights: of the terms.

    Returns:
        A scalar, differentiable in ``images``.
    """
    with batch_norm_distances(model.network) as distances:
        logits = model(images)
    loss = F.cross_entropy(widen(logits), labels)
    if weights.batch_norm and distances:
        loss = loss + weights.batch_norm * torch.stack(distances).sum()
    if weights.total_variation:
        rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
        columns = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
        loss = loss + weights.total_variation * (rows + columns)
    if weights.l2:
        loss = loss + weights.l2 * images.square().mean().sqrt()
    return loss
