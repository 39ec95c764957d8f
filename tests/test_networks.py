"""Networks by name: shapes, initial weights, seeds."""

import sys
from typing import cast

import cases
import pydantic
import pytest
import torch
from torch import nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import BatchNorm, call, params_of
from metapool.base.networks import Architecture, ConvBlock, Network, NetworkSpec, build, initialise


def built(architecture: Architecture, shape: cases.Shape, classes: int = 5, width: int = 4, seed: int = 0) -> Network:
    return build(cases.network_spec(architecture, shape, classes, width), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ["conv4", "resnet10", "resnet18", "vgg7"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 20, 28), (2, 17, 31)], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_any_size_channels_and_classes(architecture: Architecture, shape: cases.Shape, classes: int) -> None:
    network = built(architecture, shape, classes)
    images = torch.randn(3, *shape)
    features = network.features(images)
    assert features.ndim == 2
    assert features.shape[1] == network.head.in_features
    assert network(images).shape == (3, classes)
    torch.testing.assert_close(network(images), network.head(features))


def test_features_of_conv4_and_resnets_have_the_papers_sizes() -> None:
    assert built("conv4", (3, 32, 32), width=64).head.in_features == 64 * 2 * 2
    assert built("conv4", (3, 84, 84), width=64).head.in_features == 64 * 5 * 5  # 1600, Vinyals et al. 2016
    assert built("resnet10", (3, 32, 32), width=64).head.in_features == 512
    assert built("resnet18", (3, 32, 32), width=64).head.in_features == 512


def test_numbers_of_weighted_layers_are_those_in_the_names() -> None:
    for architecture, layers in (("conv4", 4), ("resnet10", 9), ("resnet18", 17), ("vgg7", 6)):
        network = built(cast(Architecture, architecture), (1, 32, 32))
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(convolutions) == layers


def test_wider_is_larger_and_resnets_double() -> None:
    narrow, wide = (built("resnet10", (1, 16, 16), width=width) for width in (4, 8))
    assert wide.head.in_features == 2 * narrow.head.in_features
    assert sum(p.numel() for p in wide.parameters()) > 3 * sum(p.numel() for p in narrow.parameters())


@pytest.mark.parametrize("architecture", ["conv4", "resnet10", "resnet18"])
def test_same_seed_same_weights(architecture: Architecture) -> None:
    first, again, other = (built(architecture, (1, 16, 16), seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(dict(again.state_dict()), dict(first.state_dict()), rtol=0, atol=0)
    assert not torch.equal(other.head.weight, first.head.weight)


def test_the_global_seed_decides_nothing() -> None:
    torch.manual_seed(1)
    first = built("conv4", (1, 16, 16))
    torch.manual_seed(2)
    again = built("conv4", (1, 16, 16))
    torch.testing.assert_close(dict(again.state_dict()), dict(first.state_dict()), rtol=0, atol=0)


def test_initial_weights_are_he_normal_biases_zero_and_norms_neutral() -> None:
    network = built("conv4", (1, 32, 32), width=64)
    second = cast(nn.Conv2d, cast(nn.Sequential, cast(nn.Sequential, network.encoder)[1])[0])
    assert second.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert network.head.weight.std().item() == pytest.approx((2 / network.head.in_features) ** 0.5, rel=0.15)
    assert second.bias is not None
    for bias in (second.bias, network.head.bias):
        torch.testing.assert_close(bias, torch.zeros_like(bias))
    for norm in (m for m in network.modules() if isinstance(m, BatchNorm)):
        assert norm.running_mean is not None
        torch.testing.assert_close(norm.weight, torch.ones_like(norm.weight))
        torch.testing.assert_close(norm.running_mean, torch.zeros_like(norm.running_mean))


def test_initialise_forgets_what_was_there() -> None:
    network = built("resnet10", (1, 16, 16), seed=3)
    fresh = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()(torch.randn(4, 1, 16, 16))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert not torch.equal(network.head.weight, fresh["head.weight"])
    torch.manual_seed(9)
    initialise(network, torch.Generator().manual_seed(3))
    torch.testing.assert_close(dict(network.state_dict()), fresh, rtol=0, atol=0)


def test_built_networks_are_in_eval_mode_and_their_norms_can_be_steered() -> None:
    network = built("resnet18", (1, 16, 16))
    assert not any(module.training for module in network.modules())
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, BatchNorm) for norm in norms)


@pytest.mark.parametrize(
    ("field", "value"),
    [("architecture", "vit"), ("width", 0), ("classes", 0), ("channels", 0), ("height", 8), ("image_width", 4096)],
)
def test_impossible_network_is_refused(field: str, value: object) -> None:
    good = cases.network_spec("conv4", (1, 16, 16), 5).model_dump()
    with pytest.raises(ValueError, match=field):
        NetworkSpec.model_validate(good | {field: value})


def test_pooling_before_relu_is_relu_before_pooling() -> None:
    block = ConvBlock(2, 5)
    images = torch.randn(4, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    slow = torch.nn.functional.max_pool2d(block[1](block[0](images)).relu(), 2)
    leaves = list(block.parameters())
    torch.testing.assert_close(block(images), slow, rtol=0, atol=0)
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (block(images), slow)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0][0].abs().max() > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_lie_channels_last_also_where_weights_came_out_of_arithmetic(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inner loop's weights are differences; with one channel their order of memory is lost, and pooling is slow."""
    spec = NetworkSpec(architecture="conv4", width=8, classes=3, channels=channels, height=32, image_width=32)
    network = build(spec, torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    moved = {name: value - 0.1 * torch.ones_like(value).contiguous() for name, value in params_of(network).items()}
    seen: list[bool] = []

    def pooled(images: torch.Tensor, size: int) -> torch.Tensor:
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return torch.max_pool2d(images, size)

    monkeypatch.setattr(torch.nn.functional, "max_pool2d", pooled)
    images = torch.rand(4, channels, 32, 32)
    call(network, moved, images)
    assert seen == [True] * 4


TIMM = "timm:mobilenetv3_small_050"


def test_a_network_of_timm_is_drawn_by_our_seed_with_our_batch_norm() -> None:
    pytest.importorskip("timm")
    first, again, other = (built(TIMM, (1, 32, 32), seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(dict(first.state_dict()), dict(again.state_dict()), rtol=0, atol=0)
    assert not torch.equal(first.head.weight, other.head.weight)
    norms = [module for module in first.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 10
    assert all(isinstance(norm, BatchNorm) for norm in norms)
    first = first.double()
    images = torch.randn(4, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert first.features(images).shape == (4, first.head.in_features)
    alone = call(first, params_of(first), images, first=2)[:2]
    torch.testing.assert_close(alone, call(first, params_of(first), images[:2]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "message"),
    [("timm:no_such_net", "knows no model of this name"), ("timm:vit_tiny_patch16_224", "convolutions")],
)
def test_what_timm_does_not_know_or_we_cannot_draw_is_refused(name: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(MetapoolError, match=f"{name}: .*{message}"):
        built(name, (3, 224, 224))


@pytest.mark.parametrize("name", ["timm:hf-hub:someone/net", "timm:../x", "timm:", "timm:A"])
def test_a_name_of_timm_is_one_word(name: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="architecture"):
        cases.network_spec(name, (1, 32, 32), 5)


def test_without_timm_its_networks_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MetapoolError, match=r"timm:resnet18 needs timm: pip install 'metapool\[vit\]'"):
        built("timm:resnet18", (1, 32, 32))
