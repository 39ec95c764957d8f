"""Identity 3: batch-norm distances are zero when the batch is the data behind the statistics; where these come from."""

from typing import cast

import cases
import pytest
import torch
from torch import Tensor, nn

from metapool.base.functional import BatchNorm, call, params_of, running_statistics, statistics_of_first
from metapool.pool import PretrainedModel
from metapool.recover import batch_norm_distances

WITH_NORM = pytest.mark.parametrize("case", cases.WITH_BATCH_NORM, ids=lambda case: case.name)
OURS = pytest.mark.parametrize("case", cases.OURS, ids=lambda case: case.name)


def fitted_to(case: cases.Case, images: Tensor) -> PretrainedModel:
    """The case's model in float64 with running statistics of exactly these images."""
    model = case.model().double()
    cases.fit_statistics(model.network, model.input.prepare(images))
    return model


def distances(model: PretrainedModel, images: Tensor) -> Tensor:
    with batch_norm_distances(model.network) as found, torch.no_grad():
        model(images)
    return torch.stack(found)


# The loss of recovery -------------------------------------------------------------------------------------------------


@WITH_NORM
def test_distances_are_zero_for_the_data_behind_the_statistics_and_positive_for_other(case: cases.Case) -> None:
    images = cases.smooth_images(8, case.shape, seed=3).double()
    model = fitted_to(case, images)
    norms = [module for module in model.network.modules() if isinstance(module, nn.BatchNorm2d)]
    own = distances(model, images)
    assert own.shape == (len(norms),)
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-7)
    assert distances(model, cases.smooth_images(8, case.shape, seed=4).double()).min() > 1e-3
    assert distances(model, images[:4])[0] > 1e-3, "half of the data is other data"


@WITH_NORM
def test_order_of_the_images_does_not_matter(case: cases.Case) -> None:
    images = cases.smooth_images(8, case.shape, seed=3).double()
    own = distances(fitted_to(case, images), images.flip(0))
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-7)


def test_torch_s_own_running_variance_is_unbiased_and_leaves_that_much() -> None:
    """Companion: running_var holds n/(n-1) of the variance that normalises, so its distance is not zero but known."""
    norm = nn.BatchNorm2d(3, momentum=None).double()
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    norm.train()(images)
    norm.eval()
    with batch_norm_distances(norm) as found:
        norm(images)
    variance = images.var((0, 2, 3), correction=0)
    torch.testing.assert_close(found[0], (variance / (100 - 1)).norm())
    assert found[0] > 1e-3
    assert norm.running_var is not None
    norm.running_var.mul_(99 / 100)
    with batch_norm_distances(norm) as corrected:
        norm(images)
    torch.testing.assert_close(corrected[0], torch.zeros_like(corrected[0]), rtol=0, atol=1e-12)


def test_cumulative_statistics_of_equal_batches_are_the_mean_of_theirs() -> None:
    """Two batches, cumulative momentum: the distance of both together is what their means differ by, not zero."""
    norm = nn.BatchNorm2d(2, momentum=None).double()
    parts = torch.randn(2, 4, 2, 5, 5, dtype=torch.float64)
    parts[1] += 1.0
    norm.train()
    for part in parts:
        norm(part)
    norm.eval()
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, parts.mean((0, 1, 3, 4)))
    torch.testing.assert_close(norm.running_var, parts.var((1, 3, 4)).mean(0))
    with batch_norm_distances(norm) as found:
        norm(parts.flatten(0, 1))
    assert found[0] > 0.2, "the variance between the batches is not in the running variance"


@WITH_NORM
def test_the_context_counts_every_pass_and_ends(case: cases.Case) -> None:
    model, images = case.model(), cases.smooth_images(4, case.shape)
    norms = [module for module in model.network.modules() if isinstance(module, nn.BatchNorm2d)]
    with batch_norm_distances(model.network) as found:
        model(images)
        model(images)
    assert len(found) == 2 * len(norms)
    model(images)
    assert len(found) == 2 * len(norms)
    torch.testing.assert_close(found[: len(norms)], found[len(norms) :])


