"""Optimal transport of neurons: plans against linear programs, functions kept, permuted copies undone; the method."""

from itertools import permutations
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
import toys
from scipy.optimize import linprog
from torch import Tensor, nn

from metapool.align import (
    IMAGE,
    Layer,
    align,
    alike,
    encoder_of,
    encoders_of,
    folded_rows,
    layers_of,
    transport,
)
from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import Architecture, Network, build
from metapool.base.store import Store
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.meta_model import MetaModel
from metapool.methods import load_model
from metapool.methods.ota import OTA, average, spread
from metapool.pool import ModelPool, PretrainedModel

SHAPE = (1, 16, 16)
SMALL = OTA(recovery=toys.HASTY, bank_images=50)
ARCHITECTURES: tuple[Architecture, ...] = ("conv4", "resnet10", "resnet18")
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES)


def random(architecture: Architecture, seed: int = 0, width: int = 4, classes: int = 3) -> Network:
    """A network in float64 in which every number is random: biases, batch norms and running statistics too."""
    network = build(cases.network_spec(architecture, SHAPE, classes, width), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 100)
    for name, value in network.double().state_dict().items():
        if value.dim() == 1:
            value.copy_(
                torch.rand(value.shape, generator=generator) + (0.5 if "var" in name or "weight" in name else 0)
            )
    return network


def shuffled(network: Network, seed: int = 0) -> tuple[Params, dict[str, Tensor]]:
    """The same encoder with all its neurons in another order, written down without the code under test."""
    generator = torch.Generator().manual_seed(seed)
    state = encoder_of(network)
    orders: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    for layer in layers_of(network):
        width = len(state[f"{layer.convolution}.weight"])
        order = orders.setdefault(layer.outputs, torch.randperm(width, generator=generator))
        if layer.inputs != IMAGE:
            state[f"{layer.convolution}.weight"] = state[f"{layer.convolution}.weight"][:, orders[layer.inputs]]
        for module in (layer.convolution, layer.norm):
            for name in [*dict(modules[module].named_parameters()), *dict(modules[module].named_buffers())]:
                if name != "num_batches_tracked":
                    state[f"{module}.{name}"] = state[f"{module}.{name}"][order]
    return state, orders


def features(network: Network, encoder: Params) -> Tensor:
    """What an encoder makes of five images, in float64."""
    images = cases.smooth_images(5, SHAPE).double()
    network.load_state_dict({**network.state_dict(), **encoder})
    with torch.no_grad():
        return network.features(images)


def by_channel(flat: Tensor, channels: int) -> Tensor:
    return flat.view(len(flat), channels, -1)


# The plan -------------------------------------------------------------------------------------------------------------


def costs(count: int, seed: int) -> Tensor:
    return torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(cost: Tensor, plan: Tensor) -> float:
    return float(cost[plan, torch.arange(len(cost))].sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_cheapest_of_all_permutations_and_of_all_transport_plans(seed: int) -> None:
    cost = costs(6, seed)
    plan = transport(cost)
    every = [total(cost, torch.tensor(order)) for order in permutations(range(6))]
    assert total(cost, plan) == pytest.approx(min(every), rel=1e-12)
    marginals = np.concatenate([np.kron(np.eye(6), np.ones(6)), np.kron(np.ones(6), np.eye(6))])
    solved = linprog(cost.flatten().numpy(), A_eq=marginals, b_eq=np.full(12, 1 / 6))
    assert solved.fun is not None
    assert 6 * solved.fun == pytest.approx(total(cost, plan), rel=1e-9), "no plan that splits neurons is cheaper"
    assert total(cost, torch.arange(6)) > min(every) + 1e-3


def test_a_plan_says_which_neuron_comes_to_each_place() -> None:
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 4, 1])
    plan = transport(torch.cdist(rows[order], rows))
    torch.testing.assert_close(rows[order][plan], rows, rtol=0, atol=0)
    assert not torch.equal(plan, order), "its inverse: the two would differ"


# What describes a neuron ----------------------------------------------------------------------------------------------


@EACH
def test_folded_rows_are_what_convolution_and_batch_norm_compute(architecture: Architecture) -> None:
    network = random(architecture)
    encoder, modules = encoder_of(network), dict(network.named_modules())
    for layer in layers_of(network):
        convolution, norm = modules[layer.convolution], modules[layer.norm]
        assert isinstance(convolution, nn.Conv2d)
        size = convolution.kernel_size[0]
        patch = torch.randn(1, convolution.in_channels, size, size, dtype=torch.float64)
        truth = norm(nn.functional.conv2d(patch, convolution.weight, convolution.bias)).flatten()
        rows = folded_rows(encoder, layer)
        torch.testing.assert_close(rows @ torch.cat([patch.flatten(), torch.ones(1)]), truth, rtol=1e-10, atol=1e-10)
        plain = folded_rows({**encoder, f"{layer.norm}.running_var": encoder[f"{layer.norm}.weight"] * 0 + 1}, layer)
        assert not torch.allclose(plain, rows)


