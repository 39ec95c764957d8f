"""The table that tests are multiplied by: networks × inputs × batch norm × number of classes, built when asked for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.base.functional import Params, call, params_of, running_statistics
from metapool.base.images import InputSpec, LabelledImages, to_bytes, to_float
from metapool.base.networks import Architecture, NetworkSpec, build, initialise
from metapool.pool import PretrainedModel

Shape = tuple[int, int, int]


def input_spec(shape: Shape) -> InputSpec:
    channels, height, width = shape
    return InputSpec(channels=channels, height=height, width=width, mean=(0.4,) * channels, std=(0.25,) * channels)


def network_spec(architecture: Architecture, shape: Shape, classes: int, width: int = 4) -> NetworkSpec:
    channels, height, image_width = shape
    return NetworkSpec(
        architecture=architecture,
        width=width,
        classes=classes,
        channels=channels,
        height=height,
        image_width=image_width,
    )


def smooth_images(count: int, shape: Shape, seed: int = 0) -> Tensor:
    """Blurred noise, float [count, C, H, W] in [0, 1]."""
    coarse = torch.rand(count, shape[0], 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, shape[1:], mode="bilinear", antialias=True).clamp(0, 1)


def toy_images(classes: int, per_class: int, shape: Shape, seed: int, first: int = 0) -> LabelledImages:
    """Every class is one blurred pattern, the same whatever the other classes; its images differ by noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.cat([smooth_images(1, shape, 1000 + first + label) for label in range(classes)])
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = 0.08 * torch.randn(len(labels), *shape, generator=generator)
    names = tuple(f"pattern-{first + label}" for label in range(classes))
    return LabelledImages(to_bytes(patterns[labels] + noise), labels, names)


def fitted(id: str, architecture: Architecture, *, classes: int, shape: Shape, width: int = 8) -> PretrainedModel:
    """A small network after 25 Adam steps on its toy classes."""
    data = toy_images(classes, 12, shape, seed=1)
    spec, input = network_spec(architecture, shape, classes, width), input_spec(shape)
    network = build(spec, torch.Generator().manual_seed(1))
    params = params_of(network)
    optimizer = torch.optim.Adam(list(params.values()), 1e-2)
    images = input.prepare(to_float(data.images))
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(call(network, params, images), data.labels).backward()
        optimizer.step()
    network.load_state_dict({**params, **running_statistics(network, params, images)})
    return PretrainedModel(id, network, input, data.classes, spec=spec, accuracy=100.0, licence="CC0-1.0")


@dataclass(frozen=True)
class Case:
    """One row: a network with random weights whose running statistics fit smooth images."""

    name: str
    make: Callable[[Shape, int], nn.Module]
    shape: Shape
    classes: int
    batch_norm: bool
    spec: NetworkSpec | None = None

    def network(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        network = self.make(self.shape, self.classes)
        initialise(network, torch.Generator().manual_seed(seed))
        fit_statistics(network, input_spec(self.shape).prepare(smooth_images(32, self.shape, seed)))
        return network.eval()

    def model(self, seed: int = 0) -> PretrainedModel:
        names = [f"class-{label}" for label in range(self.classes)]
        return PretrainedModel(self.name, self.network(seed), input_spec(self.shape), names, spec=self.spec)


def fit_statistics(network: nn.Module, images: Tensor) -> None:
    """Running statistics of one batch, with the *biased* variance that normalisation itself uses."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    sizes: dict[nn.Module, int] = {}
    hooks = [
        norm.register_forward_pre_hook(lambda module, inputs: sizes.update({module: inputs[0][:, 0].numel()}))
        for norm in norms
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    network.eval()
    for norm, hook, momentum in zip(norms, hooks, momenta):
        hook.remove()
        norm.momentum = momentum
        assert norm.running_var is not None
        norm.running_var.mul_((sizes[norm] - 1) / sizes[norm])


def _named(architecture: Architecture) -> Callable[[Shape, int], nn.Module]:
    return lambda shape, classes: build(network_spec(architecture, shape, classes), torch.Generator().manual_seed(0))


def _plain(shape: Shape, classes: int) -> nn.Module:
    """Not one of ours: torch's own batch norm, no ``features``, no ``head``."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def _no_batch_norm(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes)
    )


def _grouped(shape: Shape, classes: int) -> nn.Module:
    """Depthwise convolution and a batch norm without weights."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 1),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6),
        nn.BatchNorm2d(6, affine=False),
        nn.Flatten(),
        nn.Linear(6 * -(-shape[1] // 2) * -(-shape[2] // 2), classes),
    )


def _case(architecture: Architecture, shape: Shape, classes: int) -> Case:
    size = "x".join(map(str, shape))
    name = f"{architecture}-{size}-{classes}"
    return Case(name, _named(architecture), shape, classes, True, network_spec(architecture, shape, classes))


CASES = (
    _case("conv4", (1, 16, 16), 5),
    _case("conv4", (3, 32, 32), 2),
    _case("conv4", (1, 20, 28), 7),
    _case("resnet10", (1, 16, 16), 2),
    _case("resnet10", (3, 20, 28), 7),
    _case("resnet18", (1, 32, 32), 5),
    Case("plain-3x20x28-7", _plain, (3, 20, 28), 7, True),
    Case("plain-1x16x16-2", _plain, (1, 16, 16), 2, True),
    Case("depthwise-2x20x28-3", _grouped, (2, 20, 28), 3, True),
    Case("plain-no-norm-3x20x28-2", _no_batch_norm, (3, 20, 28), 2, False),
    Case("plain-no-norm-1x16x16-7", _no_batch_norm, (1, 16, 16), 7, False),
)
WITH_BATCH_NORM = tuple(case for case in CASES if case.batch_norm)
WITHOUT_BATCH_NORM = tuple(case for case in CASES if not case.batch_norm)
OURS = tuple(case for case in CASES if case.spec is not None)


def double(network: nn.Module) -> tuple[nn.Module, Params]:
    """A network in float64 and its parameters as leaves."""
    network = network.double()
    return network, params_of(network)
