"""Networks as pure functions of their parameters, and batch norm whose statistics are an argument.

``call(network, params, images)`` never changes the network. Three sources of batch-norm statistics cover every use:
the batch itself (training), its first S images (MetaBN: the support set speaks for the queries, so that no query sees
another), or given running statistics (inference).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]
Statistics = Mapping[str, Tensor]

_first_images: ContextVar[int | None] = ContextVar("first_images", default=None)
_instead: ContextVar["Callable[[BatchNorm, Tensor], Tensor] | None"] = ContextVar("instead", default=None)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that can take its statistics from the first S images of the batch, differentiably.

    Inside :func:`statistics_of_first` all images are normalised by the statistics of the first S ("MetaBN", Bronskill
    et al. 2020, TaskNorm, section 3). Elsewhere it is ``nn.BatchNorm2d``.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Normalises.

        Args:
            images: float [N, C, H, W].

        Returns:
            float [N, C, H, W].
        """
        first, instead = _first_images.get(), _instead.get()
        if instead is not None:
            return instead(self, images)
        if first is None:
            return super().forward(images)
        if first == len(images):
            return F.batch_norm(images, None, None, self.weight, self.bias, training=True, eps=self.eps)
        variance, mean = torch.var_mean(images[:first], (0, 2, 3), correction=0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        offset = self.bias - mean * scale
        return torch.addcmul(offset.view(1, -1, 1, 1), images, scale.view(1, -1, 1, 1))


def convolve_and_normalise(convolution: nn.Conv2d, norm: BatchNorm, images: Tensor) -> Tensor:
    r"""``norm(convolution(images))``, without a pass over the result where its statistics are known before.

    What normalises a channel then goes into the convolution's weights. Running statistics are known; those of the
    batch follow from the input's: a channel is :math:`w \cdot p + b` of patches p, so its mean is :math:`w \cdot E p
    + b` and its variance :math:`w^\top \mathrm{Cov}(p)\, w`, and with few inputs the patches' covariance is cheap.
    Differentiable as often as asked for.

    Args:
        convolution: with zero padding, in one group.
        norm: of its outputs.
        images: float [N, C, H, W].

    Returns:
        float [N, O, H', W'].
    """
    first, weight = _first_images.get(), convolution.weight
    bias = convolution.bias
    few = len(weight) >= _WORTH * weight[0].numel()
    # Whoever hooks a module wants to see what passes it: it must be called.
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (convolution, norm))
    if hooked or _instead.get() or (norm.training if first is None else bias is None or not few):
        out: Tensor = norm(convolution(images))
        return out
    if first is None:
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        offset = -norm.running_mean if bias is None else bias - norm.running_mean
        bias = norm.bias + offset * scale
        return _convolve(convolution, weight * scale.view(-1, 1, 1, 1), bias, images)
    assert bias is not None
    with torch.autocast("cpu", enabled=False):
        seen = F.unfold(
            widen(images[:first]),
            convolution.kernel_size,
            convolution.dilation,
            int(convolution.padding[0]),
            convolution.stride,
        )
        patches = seen.transpose(0, 1).reshape(seen.shape[1], -1)
        centre = patches.mean(1, keepdim=True)
        covariance = (patches - centre) @ (patches - centre).T / patches.shape[1]
        rows = weight.flatten(1)
        scale = norm.weight * torch.rsqrt(((rows @ covariance) * rows).sum(1) + norm.eps)
        mean = (rows @ centre)[:, 0] + bias
        bias = norm.bias + (bias - mean) * scale
        weight = weight * scale.view(-1, 1, 1, 1)
    return _convolve(convolution, weight, bias, images)


def _convolve(like: nn.Conv2d, weight: Tensor, bias: Tensor, images: Tensor) -> Tensor:
    return F.conv2d(images, weight, bias, like.stride, like.padding, like.dilation, like.groups)


_WORTH = 4  # outputs per number of a patch: 64 channels out of one were 1.2 times faster, 32 out of three slower


@contextmanager
def statistics_of_first(count: int) -> Iterator[None]:
    """Within the context, every :class:`BatchNorm` uses the statistics of the first ``count`` images.

    Args:
        count: S, at most the number of images.

    Yields:
        Nothing.
    """
    token = _first_images.set(count)
    try:
        yield
    finally:
        _first_images.reset(token)


@contextmanager
def normalised_by(function: Callable[[BatchNorm, Tensor], Tensor]) -> Iterator[None]:
    """Within the context, every :class:`BatchNorm` leaves its work to a function.

    Args:
        function: of the layer and its input [N, C, H, W], to its output of the same shape.

    Yields:
        Nothing.
    """
    token = _instead.set(function)
    try:
        yield
    finally:
        _instead.reset(token)


def params_of(network: nn.Module) -> Params:
    """Copies of the trainable parameters, ready for gradients.

    Args:
        network: any module.

    Returns:
        Leaf tensors by name.
    """
    return {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}


