"""The head fitted to a task, the embedding of a task, and the probe trained on the bank."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.functional import in_chunks
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import Network, build
from metapool.embed import ProbeSettings, dissimilarity, fisher_diagonal, refit_head, task_embedding, train_probe

SHAPE = (1, 16, 16)
SPEC = cases.input_spec(SHAPE)
SETTINGS = ProbeSettings(width=8, steps=40, batch=32, learning_rate=1e-2)


def clusters(classes: int, per_class: int = 15, dimension: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(classes).repeat(per_class)
    centres = torch.randn(classes, dimension, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), dimension, generator=generator, dtype=torch.float64)
    return 5 * (centres[labels] + 0.4 * noise) + 100, labels


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_head_is_where_the_gradient_of_its_objective_vanishes(classes: int) -> None:
    features, labels = clusters(classes)
    weight, bias = refit_head(features, labels, classes, strength=0.02)
    assert weight.shape == (classes, 4)
    assert bias.shape == (classes,)
    standardised = (features - features.mean(0)) / features.std(0, correction=0)
    inner = (weight * features.std(0, correction=0)).requires_grad_()
    shift = (bias + weight @ features.mean(0)).requires_grad_()

    def slope(strength: float) -> float:
        loss = F.cross_entropy(standardised @ inner.T + shift, labels)
        loss = loss + strength / 2 * inner.square().sum()
        return max(float(part.abs().max()) for part in torch.autograd.grad(loss, (inner, shift)))

    assert slope(0.02) < 2e-6
    assert slope(0.04) > 1e-3, "for two classes as for many: the strength counts both rows"


def test_the_head_is_the_same_in_any_unit_and_ignores_constant_features() -> None:
    features, labels = clusters(3)
    weight, bias = refit_head(features, labels, 3, strength=0.1)
    logits = features @ weight.T + bias
    assert (logits.argmax(1) == labels).double().mean() > 0.9
    unit = torch.tensor([1e-3, 1.0, 10.0, 1e3], dtype=torch.float64)
    moved = torch.cat([features * unit - 5, torch.full((len(labels), 1), 0.1, dtype=torch.float64)], 1)
    weight, bias = refit_head(moved, labels, 3, strength=0.1)
    torch.testing.assert_close(moved @ weight.T + bias, logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weight[:, -1], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert refit_head(features.float(), labels, 3)[0].dtype == torch.float32


def test_a_stronger_penalty_makes_a_smaller_head() -> None:
    features, labels = clusters(3)
    norms = [float(refit_head(features, labels, 3, strength)[0].norm()) for strength in (0.1, 1.0, 10.0)]
    assert norms == sorted(norms, reverse=True)


def test_a_head_needs_images_of_every_class() -> None:
    features, labels = clusters(3)
    with pytest.raises(ValueError, match="4 classes"):
        refit_head(features, labels, 4)
    with pytest.raises(ValueError, match="1 classes"):
        refit_head(features, labels * 0, 1)


@pytest.fixture(scope="module")
def bank() -> LabelledImages:
    return cases.toy_images(classes=8, per_class=16, shape=SHAPE, seed=0)


@pytest.fixture(scope="module")
def probe(bank: LabelledImages) -> Network:
    return train_probe(bank.images, bank.labels, 8, SPEC, SETTINGS, torch.Generator().manual_seed(0))


def accuracy(network: Network, data: LabelledImages) -> float:
    logits = in_chunks(network, SPEC.prepare(to_float(data.images)))
    return float((logits.argmax(1) == data.labels).double().mean())


def test_the_probe_learns_the_bank_and_what_it_has_not_seen_of_its_classes(
    probe: Network, bank: LabelledImages
) -> None:
    assert not any(module.training for module in probe.modules())
    assert accuracy(probe, bank) > 0.9
    assert accuracy(probe, cases.toy_images(classes=8, per_class=16, shape=SHAPE, seed=9)) > 0.9
    untrained = train_probe(
        bank.images, bank.labels, 8, SPEC, SETTINGS.model_copy(update={"steps": 0}), torch.Generator().manual_seed(0)
    )
    assert accuracy(untrained, bank) < 0.5


def test_the_probe_follows_its_generator_alone(probe: Network, bank: LabelledImages) -> None:
    torch.manual_seed(123)
    again = train_probe(bank.images, bank.labels, 8, SPEC, SETTINGS, torch.Generator().manual_seed(0))
    torch.testing.assert_close(dict(again.state_dict()), dict(probe.state_dict()), rtol=0, atol=0)
    other = train_probe(bank.images, bank.labels, 8, SPEC, SETTINGS, torch.Generator().manual_seed(1))
    assert not torch.equal(other.head.weight, probe.head.weight)


def test_the_probes_statistics_are_those_of_the_bank(probe: Network, bank: LabelledImages) -> None:
    # As many images as the bank has, less than a chunk: the running statistics are those of one batch.
    images = SPEC.prepare(to_float(bank.images))
    first = probe.encoder[0][0](images)  # type: ignore[index]
    norm = probe.encoder[0][1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, first.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_the_probe_takes_images_of_another_size_and_channels() -> None:
    colour = cases.toy_images(classes=3, per_class=12, shape=(3, 20, 24), seed=0)
    probe = train_probe(colour.images, colour.labels, 3, SPEC, SETTINGS, torch.Generator().manual_seed(0))
    assert accuracy(probe, colour) > 0.9
    embedding = task_embedding(probe, SPEC, colour.images, colour.labels)
    assert all(bool(value.isfinite().all()) for value in embedding.values())


@pytest.mark.parametrize("classes", [[0, 1], [2, 5, 7, 1]])
def test_the_embedding_is_the_fisher_of_the_probe_with_the_fitted_head(
    probe: Network, bank: LabelledImages, classes: list[int]
) -> None:
    task = bank.select(classes)
    images = SPEC.prepare(to_float(task.images))
    weight, bias = refit_head(in_chunks(probe.features, images), task.labels, len(classes))
    spec = cases.network_spec("conv4", SHAPE, len(classes), width=8)
    fitted = build(spec, torch.Generator().manual_seed(0))
    encoder = {name: value for name, value in probe.state_dict().items() if name.startswith("encoder.")}
    fitted.load_state_dict({**encoder, "head.weight": weight, "head.bias": bias})
    params = {name: value for name, value in fitted.named_parameters() if name.startswith("encoder.")}
    expected = fisher_diagonal(fitted, params, images)
    full = task_embedding(probe, SPEC, task.images, task.labels, per_filter=False)
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-9)
    filters = task_embedding(probe, SPEC, task.images, task.labels)
    torch.testing.assert_close(
        filters["encoder.1.0.weight"], expected["encoder.1.0.weight"].mean((1, 2, 3)), rtol=1e-4, atol=1e-9
    )
    torch.testing.assert_close(filters["encoder.1.1.bias"], full["encoder.1.1.bias"], rtol=0, atol=0)
    params["encoder.1.0.weight"] = 2 * params["encoder.1.0.weight"]
    other = fisher_diagonal(fitted, params, images)["encoder.1.0.weight"]
    assert not torch.allclose(other, expected["encoder.1.0.weight"], rtol=1e-2)


def test_the_embedding_leaves_the_probe_as_it_was(probe: Network, bank: LabelledImages) -> None:
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    task = bank.select([0, 3])
    first = task_embedding(probe, SPEC, task.images, task.labels)
    torch.testing.assert_close(dict(probe.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(task_embedding(probe, SPEC, to_float(task.images), task.labels), first, rtol=0, atol=0)
    with pytest.raises(ValueError, match="eval mode"):
        task_embedding(build(probe_spec(), torch.Generator()).train(), SPEC, task.images, task.labels)


def probe_spec() -> cases.NetworkSpec:
    return cases.network_spec("conv4", SHAPE, 8)


def test_tasks_of_the_same_classes_are_nearer_than_tasks_of_others(probe: Network) -> None:
    # Halves of two tasks, of unlike numbers of classes: every half is nearest to its other half.
    embeddings = {}
    for seed in (0, 1):
        halves = cases.toy_images(classes=8, per_class=12, shape=SHAPE, seed=20 + seed)
        for name, classes in {"few": [0, 1], "many": [2, 3, 4, 5, 6]}.items():
            task = halves.select(classes)
            embeddings[f"{name}-{seed}"] = task_embedding(probe, SPEC, task.images, task.labels)
    matrix = dissimilarity(embeddings) + 9 * np.eye(4)
    assert matrix.argmin(1).tolist() == [2, 3, 0, 1]
