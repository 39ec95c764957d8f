"""Images inside the system: float32 NCHW in [0, 1], not normalised; on disk and in memory uint8."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.store import Settings, digest_of

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def _in_order(scales: tuple[float, float]) -> tuple[float, float]:
    if scales[0] > scales[1]:
        raise ValueError(f"the least size comes first, then the largest: {scales[1]} {scales[0]}")
    return scales


Scales = Annotated[tuple[pydantic.PositiveFloat, pydantic.PositiveFloat], pydantic.AfterValidator(_in_order)]
"""Least and largest size of a picture relative to its frame (:func:`place`)."""


class InputSpec(Settings):
    """What a network expects of its input; travels with its weights, because a wrong guess is silently wrong."""

    channels: int = pydantic.Field(ge=1)
    """Number of image channels (1 grey, 3 RGB)."""
    height: int = pydantic.Field(ge=1, le=1024)
    """Height in pixels."""
    width: int = pydantic.Field(ge=1, le=1024)
    """Width in pixels."""
    mean: tuple[pydantic.FiniteFloat, ...]
    """Mean per channel, of images in [0, 1]."""
    std: tuple[pydantic.FiniteFloat, ...]
    """Standard deviation per channel, of images in [0, 1]."""

    @pydantic.model_validator(mode="after")
    def _one_number_per_channel(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} numbers each, one per channel")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(C, H, W)``."""
        return self.channels, self.height, self.width

    def fit(self, images: Tensor) -> Tensor:
        """Converts channels and size, without normalising.

        Args:
            images: float [N, C', H', W'] in [0, 1].

        Returns:
            float [N, C, H, W] in [0, 1].
        """
        return resize(convert_channels(images, self.channels), self.height, self.width)

    def prepare(self, images: Tensor) -> Tensor:
        """What the network is to see of images of any size and number of channels.

        Args:
            images: float [N, C', H', W'] in [0, 1].

        Returns:
            float [N, C, H, W], converted, resized and normalised by ``mean`` and ``std``.
        """
        images = self.fit(images)
        mean = images.new_tensor(self.mean).view(1, -1, 1, 1)
        std = images.new_tensor(self.std).view(1, -1, 1, 1)
        return (images - mean) / std


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels and class names.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], in [0, K).
        classes: K names.
        domains: K names of domains, where classes of several stand side by side; empty where all are of one.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    domains: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Hash of images, labels and names.

        Returns:
            16 hexadecimal digits.
        """
        parts = [digest_of_tensor(self.images), digest_of_tensor(self.labels), list(self.classes)]
        return digest_of([*parts, list(self.domains)] if self.domains else parts)

    def by_domain(self) -> dict[str, list[int]]:
        """Which classes are of one domain; episodes are drawn within it.

        Returns:
            Labels by domain; all of them under an empty name where domains are not told apart.
        """
        names = self.domains or ("",) * len(self.classes)
        return {name: [label for label, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}

    @property
    def fewest_classes(self) -> int:
        """Number of classes of the domain that has fewest: the largest way of an episode."""
        return min(map(len, self.by_domain().values()))

    def take(self, rows: Tensor) -> "LabelledImages":
        """Only some images, in the order given.

        Args:
            rows: int64 indices.

        Returns:
            These images, with the same class names.
        """
        return LabelledImages(self.images[rows], self.labels[rows], self.classes, self.domains)

    def select(self, classes: Sequence[int]) -> "LabelledImages":
        """Only some classes, relabelled 0, 1, … in the order given.

        Args:
            classes: labels to keep.

        Returns:
            The images of these classes.
        """
        new_label = torch.full((len(self.classes),), -1)
        new_label[list(classes)] = torch.arange(len(classes))
        labels = new_label[self.labels]
        kept = labels >= 0
        names, domains = (tuple(every[k] for k in classes if every) for every in (self.classes, self.domains))
        return LabelledImages(self.images[kept], labels[kept], names, domains)


def digest_of_tensor(tensor: Tensor) -> str:
    """Hash of a tensor's type, shape and bytes.

    Args:
        tensor: any CPU tensor that NumPy can represent.

    Returns:
        16 hexadecimal digits.
    """
    import hashlib

    array = tensor.detach().contiguous().numpy()
    header = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(header + array.tobytes()).hexdigest()[:16]


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Grey to colour by repetition, colour to grey by luma (ITU-R BT.601).

    Args:
        images: float [N, C', H, W].
        channels: the wanted C.

    Returns:
        float [N, C, H, W].

    Raises:
        MetapoolError: when neither side is grey and the numbers differ.
    """
    present = images.shape[1]
    if present == channels:
        return images
    if present == 1:
        return images.expand(-1, channels, -1, -1)
    if channels == 1 and present == 3:
        return (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if channels == 1:
        return images.mean(1, keepdim=True)
    raise MetapoolError(f"cannot turn images of {present} channels into {channels}: one side must be grey")


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Another size, bilinear with antialiasing.

    Args:
        images: float [N, C, H', W'].
        height: the wanted H.
        width: the wanted W.

    Returns:
        float [N, C, H, W]; the same tensor where the size is right already.
    """
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def to_float(images: Tensor) -> Tensor:
    """Stored bytes to working range.

    Args:
        images: uint8, any shape.

    Returns:
        float32 in [0, 1], same shape.
    """
    return images.float() / 255


def to_bytes(images: Tensor) -> Tensor:
    """Working range to stored bytes, by rounding.

    Args:
        images: float in [0, 1], any shape.

    Returns:
        uint8, same shape.
    """
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Random shift of each image by its own offset, borders repeated.

    Args:
        images: float [N, C, H, W].
        pixels: largest shift in either direction.
        generator: source of the offsets.

    Returns:
        float [N, C, H, W], differentiable in ``images``.
    """
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator)
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    rows = (offsets[0] + torch.arange(height)).view(count, 1, height, 1)
    columns = (offsets[1] + torch.arange(width)).view(count, 1, 1, width)
    return padded[torch.arange(count).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1), rows, columns]