def call(
    network: nn.Module,
    params: Params,
    images: Tensor,
    *,
    first: int | None = None,
    statistics: Statistics | None = None,
    method: str = "forward",
    **options: int,
) -> Tensor:
    """The network as a function of its parameters.

    Args:
        network: a module whose batch norms are :class:`BatchNorm`.
        params: parameters by name; absent ones are the network's own.
        images: float [N, C, H, W], already normalised by the input spec.
        first: batch-norm statistics come from the first ``first`` images; all of the batch when neither this nor
            ``statistics`` is given.
        statistics: running statistics by buffer name (inference).
        method: ``"forward"`` for logits, ``"features"`` for the encoder alone.
        **options: of the method.

    Returns:
        float [N, K] or [N, D].
    """
    context: Any = nullcontext() if statistics is not None else statistics_of_first(first or len(images))
    with context:
        out: Tensor = torch.func.functional_call(
            _Method(network, method),
            {f"network.{k}": v for k, v in {**params, **(statistics or {})}.items()},
            images,
            options,
        )
    return out


class _Method(nn.Module):
    """Another method of a module as ``forward``, since ``functional_call`` knows no other."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, images: Tensor, **options: int) -> Tensor:
        out: Tensor = getattr(self.network, self.method)(images, **options)
        return out


def running_statistics(network: nn.Module, params: Params, images: Tensor, chunk: int = 256) -> dict[str, Tensor]:
    """Batch-norm statistics re-estimated on images, layer by layer exactly as the network will use them.

    Args:
        network: a module; not changed.
        params: parameters by name.
        images: float [N, C, H, W], normalised.
        chunk: images per forward pass; the statistics are the mean over equal chunks.

    Returns:
        The network's buffers by name, with ``running_mean`` and ``running_var`` replaced.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    saved = [(module.training, module.momentum) for module in norms]
    for module in norms:
        module.train()
        module.momentum = None  # cumulative average
    for name, buffer in buffers.items():
        buffer.fill_(1 if name.endswith("running_var") else 0)
    with torch.no_grad():
        for part in images.split(chunk):
            if len(part) == chunk or len(images) < chunk:
                torch.func.functional_call(network, {**params, **buffers}, part)
    for module, (training, momentum) in zip(norms, saved):
        module.train(training)
        module.momentum = momentum
    return buffers


def in_chunks(function: Callable[[Tensor], Tensor], images: Tensor, chunk: int = 256) -> Tensor:
    """Applies a function to images in chunks without gradients, so that memory stays bounded.

    Args:
        function: [n, …] to [n, …].
        images: [N, …].
        chunk: n.

    Returns:
        [N, …].
    """
    out: Tensor | None = None
    with torch.no_grad():
        for start in range(0, len(images), chunk):
            part = function(images[start : start + chunk])
            if out is None:  # the whole is allocated once: collected parts would be held twice
                out = part.new_empty((len(images), *part.shape[1:]))
            out[start : start + chunk] = part
        return function(images) if out is None else out


def widen(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay as they are.

    Args:
        tensor: floating point, any shape.

    Returns:
        Same shape.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def half_precision() -> torch.autocast:
    """Autocast to bfloat16 where the processor multiplies it natively (AMX, or a GPU), else no cast.

    Returns:
        A context manager. Outside AMX, bfloat16 convolutions on a CPU are slower than float32.
    """
    native = bool(torch.cpu._is_amx_tile_supported())
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=native)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of features, safe to divide by.

    Args:
        features: float [N, D].

    Returns:
        Mean [D] and deviation [D]; a unit that never moves gets a small deviation, lest it blow up on other images.
    """
    std, mean = torch.std_mean(features.float(), 0)
    return mean, std + 1e-3 * std.mean() + 1e-6


def whitening(features: Tensor, power: float, dimensions: int | None = None) -> Tensor:
    r"""A linear map that evens out how much each direction of feature space says, :math:`W = U \Lambda^{-p/2}`.

    :math:`U \Lambda U^\top` is the second moment :math:`E[f f^\top]`, not centred: cosines are taken from the origin.

    Args:
        features: float [N, D].
        power: p in [0, 1]; 0 only rotates, 1 whitens.
        dimensions: k, the strongest directions to keep; all D when not given.

    Returns:
        W, float32 [D, k].
    """
    rows = features.double()
    # Decomposed in single precision, ten times faster: weak directions, which it blurs, are levelled below.
    strength, axes = torch.linalg.eigh((rows.T @ rows / len(rows)).float())
    strength, axes = strength.flip(0), axes.flip(1)
    kept = min(dimensions or len(strength), len(strength))
    # A direction without strength is noise: it gets no more weight than a weak one.
    strength = strength.clamp(min=1e-5 * float(strength[0]))[:kept]
    weights: Tensor = axes[:, :kept] * strength.pow(-power / 2)
    return weights.float().contiguous()
