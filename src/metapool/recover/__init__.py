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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from metapool.bank import RecoveredTask, TaskBank
from metapool.base.functional import half_precision, in_chunks
from metapool.base.images import shift, to_bytes, to_float
from metapool.base.store import Settings, Store, generator_for
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover.loss import (
    PRIORS,
    LossWeights,
    batch_norm_distances,
    batch_norms,
    channel_moments,
    inversion_loss,
)
from metapool.recover.painter import Generator, full_contrast

__all__ = [
    "PRIORS",
    "AnyRecovery",
    "Generator",
    "GeneratorRecovery",
    "Inversion",
    "LossWeights",
    "PixelRecovery",
    "Recovery",
    "batch_norm_distances",
    "batch_norms",
    "channel_moments",
    "common_key",
    "full_contrast",
    "inversion_loss",
    "recover_keys",
    "recover_pool",
]

VERSION = 4


class Recovery(Protocol):
    """A way to recover one task."""

    def recover(self, model: PretrainedModel, generator: torch.Generator) -> RecoveredTask:
        """Labelled images out of a frozen model."""


class _Minimising(Settings):
    """What the recoveries share: Adam on the inversion loss of images that hang on unknowns."""

    per_class: int = pydantic.Field(default=30, ge=1)
    """Images recovered of every class."""
    steps: int = pydantic.Field(ge=0)
    """Adam steps."""
    learning_rate: float = pydantic.Field(gt=0)
    """Of Adam; it falls to a tenth along half a cosine."""
    shift: int = pydantic.Field(default=2, ge=0)
    """Largest random shift ("jitter") of the images before the model sees them, in pixels."""
    weights: LossWeights = LossWeights()
    """Of the loss."""
    seed: int = 0
    """Of everything random; every model draws from a seed of its own name."""

    def recover(
        self, model: PretrainedModel, generator: torch.Generator, common: Mapping[str, Tensor] | None = None
    ) -> RecoveredTask:
        """Labelled images out of a frozen model.

        Args:
            model: any frozen classifier.
            generator: source of all randomness.
            common: weights to start from, see :class:`GeneratorRecovery`.

        Returns:
            The iterate with the lowest loss, balanced over the classes.
        """
        started = time.perf_counter()
        inversion = Inversion(self, model, generator, common)
        for _ in range(self.steps):
            inversion.step()
        images, labels = to_bytes(inversion.best), inversion.labels
        logits = in_chunks(model, to_float(images), 128)
        record = {
            "loss": inversion.lowest,
            "cross_entropy": F.cross_entropy(logits, labels).item(),
            "agreement": 100 * (logits.argmax(1) == labels).double().mean().item(),
            "seconds": time.perf_counter() - started,
        }
        return RecoveredTask(images, labels, logits, model.classes, record)

    def _start(
        self, model: PretrainedModel, count: int, generator: torch.Generator, common: Mapping[str, Tensor] | None
    ) -> tuple["ImagesOf", list[Tensor]]:
        """Where the descent begins: ``count`` images [N, C, H, W] as a function, and the unknowns that they hang on."""
        raise NotImplementedError


class GeneratorRecovery(_Minimising):
    """A generator and its codes are fitted together to one model (TGR, section 3.1)."""

    name: Literal["generator"] = "generator"
    """Which recovery this is."""
    steps: int = pydantic.Field(default=200, ge=0)
    """Adam steps; 0 leaves the generator untrained, its images stretched to full contrast (the input control)."""
    learning_rate: float = pydantic.Field(default=1e-2, gt=0)
    """Of generator and codes. The paper's 1e-3 recovers worse in 200 steps (docs/lab-notes.md)."""
    code: int = pydantic.Field(default=256, ge=1)
    """Length of a code ("nz")."""
    width: int = pydantic.Field(default=64, ge=1)
    """Channels of the generator's last block ("ngf")."""
    warm_steps: int = pydantic.Field(default=0, ge=0)
    """Steps that a common generator takes first, on the pool's first model; the generator of every model of that input
    size then starts from it, and needs half the steps (docs/lab-notes.md). 0: all start from random weights."""

    def _start(
        self, model: PretrainedModel, count: int, generator: torch.Generator, common: Mapping[str, Tensor] | None
    ) -> tuple["ImagesOf", list[Tensor]]:
        """A generator, its weights the common ones where they are of its size, and fresh codes."""
        painter = Generator(self.code, self.width, model.input).initialise(generator)
        state = painter.state_dict()
        if common is not None and all(common[name].shape == value.shape for name, value in state.items()):
            painter.load_state_dict(dict(common))
        painter = painter.to(memory_format=torch.channels_last).train()
        codes = torch.randn(count, self.code, generator=generator).requires_grad_()

        def images_of() -> Tensor:
            images: Tensor = painter(codes)
            # An untrained generator paints grey on grey; a control that shows nothing would be too easy to beat.
            return images if self.steps else full_contrast(images)

        return ImagesOf(images_of, painter), [*painter.parameters(), codes]


