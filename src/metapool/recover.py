r"""Recovery: synthetic labelled images out of one frozen model, by generator (TGR) or by pixels (DeepInversion).

Both minimise, over images :math:`x` with wanted labels :math:`y`,

.. math:: \mathrm{CE}(M(A(x)), y)
    + \lambda_{bn} \sum_l (\|\mu_l(x) - \bar\mu_l\|_2 + \|\sigma^2_l(x) - \bar\sigma^2_l\|_2)
    + \lambda_{tv} \mathrm{TV}(x) + \lambda_2 \|x\|_2

where :math:`\bar\mu_l, \bar\sigma^2_l` are the running statistics of the model's batch-norm layers (Yin et al. 2020,
"Dreaming to Distill", equations 2-4; norms not squared) and A shifts images at random. TGR (arXiv 2405.16560, section
3.1) writes :math:`x = G(z)` and fits generator and codes together.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.bank import RecoveredTask, TaskBank
from metapool.base.functional import half_precision, in_chunks, widen
from metapool.base.images import InputSpec, shift, to_bytes, to_float
from metapool.base.store import Settings, Store, generator_for
from metapool.pool import ModelPool, PretrainedModel

VERSION = 3


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


class Recovery(Protocol):
    """A way to recover one task."""

    def recover(self, model: PretrainedModel, generator: torch.Generator) -> RecoveredTask:
        """Labelled images out of a frozen model."""


class Generator(nn.Module):
    """Codes to images in [0, 1]: TGR's generator (papers' tools.py), for any size.

    Linear to 2·width channels at a quarter of the size, two nearest-neighbour doublings with 3×3 convolutions, batch
    norm and leaky ReLU, a last convolution and a sigmoid.

    Args:
        code: length of a code.
        width: channels of the last block ("ngf"; 64 in the paper).
        input: size and channels of the images.
    """

    def __init__(self, code: int, width: int, input: InputSpec) -> None:
        super().__init__()
        self.input = input
        self.start = (2 * width, -(-input.height // 4), -(-input.width // 4))
        self.linear = nn.Linear(code, self.start[0] * self.start[1] * self.start[2])
        self.body = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, input.channels, 3, padding=1),
        )

    def initialise(self, generator: torch.Generator) -> "Generator":
        """Draws the weights: N(0, 0.02), batch-norm gains N(1, 0.02), biases 0 (as in DCGAN).

        Args:
            generator: source of the weights.

        Returns:
            The generator itself.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                gain = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
                nn.init.normal_(module.weight, gain, 0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return self

    def forward(self, codes: Tensor) -> Tensor:
        """Images of codes.

        Args:
            codes: float [N, code].

        Returns:
            float [N, C, H, W] in [0, 1].
        """
        start = self.linear(codes).view(-1, *self.start).contiguous(memory_format=torch.channels_last)
        images: Tensor = self.body(start)[..., : self.input.height, : self.input.width]
        return images.float().sigmoid()


class GeneratorRecovery(Settings):
    """A generator and its codes are fitted together to one model (TGR, section 3.1)."""

    name: Literal["generator"] = "generator"
    """Which recovery this is."""
    per_class: int = pydantic.Field(default=30, ge=1)
    """Images recovered of every class."""
    steps: int = pydantic.Field(default=200, ge=0)
    """Adam steps; 0 leaves the generator untrained, its images stretched to full contrast (the input control)."""
    learning_rate: float = pydantic.Field(default=1e-2, gt=0)
    """Of generator and codes. The paper's 1e-3 recovers worse in 200 steps (docs/lab-notes.md)."""
    code: int = pydantic.Field(default=256, ge=1)
    """Length of a code ("nz")."""
    width: int = pydantic.Field(default=64, ge=1)
    """Channels of the generator's last block ("ngf")."""
    shift: int = pydantic.Field(default=2, ge=0)
    """Largest random shift of the images before the model sees them, in pixels."""
    weights: LossWeights = LossWeights()
    """Of the loss."""
    seed: int = 0
    """Of initial weights, codes and shifts; every model draws from a seed of its own name."""

    def recover(self, model: PretrainedModel, generator: torch.Generator) -> RecoveredTask:
        """Labelled images out of a frozen model.

        Args:
            model: any frozen classifier.
            generator: source of all randomness.

        Returns:
            The iterate with the lowest loss, balanced over the classes.
        """
        labels = torch.arange(len(model.classes)).repeat_interleave(self.per_class)
        painter = Generator(self.code, self.width, model.input).initialise(generator)
        painter = painter.to(memory_format=torch.channels_last).train()
        codes = torch.randn(len(labels), self.code, generator=generator).requires_grad_()
        unknowns = [*painter.parameters(), codes]

        def images_of() -> Tensor:
            images: Tensor = painter(codes)
            # An untrained generator paints grey on grey; a control that shows nothing would be too easy to beat.
            return images if self.steps else full_contrast(images)

        return _minimise(
            model, labels, images_of, unknowns, self.steps, self.learning_rate, self.shift, self.weights,
            generator,
        )  # fmt: skip


class PixelRecovery(Settings):
    """The pixels themselves are fitted to one model (DeepInversion)."""

    name: Literal["pixels"] = "pixels"
    """Which recovery this is."""
    per_class: int = pydantic.Field(default=30, ge=1)
    """Images recovered of every class."""
    steps: int = pydantic.Field(default=300, ge=0)
    """Adam steps."""
    learning_rate: float = pydantic.Field(default=5e-2, gt=0)
    """Of the pixels' logits."""
    shift: int = pydantic.Field(default=2, ge=0)
    """Largest random shift ("jitter"), in pixels."""
    weights: LossWeights = LossWeights(total_variation=0.1)
    """Of the loss."""
    seed: int = 0
    """Of initial pixels and shifts; every model draws from a seed of its own name."""

    def recover(self, model: PretrainedModel, generator: torch.Generator) -> RecoveredTask:
        """Labelled images out of a frozen model.

        Args:
            model: any frozen classifier.
            generator: source of all randomness.

        Returns:
            The iterate with the lowest loss, balanced over the classes.
        """
        labels = torch.arange(len(model.classes)).repeat_interleave(self.per_class)
        pixels = torch.randn(len(labels), *model.input.shape, generator=generator).requires_grad_()
        return _minimise(
            model, labels, lambda: pixels.sigmoid(), [pixels], self.steps, self.learning_rate, self.shift, self.weights,
            generator,
        )  # fmt: skip


AnyRecovery = Annotated[GeneratorRecovery | PixelRecovery, pydantic.Field(discriminator="name")]


class _ChannelMoments(torch.autograd.Function):
    """Mean and biased variance per channel, one pass forward and one back; ``var_mean`` is several times slower."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
        rows = widen(rows)
        weights = rows.new_full((1, len(rows)), 1 / len(rows))  # a matrix product sums faster than a reduction
        with torch.autocast("cpu", enabled=False):  # square - mean² would leave nothing of eight bits
            mean, square = (weights @ rows)[0], (weights @ rows.square())[0]
        ctx.save_for_backward(images, mean)
        return mean, (square - mean.square()).clamp(min=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, mean_gradient: Tensor, variance_gradient: Tensor) -> Tensor:
        # d mean / dx = 1/n and d variance / dx = 2 (x - mean) / n, so the gradient is affine in x.
        images, mean = ctx.saved_tensors
        count = images.numel() // images.shape[1]
        slope = 2 * variance_gradient / count
        offset = mean_gradient / count - slope * mean
        shape = (1, -1, 1, 1)
        return torch.addcmul(offset.to(images.dtype).view(shape), images, slope.to(images.dtype).view(shape))


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, differentiable once.

    Args:
        images: float [N, C, H, W]; fastest in channels-last order.

    Returns:
        Two float tensors [C], at least float32.
    """
    mean, variance = _ChannelMoments.apply(images)
    return mean, variance


def full_contrast(images: Tensor) -> Tensor:
    """Every image stretched linearly from black to white.

    Args:
        images: float [N, C, H, W].

    Returns:
        float [N, C, H, W] in [0, 1]; a constant image becomes black.
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-6)


@contextmanager
def batch_norm_distances(network: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context, every forward pass appends each batch norm's distance to its running statistics.

    Args:
        network: in eval mode.

    Yields:
        The list that fills: one scalar per layer and pass, ‖μ − μ̄‖₂ + ‖σ² − σ̄²‖₂ of the layer's *input*.
    """
    distances: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = channel_moments(inputs[0])
        assert isinstance(module.running_mean, Tensor)
        assert isinstance(module.running_var, Tensor)
        distances.append((mean - module.running_mean).norm() + (variance - module.running_var).norm())

    layers = batch_norms(network)
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
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


def _minimise(
    model: PretrainedModel,
    labels: Tensor,
    images_of: "ImagesOf",
    unknowns: list[Tensor],
    steps: int,
    learning_rate: float,
    pixels: int,
    weights: LossWeights,
    generator: torch.Generator,
) -> RecoveredTask:
    """Adam on the inversion loss; keeps a copy of the images with the lowest loss."""
    started = time.perf_counter()
    if weights.batch_norm and not batch_norms(model.network):
        warnings.warn(
            f"model {model.id!r} has no batch norm: recovered with image priors only, expect poorer images",
            stacklevel=3,
        )
        weights = PRIORS
    optimizer = torch.optim.Adam(unknowns, learning_rate, betas=(0.5, 0.999), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), learning_rate / 10)
    best, lowest = images_of().detach(), float("inf")
    for _ in range(steps):
        with half_precision():
            images = images_of()
            loss = inversion_loss(model, shift(images, pixels, generator), labels, weights)
        if loss.item() < lowest:
            best, lowest = images.detach().clone(), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if steps == 0:
        lowest = inversion_loss(model, best, labels, weights).item()
    stored = to_bytes(best)
    logits = in_chunks(model, to_float(stored))
    record = {
        "loss": lowest,
        "cross_entropy": F.cross_entropy(logits, labels).item(),
        "agreement": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "seconds": time.perf_counter() - started,
    }
    return RecoveredTask(stored, labels, logits, model.classes, record)


class ImagesOf(Protocol):
    """The current images as a function of the unknowns."""

    def __call__(self) -> Tensor:
        """Images, float [N, C, H, W] in [0, 1]."""


def recover_pool(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery, store: Store) -> TaskBank:
    """Recovers every model of a pool, in parallel, each once.

    Args:
        pool: the models.
        recovery: how.
        store: where recovered tasks are kept.

    Returns:
        The bank, in the order of the pool.
    """
    settings = recovery.model_dump(mode="json")
    keys = {id: {"model": pool.model_digest(id), "id": id, "recovery": settings, "version": VERSION} for id in pool.ids}
    return TaskBank(store.units("recover", keys, partial(_recover_unit, pool, recovery)))


def _recover_unit(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery, id: str, folder: Path) -> None:
    recovery.recover(pool.get(id), generator_for(recovery.seed, "recover", id)).save(folder)
