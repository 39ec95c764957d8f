"""Networks by name, with a width: Conv4, ResNet-10 and ResNet-18 of the few-shot papers, a small VGG, a transformer.

Further convolutional networks come from timm, by their name there and without weights.

Every network is an encoder and a head: ``features(images) -> [N, D]`` and ``forward = head(features)``.
"""

import re
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import BatchNorm, convolve_and_normalise
from metapool.base.store import Settings
from metapool.base.transformer import HEAD_WIDTH, PATCH, initialise_transformer, vision_transformer

OwnArchitecture = Literal["conv4", "resnet10", "resnet18", "vgg7", "vit", "vit-lora"]
TIMM = "timm:"


def _known(name: str) -> str:
    own = get_args(OwnArchitecture)
    if name not in own and not re.fullmatch(rf"{TIMM}[a-z0-9_]+", name):
        raise ValueError(f"expected one of {', '.join(own)}, or {TIMM}NAME, not {name!r}")
    return name


Architecture = Annotated[str, pydantic.AfterValidator(_known)]
VGG_STAGES = (1, 1, 2, 2)
"""Convolutions of each stage: the first four of VGG-11 (Simonyan & Zisserman 2015, configuration A)."""
RESNET_BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}


class NetworkSpec(Settings):
    """Name and size of a network: all that is needed to build it before its weights are loaded."""

    architecture: Architecture
    """``conv4``, ``resnet10``, ``resnet18``, ``vgg7``, ``vit``, ``vit-lora`` (the same with low-rank adapters), or
    ``timm:NAME``, a convolutional network with batch norm that timm knows by that name."""
    width: int = pydantic.Field(ge=1, le=512)
    """Channels of the first block; ResNets and VGG double it at every further stage. Of a transformer, that of its
    tokens; of a network of timm, which has its own, without meaning."""
    classes: int = pydantic.Field(ge=1, le=10_000)
    """Outputs of the head."""
    channels: int = pydantic.Field(ge=1, le=16)
    """Image channels."""
    height: int = pydantic.Field(ge=16, le=1024)
    """Image height; Conv4's features depend on it."""
    image_width: int = pydantic.Field(ge=16, le=1024)
    """Image width."""

    @pydantic.model_validator(mode="after")
    def _whole_heads_and_patches(self) -> Self:
        if self.architecture in ("vit", "vit-lora"):
            if self.width % HEAD_WIDTH:
                raise ValueError(f"width {self.width}: a transformer's is a multiple of {HEAD_WIDTH}")
            if self.height % PATCH or self.image_width % PATCH:
                raise ValueError(f"a transformer's images have sides that are multiples of {PATCH}")
        return self


class Network(nn.Module):
    """An encoder with a linear head.

    Args:
        encoder: images [N, C, H, W] to features [N, D].
        dimension: D.
        classes: K.
    """

    def __init__(self, encoder: nn.Sequential, dimension: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(dimension, classes)

    def features(self, images: Tensor, start: int = 0) -> Tensor:
        """Features before the head.

        Args:
            images: float [N, C, H, W], normalised; with a ``start``, what the parts before it made of them.
            start: first part of the encoder to run.

        Returns:
            float [N, D].
        """
        if start == 0 and images.shape[1] == 1:
            # Of one channel, both orders of memory are the same, and torch takes the slow one wherever weights came
            # out of arithmetic: pooling alone is then ten times slower. Strides that say "channels last" decide it.
            images = images.reshape(len(images), *images.shape[2:], 1).permute(0, 3, 1, 2)
        out: Tensor = self.encoder[start:](images)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: float [N, C, H, W], normalised.

        Returns:
            float [N, K].
        """
        out: Tensor = self.head(self.features(images))
        return out


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, pooling, ReLU. The last two give the same in either order; this one is cheaper.

    Args:
        inputs: channels in.
        outputs: channels out.
        pool: side of what is pooled; 1 for none.
    """

    def __init__(self, inputs: int, outputs: int, pool: int = 2) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), BatchNorm(outputs))
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        """The block's map.

        Args:
            images: float [N, inputs, H, W].

        Returns:
            float [N, outputs, H // pool, W // pool].
        """
        convolution, norm = self
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, BatchNorm)
        maps = convolve_and_normalise(convolution, norm, images)
        return F.relu(maps if self.pool == 1 else F.max_pool2d(maps, self.pool))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, basic block).

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = BatchNorm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """The block's map.

        Args:
            images: float [N, inputs, H, W].

        Returns:
            float [N, outputs, H / stride, W / stride].
        """
        out = F.relu(convolve_and_normalise(self.conv1, self.norm1, images))
        out = convolve_and_normalise(self.conv2, self.norm2, out)
        return F.relu(out + self._shortcut(images))

    def _shortcut(self, images: Tensor) -> Tensor:
        if not isinstance(self.shortcut, nn.Sequential):
            return images
        convolution, norm = self.shortcut
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, BatchNorm)
        return convolve_and_normalise(convolution, norm, images)


