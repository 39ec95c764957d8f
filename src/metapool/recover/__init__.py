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
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic
import torch
import torch.nn.functional as F
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

    def recover(self, model: PretrainedModel, generator: torch.Generator) -> RecoveredTask:
        """Labelled images out of a frozen model.

        Args:
            model: any frozen classifier.
            generator: source of all randomness.

        Returns:
            The iterate with the lowest loss, balanced over the classes.
        """
        started = time.perf_counter()
        inversion = Inversion(self, model, generator)
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

    def start(self, model: PretrainedModel, count: int, generator: torch.Generator) -> tuple["ImagesOf", list[Tensor]]:
        """Where the descent begins.

        Args:
            model: any frozen classifier.
            count: N.
            generator: source of initial values.

        Returns:
            The images [N, C, H, W] as a function, and the unknowns that they hang on.
        """
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

    def start(self, model: PretrainedModel, count: int, generator: torch.Generator) -> tuple["ImagesOf", list[Tensor]]:
        """A fresh generator and codes.

        Args:
            model: any frozen classifier.
            count: N.
            generator: source of initial values.

        Returns:
            The images [N, C, H, W] as a function, and the unknowns that they hang on.
        """
        painter = Generator(self.code, self.width, model.input).initialise(generator)
        painter = painter.to(memory_format=torch.channels_last).train()
        codes = torch.randn(count, self.code, generator=generator).requires_grad_()

        def images_of() -> Tensor:
            images: Tensor = painter(codes)
            # An untrained generator paints grey on grey; a control that shows nothing would be too easy to beat.
            return images if self.steps else full_contrast(images)

        return images_of, [*painter.parameters(), codes]


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

    def start(self, model: PretrainedModel, count: int, generator: torch.Generator) -> tuple["ImagesOf", list[Tensor]]:
        """Random pixels.

        Args:
            model: any frozen classifier.
            count: N.
            generator: source of initial values.

        Returns:
            The images [N, C, H, W] as a function, and the unknowns that they hang on.
        """
        pixels = torch.randn(count, *model.input.shape, generator=generator).requires_grad_()
        return lambda: pixels.sigmoid(), [pixels]


AnyRecovery = Annotated[GeneratorRecovery | PixelRecovery, pydantic.Field(discriminator="name")]


class Inversion:
    """The descent on one model's inversion loss; the images with the lowest loss are kept.

    Args:
        settings: of the recovery.
        model: frozen.
        generator: source of all randomness.

    Attributes:
        labels: int64 [N], class-major.
        best: float [N, C, H, W] in [0, 1], the images with the lowest loss so far.
        lowest: their loss.
    """

    def __init__(self, settings: _Minimising, model: PretrainedModel, generator: torch.Generator) -> None:
        self.labels = torch.arange(len(model.classes)).repeat_interleave(settings.per_class)
        self.model, self.pixels, self.weights, self.generator = model, settings.shift, settings.weights, generator
        self.images_of, self.unknowns = settings.start(model, len(self.labels), generator)
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
    return TaskBank(store.units("recover", recover_keys(pool, recovery), partial(_recover_unit, pool, recovery)))


def recover_keys(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery) -> dict[str, dict[str, Any]]:
    """Keys of the store by model id: what every recovered task depends on."""
    settings = recovery.model_dump(mode="json")
    return {id: {"model": pool.model_digest(id), "id": id, "recovery": settings, "version": VERSION} for id in pool.ids}


def _recover_unit(pool: ModelPool, recovery: GeneratorRecovery | PixelRecovery, id: str, folder: Path) -> None:
    recovery.recover(pool.get(id), generator_for(recovery.seed, "recover", id)).save(folder)