class PixelRecovery(_Minimising):
    """The pixels themselves are fitted to one model (DeepInversion)."""

    name: Literal["pixels"] = "pixels"
    """Which recovery this is."""
    steps: int = pydantic.Field(default=300, ge=0)
    """Adam steps."""
    learning_rate: float = pydantic.Field(default=5e-2, gt=0)
    """Of the pixels' logits."""
    weights: LossWeights = LossWeights(total_variation=0.1)
    """Of the loss."""

    def _start(
        self, model: PretrainedModel, count: int, generator: torch.Generator, common: Mapping[str, Tensor] | None
    ) -> tuple["ImagesOf", list[Tensor]]:
        """Random pixels."""
        pixels = torch.randn(count, *model.input.shape, generator=generator).requires_grad_()
        return ImagesOf(pixels.sigmoid), [pixels]


AnyRecovery = Annotated[GeneratorRecovery | PixelRecovery, pydantic.Field(discriminator="name")]


class Inversion:
    """The descent on one model's inversion loss; the images with the lowest loss are kept.

    Args:
        settings: of the recovery.
        model: frozen.
        generator: source of all randomness.
        common: weights to start from, where there are any.

    Attributes:
        labels: int64 [N], class-major.
        best: float [N, C, H, W] in [0, 1], the images with the lowest loss so far.
        lowest: their loss.
    """

    def __init__(
        self,
        settings: _Minimising,
        model: PretrainedModel,
        generator: torch.Generator,
        common: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.labels = torch.arange(len(model.classes)).repeat_interleave(settings.per_class)
        self.model, self.pixels, self.weights, self.generator = model, settings.shift, settings.weights, generator
        self.images_of, self.unknowns = settings._start(model, len(self.labels), generator, common)
        if self.weights.batch_norm and not batch_norms(model.network):
            warnings.warn(
                f"model {model.id!r} has no batch norm: recovered with image priors only, expect poorer images",
                stacklevel=3,
            )
            self.weights = PRIORS
        rate = settings.learning_rate
        self.optimizer = torch.optim.Adam(self.unknowns, rate, betas=(0.5, 0.999), fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(settings.steps, 1), rate / 10)
        self.best = self.images_of().detach()
        self.lowest = float("inf") if settings.steps else self.loss(self.best).item()

    def loss(self, images: Tensor) -> Tensor:
        """The inversion loss with the weights that fit the model.

        Args:
            images: float [N, C, H, W] in [0, 1].

        Returns:
            A scalar.
        """
        return inversion_loss(self.model, images, self.labels, self.weights)

    def gradient(self) -> float:
        """Fills the gradients of the unknowns, for images shifted at random.

        Returns:
            The loss.
        """
        with half_precision():
            images = self.images_of()
            loss = self.loss(shift(images, self.pixels, self.generator))
        if loss.item() < self.lowest:
            self.best, self.lowest = images.detach().clone(), loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        return loss.item()

    def step(self) -> float:
        """One step of Adam.

        Returns:
            The loss before it.
        """
        loss = self.gradient()
        self.optimizer.step()
        self.schedule.step()
        return loss


@dataclass(frozen=True)
class ImagesOf:
    """The current images as a function of the unknowns.

    Attributes:
        images: gives float [N, C, H, W] in [0, 1].
        painter: the network that they come from, if one does.
    """

    images: Callable[[], Tensor]
    painter: Generator | None = None

    def __call__(self) -> Tensor:
        """The images.

        Returns:
            float [N, C, H, W] in [0, 1].
        """
        return self.images()


def recover_pool(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery, store: Store) -> TaskBank:
    """Recovers every model of a pool, in parallel, each once.

    Args:
        pool: the models.
        recovery: how.
        store: where recovered tasks are kept.

    Returns:
        The bank, in the order of the pool.
    """
    common: Path | None = None
    if (key := common_key(pool, recovery)) is not None:
        common = store.artifact("common", key, partial(_write_common, pool, recovery))
    return TaskBank(
        store.units("recover", recover_keys(pool, recovery), partial(_recover_unit, pool, recovery, common))
    )


def recover_keys(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery) -> dict[str, dict[str, Any]]:
    """Keys of the store by model id: what every recovered task depends on."""
    shared = {"recovery": recovery.model_dump(mode="json"), "common": common_key(pool, recovery), "version": VERSION}
    return {id: {"model": pool.model_digest(id), "id": id, **shared} for id in pool.ids}


def common_key(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery) -> dict[str, Any] | None:
    """Key of the weights that all generators start from; none where they start afresh."""
    if not (isinstance(recovery, GeneratorRecovery) and recovery.steps and recovery.warm_steps):
        return None
    settings = recovery.model_dump(mode="json", exclude={"steps"})
    return {"model": pool.model_digest(pool.ids[0]), "recovery": settings, "version": VERSION}


def _write_common(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery, folder: Path) -> None:
    assert isinstance(recovery, GeneratorRecovery)
    settings = recovery.model_copy(update={"steps": recovery.warm_steps})
    inversion = Inversion(settings, pool[0], generator_for(recovery.seed, "recover", "common"))
    for _ in range(settings.steps):
        inversion.step()
    assert inversion.images_of.painter is not None
    state = inversion.images_of.painter.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "painter.safetensors")


def _recover_unit(
    pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery, common: Path | None, id: str, folder: Path
) -> None:
    weights = None if common is None else load_file(common / "painter.safetensors")
    recovery.recover(pool.get(id), generator_for(recovery.seed, "recover", id), weights).save(folder)