def build(spec: NetworkSpec, generator: torch.Generator) -> Network:
    """A freshly initialised network (He et al. 2015 for convolutions, zero biases; Xavier for transformers).

    Args:
        spec: which.
        generator: source of the initial weights.

    Returns:
        The network, in eval mode.
    """
    width = spec.width
    if spec.architecture.startswith(TIMM):
        encoder, dimension = _of_timm(spec)
    elif spec.architecture == "conv4":
        encoder = nn.Sequential(
            *[ConvBlock(spec.channels if block == 0 else width, width) for block in range(4)], nn.Flatten()
        )
        dimension = width * (spec.height // 16) * (spec.image_width // 16)
    elif spec.architecture in ("vit", "vit-lora"):
        adapted = spec.architecture == "vit-lora"
        transformer = vision_transformer(width, spec.channels, spec.height, spec.image_width, adapted=adapted)
        network = Network(nn.Sequential(transformer), width, spec.classes)
        initialise(network.head, generator)
        initialise_transformer(transformer, generator)
        return network.eval()
    elif spec.architecture == "vgg7":
        convolutions: list[nn.Module] = []
        dimension = spec.channels
        for stage, count in enumerate(VGG_STAGES):
            for number in range(count):
                pool = 2 if number + 1 == count and stage + 1 < len(VGG_STAGES) else 1
                convolutions.append(ConvBlock(dimension, width * 2**stage, pool))
                dimension = width * 2**stage
        encoder = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        stem = [nn.Conv2d(spec.channels, width, 3, padding=1, bias=False), BatchNorm(width), nn.ReLU(inplace=True)]
        blocks: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(RESNET_BLOCKS[spec.architecture]):
            outputs = width * 2**stage
            for block in range(count):
                blocks.append(ResidualBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        encoder = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        dimension = inputs
    network = Network(encoder, dimension, spec.classes)
    initialise(network, generator)
    return network.eval()


def _of_timm(spec: NetworkSpec) -> tuple[nn.Sequential, int]:
    """An encoder of timm with our batch norm, and the number of its features; its weights are to be initialised."""
    try:
        import timm
    except ImportError as error:
        raise MetapoolError(f"{spec.architecture} needs timm: pip install 'metapool[vit]'") from error
    name = spec.architecture.removeprefix(TIMM)
    if name not in timm.list_models():
        raise MetapoolError(f"{spec.architecture}: timm {timm.__version__} knows no model of this name")
    model: Any = timm.create_model(name, pretrained=False, num_classes=0, in_chans=spec.channels)
    for place, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            norm = BatchNorm(module.num_features, module.eps)
            activation = getattr(module, "act", nn.Identity())
            model.set_submodule(place, nn.Sequential(norm, activation))
    drawn = {p for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | BatchNorm) for p in m.parameters()}
    if not any(isinstance(m, BatchNorm) for m in model.modules()) or drawn != set(model.parameters()):
        raise MetapoolError(f"{spec.architecture}: expected a network of convolutions, linear layers and batch norm")
    with torch.no_grad():
        features = model.eval()(torch.zeros(1, spec.channels, spec.height, spec.image_width))
    return nn.Sequential(model), features.shape[1]


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draws all weights anew, in place.

    Args:
        network: convolutions and linear layers get He normal weights and zero biases, batch norm ones and zeros.
        generator: source of the weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.reset_parameters()
