"""Networks as functions of their parameters; the three sources of batch-norm statistics."""

from typing import cast

import cases
import pytest
import torch
from torch import nn

from metapool.base.functional import (
    BatchNorm,
    call,
    convolve_and_normalise,
    half_precision,
    in_chunks,
    params_of,
    running_statistics,
    statistics_of_first,
    widen,
)
from metapool.base.networks import Network

OURS = pytest.mark.parametrize("case", cases.OURS, ids=lambda case: case.name)


def prepared(case: cases.Case, count: int, seed: int = 5) -> torch.Tensor:
    return cases.input_spec(case.shape).prepare(cases.smooth_images(count, case.shape, seed))


def buffers_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


@OURS
def test_with_running_statistics_it_is_the_network_in_eval_mode(case: cases.Case) -> None:
    network, images = case.network(), prepared(case, 6)
    out = call(network, params_of(network), images, statistics=buffers_of(network))
    torch.testing.assert_close(out, network(images))
    assert not torch.allclose(out, call(network, params_of(network), images)), "batch statistics give something else"


@OURS
def test_without_statistics_it_is_the_network_in_training_mode(case: cases.Case) -> None:
    network, images = case.network(), prepared(case, 6)
    out = call(network, params_of(network), images)
    network.train()
    torch.testing.assert_close(out, network(images))


@OURS
def test_a_call_changes_nothing_of_the_network(case: cases.Case) -> None:
    network, images = case.network(), prepared(case, 6)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    params = {name: value + 1 for name, value in params_of(network).items()}
    call(network, params, images)
    call(network, params, images, first=2)
    call(network, params, images, statistics=buffers_of(network))
    running_statistics(network, params, images)
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


@OURS
def test_features_then_head_is_forward(case: cases.Case) -> None:
    network, images = cast(Network, case.network()), prepared(case, 4)
    params = params_of(network)
    for statistics in (None, buffers_of(network)):
        features = call(network, params, images, statistics=statistics, method="features")
        logits = call(network, params, images, statistics=statistics)
        assert features.shape[0] == 4
        torch.testing.assert_close(nn.functional.linear(features, params["head.weight"], params["head.bias"]), logits)


def test_absent_parameters_are_the_network_s_own() -> None:
    network = cases.OURS[0].network()
    images, params = prepared(cases.OURS[0], 4), params_of(network)
    torch.testing.assert_close(call(network, {}, images), call(network, params, images))
    torch.testing.assert_close(
        call(network, {"head.bias": params["head.bias"] + 1}, images), call(network, params, images) + 1
    )


def test_params_of_are_leaves_apart_from_the_network() -> None:
    network = cases.OURS[0].network()
    params = params_of(network)
    assert all(value.is_leaf and value.requires_grad for value in params.values())
    with torch.no_grad():
        params["head.bias"].add_(1)
    assert not torch.equal(params["head.bias"], dict(network.named_parameters())["head.bias"])


