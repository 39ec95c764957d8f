"""Identity 2: the Fisher diagonal is the average of squared per-image gradients taken one at a time."""

from itertools import pairwise

import cases
import pytest
import reference
import torch
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.embed import batch_fisher, fisher_diagonal

EVERY_CASE = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
SOME_CASES = pytest.mark.parametrize("case", cases.CASES[::3], ids=lambda case: case.name)


def prepared(case: cases.Case, count: int, seed: int = 3) -> Tensor:
    return cases.input_spec(case.shape).prepare(cases.smooth_images(count, case.shape, seed)).double()


def by(params: Params, scale: float) -> Params:
    return {name: scale * value for name, value in params.items()}


def assert_same(first: Params, second: Params, tolerance: float = 1e-9) -> None:
    largest = max(float(value.max()) for value in second.values())
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance * largest)


def assert_not_same(first: Params, second: Params) -> None:
    with pytest.raises(AssertionError):
        assert_same(first, second, 1e-2)


@EVERY_CASE
def test_it_is_the_average_of_squared_gradients_taken_one_at_a_time(case: cases.Case) -> None:
    network, params = cases.double(case.network())
    images = prepared(case, 3)
    fisher = fisher_diagonal(network, params, images, chunk=2)
    assert list(fisher) == list(params)
    assert_same(fisher, reference.fisher_one_at_a_time(network, params, images))
    assert all(bool((value > 0).any()) for value in fisher.values()), "every tensor matters to the output"
    assert_not_same(fisher, fisher_diagonal(network, params, prepared(case, 3, seed=4)))


@SOME_CASES
def test_it_equals_vmap_of_grad(case: cases.Case) -> None:
    network, params = cases.double(case.network())
    images = prepared(case, 5)
    assert_same(fisher_diagonal(network, params, images), reference.fisher_by_vmap(network, params, images))


@SOME_CASES
def test_it_is_not_the_squared_batch_gradient(case: cases.Case) -> None:
    network, params = cases.double(case.network())
    images = prepared(case, 6)
    labels = torch.arange(6) % case.classes
    batch = reference.squared_batch_gradient(network, params, images, labels)
    fisher = fisher_diagonal(network, params, images)
    ratio = sum(float(value.sum()) for value in fisher.values()) / sum(float(value.sum()) for value in batch.values())
    assert_not_same(fisher, by(batch, ratio))


@SOME_CASES
def test_the_chunk_does_not_matter(case: cases.Case) -> None:
    network, params = cases.double(case.network())
    images = prepared(case, 7)
    whole = fisher_diagonal(network, params, images, chunk=7)
    for chunk in (1, 3, 64):
        assert_same(fisher_diagonal(network, params, images, chunk), whole, 1e-12)
    assert_not_same(fisher_diagonal(network, params, images[:3]), whole)


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_closed_form_of_a_linear_softmax_model(classes: int) -> None:
    # d log p_y / dW_k = (1[y = k] - p_k) x, whose expected square is p_k (1 - p_k) x^2.
    network = nn.Linear(4, classes).double().eval()
    features = torch.randn(9, 4, dtype=torch.float64)
    fisher = fisher_diagonal(network, dict(network.named_parameters()), features)
    p = network(features).softmax(1).detach()
    spread = p * (1 - p)
    torch.testing.assert_close(fisher["weight"], spread.T @ features**2 / 9, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fisher["bias"], spread.mean(0), rtol=1e-12, atol=1e-14)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fisher["bias"], (p**2).mean(0), rtol=1e-2, atol=1e-3)


def test_a_certain_model_has_no_information_and_no_nan() -> None:
    network = nn.Linear(2, 3, bias=False).double().eval()
    images = torch.ones(2, 2, dtype=torch.float64)
    certain = {"weight": torch.tensor([[800.0, 800.0], [0.0, 0.0], [-800.0, 0.0]], dtype=torch.float64)}
    assert fisher_diagonal(network, certain, images)["weight"].max() == 0
    doubtful = by(certain, 1e-3)
    assert fisher_diagonal(network, doubtful, images)["weight"].min() > 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False),
        nn.Conv2d(4, 6, 8),
    ],
    ids=["grouped", "dilated", "whole-image"],
)
def test_convolutions_of_every_kind(layer: nn.Conv2d) -> None:
    images = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    size = layer(images.float()).flatten(1).shape[1]
    network = nn.Sequential(layer, nn.SELU(inplace=True), nn.Flatten(), nn.Linear(size, 3)).double().eval()
    params = dict(network.named_parameters())
    assert_same(fisher_diagonal(network, params, images), reference.fisher_one_at_a_time(network, params, images))


