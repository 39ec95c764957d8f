r"""A small vision transformer (timm's), and low-rank adapters on its query and value maps.

LoRA (Hu et al. 2022, arXiv 2106.09685) leaves a matrix :math:`W` as it is and learns what is added to it,

.. math:: W + B A, \qquad A \in R^{r \times D}, \; B \in R^{D \times r}, \; r = 4,

with A random and B zero at first, so that an adapter that never learned is the transformer itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.base.errors import MetapoolError

PATCH = 4
DEPTH = 6
HEAD_WIDTH = 16
RANK = 4

_kept: ContextVar[Tensor | None] = ContextVar("kept", default=None)


def is_adapter(name: str) -> bool:
    """Whether a tensor of a network with adapters is its own, and not its backbone's.

    Args:
        name: in the network's state dict.

    Returns:
        True for low-rank matrices and the head.
    """
    return "lora_" in name or name.startswith("head.")


def own_and_shared(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a network with adapters has of its own, and what it shares with all others of its backbone.

    Args:
        weights: by name.

    Returns:
        Both; without adapters, all is the network's own.
    """
    adapted = any("lora_" in name for name in weights)
    own = {name: value for name, value in weights.items() if is_adapter(name) or not adapted}
    return own, {name: value for name, value in weights.items() if name not in own}


class AdaptedQKV(nn.Linear):
    """Query, key and value maps of a block side by side, with low-rank additions to the first and the last.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        self.lora_query_down = nn.Parameter(torch.zeros(RANK, width))
        self.lora_query_up = nn.Parameter(torch.zeros(width, RANK))
        self.lora_value_down = nn.Parameter(torch.zeros(RANK, width))
        self.lora_value_up = nn.Parameter(torch.zeros(width, RANK))

    def merged(self) -> Tensor:
        """The matrix that does the same in one product.

        Returns:
            W + BA, float [3 D, D].
        """
        query = self.lora_query_up @ self.lora_query_down
        value = self.lora_value_up @ self.lora_value_down
        return self.weight + torch.cat([query, torch.zeros_like(query), value])

    def forward(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values.

        Args:
            tokens: float [N, T, D].

        Returns:
            float [N, T, 3 D].
        """
        if not (torch.is_grad_enabled() and self.lora_query_up.requires_grad):
            return F.linear(tokens, self.merged(), self.bias)
        # The gradient of the merged matrix would be D/r times as large as those of its two factors.
        query = F.linear(F.linear(tokens, self.lora_query_down), self.lora_query_up)
        value = F.linear(F.linear(tokens, self.lora_value_down), self.lora_value_up)
        addition = torch.cat([query, torch.zeros_like(query), value], -1)
        return F.linear(tokens, self.weight, self.bias) + addition


class KeptPatches(nn.Module):
    """Where a transformer leaves out patches: all pass but within :func:`only_patches`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The class token and the patches that are kept.

        Args:
            tokens: float [N, 1 + P, D], places already added.

        Returns:
            float [N, 1 + k, D].
        """
        kept = _kept.get()
        if kept is None:
            return tokens
        rows = torch.arange(len(tokens)).unsqueeze(1)
        return torch.cat([tokens[:, :1], tokens[:, 1:][rows, kept]], 1)


@contextmanager
def only_patches(kept: Tensor | None) -> Iterator[None]:
    """Within the context, transformers see only some patches of every image.

    Args:
        kept: int64 [N, k], which patches of which image; all when not given.

    Yields:
        Nothing.
    """
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def vision_transformer(width: int, channels: int, height: int, image_width: int, *, adapted: bool) -> nn.Module:
    """A transformer of 6 blocks on patches of 4×4 pixels; its features are the class token's, normalised.

    Args:
        width: D, a multiple of 16, the width of a head.
        channels: of the images.
        height: of the images, a multiple of 4.
        image_width: the same.
        adapted: with low-rank adapters.

    Returns:
        A module from images [N, C, H, W] to features [N, D]; its weights are to be initialised.

    Raises:
        MetapoolError: when timm is not installed.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise MetapoolError("vision transformers need timm: pip install 'metapool[vit]'") from error
    transformer: Any = VisionTransformer(
        img_size=(height, image_width),
        patch_size=PATCH,
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=DEPTH,
        num_heads=width // HEAD_WIDTH,
        weight_init="skip",
    )
    transformer.patch_drop = KeptPatches()
    if adapted:
        for block in transformer.blocks:
            block.attn.qkv = AdaptedQKV(width)
    module: nn.Module = transformer
    return module


def initialise_transformer(transformer: nn.Module, generator: torch.Generator) -> None:
    """Draws all weights anew, in place.

    Args:
        transformer: matrices get Xavier uniform weights and zero biases, the class token and the places N(0, 0.02), the
            first factors of adapters Kaiming uniform weights, the second ones zeros.
        generator: source of the weights.
    """
    for name, parameter in transformer.named_parameters():
        if "lora_" in name and name.endswith("_down"):
            nn.init.kaiming_uniform_(parameter, 5**0.5, generator=generator)
        elif name in ("cls_token", "pos_embed"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.ndim > 1 and "lora_" not in name:
            nn.init.xavier_uniform_(parameter, generator=generator)
        elif "norm" not in name:
            nn.init.zeros_(parameter)


def class_attention(transformer: nn.Module, images: Tensor) -> Tensor:
    r"""How much the class token looks at each patch in the last block: the importance of patches.

    :math:`\frac1h \sum_h \mathrm{softmax}(q_{h,\mathrm{cls}} K_h^\top / \sqrt{d})`, without its share for the class
    token itself (LoRA Recycle, arXiv 2412.02220, equations 5 and 6).

    Args:
        transformer: what :func:`vision_transformer` gives.
        images: float [N, C, H, W], normalised.

    Returns:
        float [N, P], each row with sum < 1.
    """
    seen: list[Tensor] = []
    attention: Any = transformer.get_submodule(f"blocks.{DEPTH - 1}.attn")
    hook = attention.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        transformer(images)
    finally:
        hook.remove()
    query, key, _ = seen[0].unflatten(-1, (3, -1, HEAD_WIDTH)).transpose(1, 3).unbind(2)  # each [N, heads, T, d]
    row = (query[:, :, :1] @ key.mT * attention.scale).softmax(-1)
    importance: Tensor = row[:, :, 0, 1:].mean(1)
    return importance
