"""The generator of recovered images."""

import torch
from torch import Tensor, nn

from metapool.base.images import InputSpec


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


def full_contrast(images: Tensor) -> Tensor:
    """Every image stretched linearly from black to white.

    Args:
        images: float [N, C, H, W].

    Returns:
        float [N, C, H, W] in [0, 1]; a constant image becomes black.
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-6)