class Tokens(nn.Module):
    """A linear layer over positions, activated in place, and changing its own input afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).mT * 1
        mixed = self.mix(tokens)
        tokens.add_(mixed.tanh_())
        self.unused(tokens.mean(1))
        return self.head(tokens.mean(1))


def test_linear_layers_over_positions_and_changes_in_place() -> None:
    network = Tokens().double().eval()
    params = dict(network.named_parameters())
    images = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    fisher = fisher_diagonal(network, params, images)
    # The reference differentiates the weights and so cannot run on inputs changed in place: the same without.
    network.forward = lambda images: network.head(  # type: ignore[method-assign]
        (images.flatten(2).mT + network.mix(images.flatten(2).mT).tanh()).mean(1)
    )
    assert_same(fisher, reference.fisher_one_at_a_time(network, params, images))
    assert fisher["unused.weight"].max() == 0
    assert fisher["mix.weight"].min() > 0


def test_a_subset_of_the_parameters_with_other_values() -> None:
    network, params = cases.double(cases.CASES[0].network())
    images = prepared(cases.CASES[0], 3)
    names = ("encoder.1.0.weight", "head.bias")
    some = {name: params[name] * 1.3 for name in names}
    every = fisher_diagonal(network, {**params, **some}, images)
    assert_same(fisher_diagonal(network, some, images), {name: every[name] for name in names})
    unchanged = fisher_diagonal(network, params, images)
    assert_not_same({name: every[name] for name in names}, {name: unchanged[name] for name in names})


def test_the_network_is_left_as_it_was() -> None:
    network, params = cases.double(cases.CASES[0].network())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        fisher = fisher_diagonal(network, by(params, 2), prepared(cases.CASES[0], 3))
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in network.modules())
    assert not any(value.requires_grad for value in fisher.values())
    assert all(value.grad is None for value in network.parameters())


def test_float32_is_float64_rounded() -> None:
    case = cases.CASES[3]
    images = prepared(case, 6)
    single = case.network()
    fisher = fisher_diagonal(single, dict(single.named_parameters()), images.float())
    assert {value.dtype for value in fisher.values()} == {torch.float32}
    network, params = cases.double(case.network())
    exact = fisher_diagonal(network, params, images)
    assert_same({name: value.double() for name, value in fisher.items()}, exact, 1e-4)


def test_more_classes_cost_no_accuracy() -> None:
    # Sums over K - 1 directions against sums over K classes: their difference does not grow with K.
    errors = []
    for classes in (2, 20, 200):
        network = nn.Linear(3, classes).double().eval()
        images = 3 * torch.randn(4, 3, dtype=torch.float64)
        params = dict(network.named_parameters())
        fisher = fisher_diagonal(network, params, images)["weight"]
        expected = reference.fisher_by_vmap(network, params, images)["weight"]
        errors.append(float(((fisher - expected).abs() / expected).max()))
    assert max(errors) < 1e-11
    assert all(later < 1e3 * max(earlier, 1e-15) for earlier, later in pairwise(errors))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.layer(images))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images))


class Scaled(nn.Linear):
    """Looks like a linear layer and is none."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "1.weight"),
        (nn.Sequential(Scaled(3, 3)), "0.weight"),
        (Twice(), "used once"),
        (Tied(), "first.weight"),
        (nn.Sequential(nn.Linear(3, 3), nn.Unflatten(0, (1, -1)), nn.Linear(3, 3), nn.Flatten(0, 1)), "first axis"),
        (nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 2, 1, padding="same"), nn.Flatten()), "1.weight"),
        (
            nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 2, 1, padding_mode="circular"), nn.Flatten()),
            "1.weight",
        ),
        (
            nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()),
            "0|1.weight",
        ),
    ],
    ids=["other-type", "subclass", "used-twice", "tied", "no-image-axis", "same", "circular", "batch-statistics"],
)
def test_what_it_cannot_take_is_refused_by_name(network: nn.Module, name: str) -> None:
    with pytest.raises(MetapoolError, match=name):
        fisher_diagonal(network.eval(), dict(network.named_parameters()), torch.randn(2, 3))


def test_misuse() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    params = dict(network.named_parameters())
    with pytest.raises(ValueError, match="eval mode"):
        fisher_diagonal(network, params, torch.randn(2, 3))
    with pytest.raises(ValueError, match="one image"):
        fisher_diagonal(network.eval(), params, torch.randn(0, 3))
    with pytest.raises(MetapoolError, match=r"absent\.weight"):
        fisher_diagonal(network.eval(), {"absent.weight": torch.zeros(3)}, torch.randn(2, 3))
    assert fisher_diagonal(network.eval(), {}, torch.randn(2, 3)) == {}


@SOME_CASES
def test_the_released_estimate_is_the_mean_of_squared_batch_gradients(case: cases.Case) -> None:
    network, params = cases.double(case.network())
    images, labels = prepared(case, 6), torch.arange(6) % case.classes
    batches = [reference.squared_batch_gradient(network, params, images[b::2], labels[b::2]) for b in range(2)]
    expected = {name: (batches[0][name] + batches[1][name]) / 2 for name in params}
    found = batch_fisher(network, params, images, labels, batches=2)
    assert_same(found, expected)
    assert_not_same(found, fisher_diagonal(network, params, images))