def augment(images: Tensor, pixels: int, zoom: float, generator: torch.Generator) -> Tensor:
    """Random zoom and shift of each image, bilinear, borders repeated. No flips: an arrow has a direction.

    Args:
        images: float [N, C, H, W].
        pixels: largest shift in pixels.
        zoom: images are scaled by a factor drawn log-uniformly from [1/(1+zoom), 1+zoom].
        generator: source of the randomness.

    Returns:
        float [N, C, H, W].
    """
    count, _, height, width = images.shape
    log_zoom = torch.log1p(torch.tensor(zoom)) * (2 * torch.rand(count, generator=generator) - 1)
    move = (2 * torch.rand(count, 2, generator=generator) - 1) * pixels * 2 / torch.tensor([width, height])
    return F.grid_sample(images, _grid(images, torch.exp(log_zoom), move), padding_mode="border", align_corners=False)


def place(
    images: Tensor, scales: tuple[float, float], pixels: int, background: Tensor, generator: torch.Generator
) -> Tensor:
    """Each image scaled, moved and set on a plain background, bilinear.

    Args:
        images: float [N, C, H, W].
        scales: least and largest size of the picture relative to the image; drawn uniformly.
        pixels: largest shift in pixels of the picture.
        background: float [C], the colour around it.
        generator: source of the randomness.

    Returns:
        float [N, C, H, W].
    """
    count, channels, height, width = images.shape
    low, high = scales
    scale = low + (high - low) * torch.rand(count, generator=generator)
    move = (2 * torch.rand(count, 2, generator=generator) - 1) * pixels * 2 / torch.tensor([width, height])
    behind = background.to(images.dtype).view(channels, 1, 1)
    return behind + F.grid_sample(images - behind, _grid(images, 1 / scale, move), align_corners=False)


def _grid(images: Tensor, stretch: Tensor, move: Tensor) -> Tensor:
    """Where each pixel comes from: a fraction of the image ``stretch`` [N] times as wide, moved by ``move`` [N, 2]."""
    transform = torch.zeros(len(images), 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = stretch
    transform[:, :, 2] = move
    return F.affine_grid(transform.to(images.dtype), list(images.shape), align_corners=False)


def commonest(images: Tensor) -> Tensor:
    """The commonest value of every channel: of drawings, the paper's colour.

    Args:
        images: uint8 [N, C, H, W].

    Returns:
        uint8 [C].
    """
    return torch.stack([torch.bincount(channel.flatten(), minlength=256).argmax() for channel in images.unbind(1)]).to(
        torch.uint8
    )