def test_the_context_ends_even_when_the_network_fails() -> None:
    norm = BatchNorm(2).eval()
    images = torch.randn(4, 2, 3, 3)
    plain = norm(images)

    def fail() -> None:
        with statistics_of_first(2):
            assert not torch.allclose(norm(images), plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    torch.testing.assert_close(norm(images), plain, rtol=0, atol=0)


def test_contexts_nest() -> None:
    norm, images = BatchNorm(2).eval(), torch.randn(6, 2, 3, 3)
    with statistics_of_first(3):
        outer = norm(images)
        with statistics_of_first(5):
            assert not torch.allclose(norm(images), outer)
        torch.testing.assert_close(norm(images), outer, rtol=0, atol=0)


def test_statistics_of_chunks_are_averaged_and_a_short_rest_is_left_out() -> None:
    case = cases.OURS[0]
    network = case.network().double()
    params, images = params_of(network), prepared(case, 11).double()
    halves = [running_statistics(network, params, part) for part in (images[:4], images[4:8])]
    together = running_statistics(network, params, images, chunk=4)
    for name in ("encoder.0.1.running_mean", "encoder.3.1.running_var"):
        torch.testing.assert_close(together[name], (halves[0][name] + halves[1][name]) / 2)
    whole = running_statistics(network, params, images[:8])
    assert not torch.allclose(together["encoder.3.1.running_var"], whole["encoder.3.1.running_var"])


def test_in_chunks_is_the_function_on_all_without_gradients() -> None:
    images = torch.randn(10, 3, requires_grad=True)
    sizes: list[int] = []

    def function(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part.exp()

    out = in_chunks(function, images, 4)
    torch.testing.assert_close(out, images.exp().detach())
    assert sizes == [4, 4, 2]
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_widen_never_narrows(given: torch.dtype, expected: torch.dtype) -> None:
    assert widen(torch.ones(2, dtype=given)).dtype == expected


def test_half_precision_only_where_the_processor_has_it() -> None:
    with half_precision():
        out = torch.ones(2, 2) @ torch.ones(2, 2)
    native = torch.cpu._is_amx_tile_supported()
    assert out.dtype == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("first", [5, 12], ids=["support", "all"])
@pytest.mark.parametrize("channels", [1, 3])
def test_moments_of_a_convolution_follow_from_those_of_its_input(
    channels: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients and second derivatives are those of a convolution followed by batch norm."""
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(channels, 6, 3, padding=1, dtype=torch.float64)
    norm = BatchNorm(6, dtype=torch.float64)
    with torch.no_grad():
        for value in (*convolution.parameters(), *norm.parameters()):
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    images = 3 + torch.randn(12, channels, 8, 9, generator=generator, dtype=torch.float64)
    leaves = [convolution.weight, norm.weight, norm.bias]

    def derivatives() -> list[torch.Tensor]:
        with statistics_of_first(first):
            out = convolve_and_normalise(convolution, norm, images)
        gradients = torch.autograd.grad(out.sigmoid().square().sum(), leaves, create_graph=True)
        bend = torch.autograd.grad(sum((g.square().sum() for g in gradients), torch.zeros(())), leaves)
        return [out, *gradients, *bend]

    monkeypatch.setattr("metapool.base.functional._WORTH", 0)
    short = derivatives()
    monkeypatch.setattr("metapool.base.functional._WORTH", 1000)
    torch.testing.assert_close(short, derivatives())
    with statistics_of_first(4):
        assert not torch.allclose(convolve_and_normalise(convolution, norm, images), short[0])


@pytest.mark.parametrize("bias", [True, False])
def test_outside_of_the_context_running_statistics_go_into_the_weights(bias: bool) -> None:
    """Values and gradients are those of a convolution followed by batch norm in eval mode."""
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(2, 4, 3, 2, 1, bias=bias, dtype=torch.float64)
    norm = BatchNorm(4, dtype=torch.float64).eval()
    with torch.no_grad():
        for value in (*convolution.parameters(), *norm.parameters(), norm.running_mean, norm.running_var):
            assert isinstance(value, torch.Tensor)
            value.copy_(0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
    images = torch.rand(3, 2, 6, 7, generator=generator, dtype=torch.float64).requires_grad_()
    leaves = [images, *convolution.parameters(), *norm.parameters()]

    def derivatives(out: torch.Tensor) -> list[torch.Tensor]:
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    folded = derivatives(convolve_and_normalise(convolution, norm, images))
    torch.testing.assert_close(folded, derivatives(norm(convolution(images))))
    norm.train()
    assert not torch.allclose(convolve_and_normalise(convolution, norm, images), folded[0]), "then the batch speaks"


@OURS
def test_whoever_hooks_a_batch_norm_sees_what_passes_it(case: cases.Case) -> None:
    network, images = case.network(), prepared(case, 6)
    silent = network(images)
    seen: list[int] = []
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]))) for norm in norms]
    torch.testing.assert_close(network(images), silent)
    assert seen == [6] * len(norms)
    for hook in hooks:
        hook.remove()
