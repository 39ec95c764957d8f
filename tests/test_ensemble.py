"""The ensemble: standardised features of unit length side by side, nearest centroid, saved as a pool."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import cases
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import moments, whitening
from metapool.base.images import to_float
from metapool.ensemble import Ensemble, model_features, raw_features
from metapool.methods import load_model
from metapool.pool import ModelPool, PretrainedModel

IMAGES = to_float(toys.stripes(range(6), 5).images)
"""[30, 1, 16, 16], six classes in order."""


@pytest.fixture(autouse=True)
def _in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without AMX: what is compared here is not how eight bits round."""
    monkeypatch.setattr("metapool.ensemble.half_precision", nullcontext)


@pytest.fixture
def ensemble(tiny_pool: ModelPool) -> Ensemble:
    models = list(tiny_pool)
    return Ensemble(models, [moments(raw_features(model, IMAGES)) for model in models])


def episode(shots: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Support, its labels, and one query of each class."""
    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots))
    rows = torch.cat([torch.arange(5 * k, 5 * k + shot) for k, shot in enumerate(shots)])
    return IMAGES[rows], labels, IMAGES[4::5][: len(shots)]


def logits(model: Ensemble, shots: list[int]) -> Tensor:
    support, labels, query = episode(shots)
    return model.classify(model.encode(support), labels, model.encode(query))


# Features -------------------------------------------------------------------------------------------------------------


def test_raw_features_are_the_network_s_in_chunks(tiny_pool: ModelPool) -> None:
    many = IMAGES.repeat(5, 1, 1, 1)  # more than two chunks
    for model in tiny_pool:
        with torch.no_grad():
            expected = model.network.features(model.input.prepare(many))
        torch.testing.assert_close(raw_features(model, many), expected, rtol=1e-4, atol=1e-4)
        assert raw_features(model, many).dtype == torch.float32


def test_features_are_standardised_then_of_unit_length(tiny_pool: ModelPool) -> None:
    model = tiny_pool[0]
    raw = raw_features(model, IMAGES)
    std, mean = torch.std_mean(raw, 0)
    found = model_features(model, IMAGES, moments(raw))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(30))
    alive = std > 0.1 * std.mean()
    assert alive.sum() >= 2
    standard = (raw - mean) / (std + 1e-3 * std.mean())
    torch.testing.assert_close(found, standard / standard.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, raw / raw.norm(dim=1, keepdim=True))


class Scaled(nn.Module):
    """A network whose features are another's, scaled and moved."""

    def __init__(self, network: nn.Module, scale: float, offset: float) -> None:
        super().__init__()
        self.inner, self.scale, self.offset = network, scale, offset
        self.head = nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self.scale * self.inner.features(images) + self.offset
        return found


def test_no_model_outweighs_another_by_its_scale(ensemble: Ensemble) -> None:
    first = ensemble.models[0]
    loud = PretrainedModel("loud", Scaled(first.network, 100.0, 3.0), first.input, first.classes)
    with_loud = Ensemble([loud, *ensemble.models[1:]], [moments(raw_features(loud, IMAGES)), *ensemble.moments[1:]])
    torch.testing.assert_close(with_loud.encode(IMAGES), ensemble.encode(IMAGES), rtol=1e-3, atol=1e-3)
    unadjusted = Ensemble([loud, *ensemble.models[1:]], ensemble.moments)
    assert not torch.allclose(unadjusted.encode(IMAGES), ensemble.encode(IMAGES), rtol=1e-2, atol=1e-2)


def test_encoding_is_the_models_side_by_side_in_order(ensemble: Ensemble) -> None:
    parts = [model_features(m, IMAGES, moment) for m, moment in zip(ensemble.models, ensemble.moments)]
    torch.testing.assert_close(ensemble.encode(IMAGES), torch.cat(parts, 1), rtol=0, atol=0)
    assert len({part.shape[1] for part in parts}) > 1, "models of different dimensions"


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [[1, 1], [3, 1, 2], [2, 1, 4, 1, 1, 3]], ids=str)
def test_logits_are_negative_squared_distances_to_unit_centroids(shots: list[int], ensemble: Ensemble) -> None:
    support, labels, query = episode(shots)
    found = logits(ensemble, shots)
    known = ensemble.encode(support).double()
    for q, row in enumerate(ensemble.encode(query).double()):
        for k in range(len(shots)):
            centre = torch.stack([f / f.norm() for f, label in zip(known, labels) if label == k]).mean(0)
            expected = -((row / row.norm() - centre / centre.norm()) ** 2).sum()
            torch.testing.assert_close(found[q, k].double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, found.flip(1))