def test_distance_is_that_of_the_layer_s_input_not_its_output() -> None:
    norm = nn.BatchNorm2d(1).eval()
    nn.init.constant_(norm.weight, 5.0)
    with batch_norm_distances(norm) as found:
        norm(torch.full((2, 1, 2, 2), 3.0))
    torch.testing.assert_close(found[0], torch.tensor(3.0 + 1.0))  # |3 - 0| + |0 - 1|


# Statistics of the first images ---------------------------------------------------------------------------------------


@OURS
@pytest.mark.parametrize("support", [1, 3])
def test_statistics_of_first_are_plain_batch_norm_on_the_support(case: cases.Case, support: int) -> None:
    network = case.network().double()
    images = cases.input_spec(case.shape).prepare(cases.smooth_images(7, case.shape, 5).double())
    params = params_of(network)
    together = call(network, params, images, first=support)
    alone = call(network, params, images[:support])
    torch.testing.assert_close(together[:support], alone)
    network.train()
    torch.testing.assert_close(alone, network(images[:support]))
    assert not torch.allclose(call(network, params, images)[:support], alone)


@OURS
def test_queries_are_normalised_by_the_support_s_statistics(case: cases.Case) -> None:
    """As if the support's statistics were running statistics: layer by layer the same numbers."""
    network = case.network().double()
    images = cases.input_spec(case.shape).prepare(cases.smooth_images(7, case.shape, 5).double())
    cases.fit_statistics(network, images[:4])
    found = call(network, params_of(network), images, first=4)
    torch.testing.assert_close(found, network(images))
    cases.fit_statistics(network, images[3:])
    assert not torch.allclose(network(images), found)


def test_gradients_flow_through_the_support_s_statistics() -> None:
    norm = BatchNorm(2).double()
    nn.init.normal_(norm.weight)
    images = torch.randn(5, 2, 3, 3, dtype=torch.float64).requires_grad_()

    def function(images: Tensor) -> Tensor:
        with statistics_of_first(2):
            return norm(images)

    assert torch.autograd.gradcheck(function, images)
    assert torch.autograd.gradgradcheck(function, images)
    (gradient,) = torch.autograd.grad(function(images)[2:].square().sum(), images)
    assert gradient[:2].abs().max() > 1e-3, "queries reach the support through its statistics"


# Running statistics ---------------------------------------------------------------------------------------------------


@OURS
def test_running_statistics_are_those_of_the_images(case: cases.Case) -> None:
    network = case.network().double()
    images = cases.input_spec(case.shape).prepare(cases.smooth_images(9, case.shape, 6).double())
    params = {name: value * 1.1 for name, value in params_of(network).items()}
    found = running_statistics(network, params, images)

    inputs: dict[str, Tensor] = {}
    names = {module: name for name, module in network.named_modules() if isinstance(module, BatchNorm)}
    hooks = [m.register_forward_hook(lambda m, seen, _: inputs.update({names[m]: seen[0]})) for m in names]
    call(network, params, images)
    for hook in hooks:
        hook.remove()
    assert set(inputs) == set(names.values())
    for name, seen in inputs.items():
        torch.testing.assert_close(found[f"{name}.running_mean"], seen.mean((0, 2, 3)))
        torch.testing.assert_close(found[f"{name}.running_var"], seen.var((0, 2, 3)))
    before = dict(network.named_buffers())
    assert all(
        not torch.allclose(found[name], before[name])
        for name in found
        if name.endswith(("running_mean", "running_var"))
    )
    other = running_statistics(network, params, images[:5])
    first = next(iter(inputs))
    assert not torch.allclose(other[f"{first}.running_mean"], found[f"{first}.running_mean"])


@OURS
def test_with_running_statistics_of_a_batch_inference_is_training_s_output(case: cases.Case) -> None:
    """Up to the n/(n-1) of torch's running variance, which is undone here."""
    network = cast(nn.Module, case.network().double())
    images = cases.input_spec(case.shape).prepare(cases.smooth_images(9, case.shape, 6).double())
    params = params_of(network)
    trained = call(network, params, images)
    twin = case.network().double()
    cases.fit_statistics(twin, images)
    torch.testing.assert_close(call(network, params, images, statistics=dict(twin.named_buffers())), trained)
    unbiased = running_statistics(network, params, images)
    answered = call(network, params, images, statistics=unbiased)
    assert not torch.equal(answered, trained)
    assert (answered - trained).norm() < 0.2 * trained.norm(), "torch's own estimate comes near"