# Alignment ------------------------------------------------------------------------------------------------------------


@EACH
def test_the_layers_are_all_there_are(architecture: Architecture) -> None:
    network = random(architecture)
    layers = layers_of(network)
    convolutions = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {layer.convolution for layer in layers} == convolutions
    assert {layer.norm for layer in layers} == norms
    assert len(layers) == len(convolutions) == {"conv4": 4, "resnet10": 12, "resnet18": 20}[architecture]
    known = [IMAGE]
    for layer in layers:
        assert layer.inputs in known, "inputs are in order before the layer is"
        known.append(layer.outputs)


@EACH
def test_a_permuted_copy_computes_the_same_in_another_order(architecture: Architecture) -> None:
    network = random(architecture)
    before = features(network, {})
    copy, orders = shuffled(network)
    order = orders[layers_of(network)[-1].outputs]
    after = features(network, copy)
    torch.testing.assert_close(by_channel(after, len(order)), by_channel(before, len(order))[:, order])
    assert not torch.allclose(after, before)


@EACH
def test_an_aligned_model_computes_what_it_did(architecture: Architecture) -> None:
    network, other = random(architecture), random(architecture, seed=1)
    before = features(other, {})
    aligned, plans = align(encoder_of(other), encoder_of(network), layers_of(network))
    order = plans[layers_of(network)[-1].outputs]
    after = features(other, aligned)
    assert sorted(order.tolist()) == list(range(len(order)))
    torch.testing.assert_close(by_channel(after, len(order)), by_channel(before, len(order))[:, order])
    assert not torch.allclose(after, before), "companion: something was moved"
    assert spread([encoder_of(network), aligned]) < spread([encoder_of(network), encoder_of(random(architecture, 1))])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_with_a_permuted_copy_a_network_stays_what_it_is(architecture: Architecture, dtype: torch.dtype) -> None:
    network = random(architecture, width=8).to(dtype)
    reference = encoder_of(network)
    copy, _ = shuffled(network)
    aligned, _ = align(copy, reference, layers_of(network))
    torch.testing.assert_close(average([reference, aligned]), reference, rtol=0, atol=0)
    plain = average([reference, copy])
    assert all(not torch.allclose(plain[name], reference[name]) for name in reference if name.endswith("1.weight"))
    assert not torch.allclose(features(network.double(), plain), features(network, reference))


def test_the_order_of_inputs_counts() -> None:
    """Companion: rows compared without their inputs in order would be matched wrongly."""
    network = random("conv4", width=8)
    copy, orders = shuffled(network)
    reference = encoder_of(network)
    layers = layers_of(network)
    forgetful = [Layer(layer.convolution, layer.norm, IMAGE, layer.outputs) for layer in layers]
    good, plans = align(copy, reference, layers)
    bad, _ = align(copy, reference, forgetful)
    assert all(torch.equal(orders[name][plan], torch.arange(8)) for name, plan in plans.items())
    assert not torch.equal(bad["encoder.1.0.weight"], reference["encoder.1.0.weight"])
    torch.testing.assert_close(good, reference, rtol=0, atol=0)


@EACH
def test_the_average_is_the_mean_of_all_aligned_models(architecture: Architecture) -> None:
    models = [
        PretrainedModel(
            str(seed), random(architecture, seed, classes=2 + seed), cases.input_spec(SHAPE), "abcde"[: 2 + seed]
        )
        for seed in range(3)
    ]
    loose, aligned = encoders_of(models, aligned=False), encoders_of(models, aligned=True)
    torch.testing.assert_close(aligned[0], loose[0], rtol=0, atol=0)
    fused = average(aligned)
    for name, value in fused.items():
        torch.testing.assert_close(value, sum(encoder[name] for encoder in aligned) / torch.tensor(3.0).double())
    for one, other in zip(aligned[1:], loose[1:]):
        assert all(torch.equal(one[n].flatten().sort()[0], other[n].flatten().sort()[0]) for n in one), (
            "moved, not changed"
        )
    first = next(iter(fused))
    assert not torch.allclose(fused[first], average(loose)[first])
    assert spread(aligned) < spread(loose)
    assert spread(aligned[:1]) == 0


def test_networks_of_unlike_shape_are_refused() -> None:
    small, wide = random("conv4"), random("conv4", width=5)
    with pytest.raises(MetapoolError, match="one architecture and width"):
        align(encoder_of(small), encoder_of(wide), layers_of(small))
    stranger = PretrainedModel("stranger", nn.Flatten(), cases.input_spec(SHAPE), ["a"])
    with pytest.raises(MetapoolError, match="'stranger' is no conv4"):
        encoders_of([stranger], aligned=False)