def test_a_projection_maps_the_concatenated_features(ensemble: Ensemble, tmp_path: Path) -> None:
    plain = ensemble.encode(IMAGES)
    projection = whitening(plain, 0.5, 7)
    projected = Ensemble(ensemble.models, ensemble.moments, projection=projection)
    torch.testing.assert_close(projected.encode(IMAGES), plain @ projection)
    assert projected.encode(IMAGES).shape == (30, 7)
    assert projected.parameter_count == ensemble.parameter_count + projection.numel()
    projected.save(tmp_path)
    torch.testing.assert_close(Ensemble.load(tmp_path).encode(IMAGES), projected.encode(IMAGES), rtol=0, atol=0)
    with pytest.raises(ValueError, match="none of them could answer alone"):
        Ensemble(ensemble.models, ensemble.moments, average_over_models=True, projection=projection)


def test_order_of_models_does_not_matter(ensemble: Ensemble) -> None:
    turned = Ensemble(ensemble.models[::-1], ensemble.moments[::-1])
    torch.testing.assert_close(logits(turned, [2, 1, 1]), logits(ensemble, [2, 1, 1]), rtol=1e-4, atol=1e-5)
    fewer = Ensemble(ensemble.models[:2], ensemble.moments[:2])
    assert not torch.allclose(logits(fewer, [2, 1, 1]), logits(ensemble, [2, 1, 1]), rtol=1e-2, atol=1e-2)


def test_a_query_does_not_see_the_others(ensemble: Ensemble) -> None:
    support, labels, query = episode([2, 1, 1])
    known = ensemble.encode(support)
    together = ensemble.classify(known, labels, ensemble.encode(query))
    alone = torch.cat([ensemble.classify(known, labels, ensemble.encode(one[None])) for one in query])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_answering_with_each_model_alone(ensemble: Ensemble) -> None:
    each = Ensemble(ensemble.models, ensemble.moments, average_over_models=True)
    found = logits(each, [1, 2, 1])
    assert tuple(found.shape) == (4, 3, 3)
    for index, (model, moment) in enumerate(zip(ensemble.models, ensemble.moments)):
        torch.testing.assert_close(found[index], logits(Ensemble([model], [moment]), [1, 2, 1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_costs(ensemble: Ensemble) -> None:
    total = sum(model.parameter_count for model in ensemble.models)
    assert (ensemble.parameter_count, ensemble.models_at_inference) == (total, 4)
    each = Ensemble(ensemble.models, ensemble.moments, average_over_models=True)
    assert (each.parameter_count, each.models_at_inference) == (total // 4, 1)
    assert ensemble.input == ensemble.models[0].input


# On disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
def test_what_is_saved_answers_alike(average: bool, ensemble: Ensemble, tmp_path: Path) -> None:
    first = Ensemble(ensemble.models, ensemble.moments, average_over_models=average)
    first.save(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, Ensemble)
    assert again.average_over_models is average
    assert [model.id for model in again.models] == [model.id for model in ensemble.models]
    torch.testing.assert_close(logits(again, [1, 2, 1]), logits(first, [1, 2, 1]), rtol=0, atol=0)


def without_moments_of_the_last(folder: Path) -> None:
    stored = load_file(folder / "moments.safetensors")
    save_file(
        {name: value for name, value in stored.items() if not name.endswith(".3")}, folder / "moments.safetensors"
    )


BROKEN: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no moments": lambda folder: (folder / "moments.safetensors").unlink(),
    "garbled moments": lambda folder: (folder / "moments.safetensors").write_bytes(b"garbled"),
    "moments of too few models": without_moments_of_the_last,
    "no pool": lambda folder: shutil.rmtree(folder / "pool"),
    "no weights": lambda folder: next((folder / "pool").glob("*.safetensors")).unlink(),
    "garbled pool": lambda folder: (folder / "pool" / "pool.json").write_text("{"),
    "no mode": lambda folder: (folder / "model.json").write_text('{"kind": "ensemble"}'),
    "no JSON": lambda folder: (folder / "model.json").write_text("{"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_one_error(how: str, ensemble: Ensemble, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    ensemble.save(folder)
    Ensemble.load(folder)
    BROKEN[how](folder)
    with pytest.raises(MetapoolError, match=str(folder)):
        Ensemble.load(folder)


def test_a_model_without_an_architecture_by_name_cannot_be_saved(tmp_path: Path) -> None:
    model = cases.WITH_BATCH_NORM[-1].model()
    images = cases.smooth_images(8, (2, 20, 28))
    with pytest.raises(MetapoolError, match=model.id):
        Ensemble([model], [moments(raw_features(model, images))]).save(tmp_path)
