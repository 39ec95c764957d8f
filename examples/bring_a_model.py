"""Puts a network that metapool did not train into a pool.

    python examples/bring_a_model.py FOLDER

Your weights go into the network of the same architecture that metapool builds by name: the tensors are the same, only
their names differ. Then the logits of both are compared, so that tensors in the wrong order are seen at once.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from metapool.base.images import InputSpec
from metapool.base.networks import NetworkSpec, build
from metapool.pool import ModelPool, PretrainedModel


def your_network(channels: int, width: int, classes: int) -> nn.Sequential:
    """Stands for your own code: the usual Conv4 for images of 32×32 pixels, its tensors named by position."""
    layers: list[nn.Module] = []
    for block in range(4):
        inputs = channels if block == 0 else width
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes))


def main() -> None:
    """Builds, copies, compares, stores."""
    folder = Path(sys.argv[1])
    yours = your_network(channels=3, width=16, classes=3).eval()  # here you would load your weights

    spec = NetworkSpec(architecture="conv4", width=16, classes=3, channels=3, height=32, image_width=32)
    network = build(spec, torch.Generator())
    weights = dict(zip(network.state_dict(), yours.state_dict().values(), strict=True))
    network.load_state_dict(weights)  # refuses any tensor whose shape differs

    # What your own code subtracts and divides by, for images in [0, 1]. A wrong guess is silently wrong.
    input = InputSpec(channels=3, height=32, width=32, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    model = PretrainedModel(
        "my-conv4",
        network,
        input,
        classes=("cat", "dog", "horse"),
        spec=spec,
        accuracy=None,  # percent on held-out images, when you know it
        licence="Apache-2.0",
        provenance="trained by me in 2024",
    )

    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # in [0, 1], not normalised
    with torch.no_grad():
        torch.testing.assert_close(model(images), yours(input.prepare(images)))

    pool = ModelPool.create(folder, "my-pool")  # ModelPool.open(folder) to add to one that is there
    pool.add(model)
    print(f"{folder} holds {', '.join(ModelPool.open(folder).ids)}")


if __name__ == "__main__":
    main()