def test_alike_are_models_that_differ_in_their_heads_only(tiny_pool: ModelPool, tmp_path: Path) -> None:
    assert alike(tiny_pool) == [["a-conv4"], ["b-resnet10"], ["c-conv4"], ["d-conv4"]]
    pool = ModelPool.create(tmp_path / "pool", "pool")
    for id, classes, width in (("a", 2, 4), ("b", 3, 4), ("c", 3, 6)):
        pool.add(cases.fitted(id, "conv4", classes=classes, shape=SHAPE, width=width))
    assert alike(pool) == [["a", "b"], ["c"]]


# The method -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPool, Store]:
    root = tmp_path_factory.mktemp("ota")
    return toys.striped_pool(root / "pool"), Store(root / "store", threads=1)


def bits(model: MetaModel) -> dict[str, Tensor]:
    return dict(model.network.state_dict())


def test_same_seed_same_bits_other_seed_other_bits(stripes: tuple[ModelPool, Store], store: Store) -> None:
    first = SMALL.fit(*stripes, seed=0)
    torch.manual_seed(1234)
    torch.testing.assert_close(bits(SMALL.fit(stripes[0], store, 0)), bits(first), rtol=0, atol=0)
    other = SMALL.fit(*stripes, seed=1)
    assert not torch.equal(bits(other)["encoder.0.1.running_mean"], bits(first)["encoder.0.1.running_mean"])
    assert torch.equal(bits(other)["encoder.0.0.weight"], bits(first)["encoder.0.0.weight"])


def test_the_fused_weights_are_the_mean_and_statistics_are_theirs(stripes: tuple[ModelPool, Store]) -> None:
    found = bits(SMALL.fit(*stripes, seed=0))
    fused = average(encoders_of(list(stripes[0]), aligned=True))
    for name, value in fused.items():
        if ".running_" in name:
            assert not torch.allclose(found[name], value)
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    record = SMALL.fit(*stripes, seed=0).history[0]
    assert record["models"] == stripes[0].ids
    assert record["aligned_spread"] < record["spread"]


def test_killed_it_starts_again_and_ends_with_the_same_bits(
    stripes: tuple[ModelPool, Store], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = SMALL.fit(*stripes, seed=0)
    calls: list[str] = []

    def die(*_: Any) -> None:
        calls.append("saving")
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(MetaModel, "save", die)
        with pytest.raises(KeyboardInterrupt):
            SMALL.fit(stripes[0], store, 0)
    assert calls == ["saving"]
    assert not list((store.root / "meta-model").glob("*/model.json"))
    torch.testing.assert_close(bits(SMALL.fit(stripes[0], store, 0)), bits(unbroken), rtol=0, atol=0)


def test_of_unlike_architectures_the_best_is_kept_and_answers_alike_when_loaded(
    tiny_pool: ModelPool, store: Store, toy_images: LabelledImages, tmp_path: Path
) -> None:
    model = SMALL.fit(tiny_pool, store, 0, toy_images)
    accuracies = [record["validation"] for record in model.history]
    assert len(accuracies) == 4
    episodes = sample_episodes(toy_images, 5, 1, 5, 200, 0)
    assert evaluate(model, toy_images, episodes).interval.mean == max(accuracies) > min(accuracies)
    assert [record["spread"] for record in model.history] == [0, 0, 0, 0], "each is alone"
    best = tiny_pool[accuracies.index(max(accuracies))]
    assert (model.spec, model.input) == (best.spec, best.input)
    model.save(tmp_path)
    images = to_float(toy_images.images[:40:2])
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded.encode(images), model.encode(images), rtol=0, atol=0)
    without = SMALL.fit(tiny_pool, store, 0)
    assert without.history != model.history


def test_other_inputs_are_another_result(stripes: tuple[ModelPool, Store], toy_images: LabelledImages) -> None:
    pool, store = stripes
    fits = [
        SMALL.fit(pool, store, 0),
        SMALL.fit(pool, store, 0, toy_images),
        SMALL.fit(pool[:2], store, 0),
        SMALL.model_copy(update={"bank_images": 20}).fit(pool, store, 0),
    ]
    assert len({str(sorted(map(str, [fit.history, bits(fit)["encoder.1.1.running_mean"]]))) for fit in fits}) == 4


def test_beats_chance_on_new_classes(stripes: tuple[ModelPool, Store]) -> None:
    images = toys.stripes(toys.NEW_KINDS, 25, seed=5)
    episodes = sample_episodes(images, 4, 1, 5, 200, 0)
    model = OTA(recovery=toys.RECOVERY, bank_images=50).fit(*stripes, seed=0)
    assert evaluate(model, images, episodes).interval.low > 25 + 10
    wrong = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mixed = LabelledImages(images.images[wrong], images.labels, images.classes)
    assert 15 < evaluate(model, mixed, episodes).interval.mean < 35


def test_an_empty_pool_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(MetapoolError, match="the pool has no models"):
        SMALL.fit(ModelPool.create(tmp_path / "empty", "empty"), store, 0)


def test_settings_are_closed() -> None:
    with pytest.raises(ValueError, match="bank_images"):
        OTA(bank_images=1)
