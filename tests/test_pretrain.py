"""Pools from images and the oracle: what is trained, measured, kept and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import build
from metapool.base.store import Store, generator_for
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods import load_model
from metapool.pool import ModelPool
from metapool.realdata.pretrain import (
    OracleSettings,
    PoolSettings,
    build_pool,
    fit_classifier,
    split_within_classes,
    train_oracle,
)

IMAGES = toys.stripes(toys.POOL_KINDS, 25)
HASTY = toys.TRAINING.model_copy(update={"epochs": 1})


def built(folder: Path, store: Store, images: LabelledImages = IMAGES, seed: int = 0, **changes: Any) -> ModelPool:
    settings = HASTY.model_copy(update=changes)
    return build_pool(images, settings, store, folder, name="toy", seed=seed, licence="CC0-1.0")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ModelPool:
    return toys.striped_pool(tmp_path_factory.mktemp("pretrain") / "pool")


# A pool ---------------------------------------------------------------------------------------------------------------


def test_models_learn_their_own_tasks(pool: ModelPool) -> None:
    assert pool.ids == ["stripes-000", "stripes-001", "stripes-002"]
    for entry in pool.manifest.models:
        assert entry.accuracy is not None
        assert entry.accuracy > 100 / 3 + 25
        assert len(set(entry.classes)) == 3
        assert set(entry.classes) <= set(IMAGES.classes)
        assert entry.licence == "CC0-1.0"
        for words in ("conv4 width 8", "60 images of 3 classes", "12 epochs", "seed 0", "15 held-out images"):
            assert words in entry.provenance
    assert len({entry.classes for entry in pool.manifest.models}) > 1, "each draws its own task"


def test_accuracy_is_that_of_the_stored_model_on_images_it_never_saw(pool: ModelPool) -> None:
    for model in pool:
        generator = generator_for(0, "pretrain", model.id)
        drawn = torch.randperm(len(IMAGES.classes), generator=generator)[:3]
        task = IMAGES.select(sorted(drawn.tolist()))
        assert task.classes == model.classes
        training, held_out = split_within_classes(task, 0.2, generator)
        with torch.no_grad():
            right = model(to_float(held_out.images)).argmax(1) == held_out.labels
        assert model.accuracy == pytest.approx(100 * right.double().mean().item(), abs=0.01)
        assert model.input.mean == pytest.approx((to_float(training.images).mean().item(),), abs=1e-3)
        assert model.input.std == pytest.approx((to_float(training.images).std().item(),), abs=1e-3)


def test_weights_are_stored_in_half_precision(pool: ModelPool) -> None:
    size = (pool.path / "stripes-000.safetensors").stat().st_size
    numbers = sum(value.numel() for value in pool[0].network.state_dict().values())
    assert 2 * numbers < size < 3 * numbers + 4000


def test_architectures_take_turns(tmp_path: Path, store: Store) -> None:
    found = built(tmp_path / "pool", store, models=3, architectures=("conv4:3", "resnet10:2"))
    specs = [entry.network for entry in found.manifest.models]
    assert [(spec.architecture, spec.width, spec.classes) for spec in specs] == [
        ("conv4", 3, 3),
        ("resnet10", 2, 3),
        ("conv4", 3, 3),
    ]


def test_a_width_may_be_left_out(tmp_path: Path, store: Store) -> None:
    found = built(tmp_path / "pool", store, models=1, architectures=("conv4",))
    assert found.manifest.models[0].network.width == 32


def test_adding_a_model_moves_no_other_and_trains_no_other(tmp_path: Path, store: Store) -> None:
    two = built(tmp_path / "two", store, models=2)
    made = {folder.name for folder in (store.root / "pretrained").iterdir() if folder.is_dir()}
    three = built(tmp_path / "three", store, models=3)
    more = {folder.name for folder in (store.root / "pretrained").iterdir() if folder.is_dir()} - made
    assert len(more) == 1
    assert [three.model_digest(id) for id in two.ids] == [two.model_digest(id) for id in two.ids]
    anew = built(tmp_path / "anew", Store(tmp_path / "other", threads=1), models=2)
    assert anew.digest() == two.digest(), "the same seed gives the same bits"
    other = built(tmp_path / "seed", store, models=2, seed=1)
    assert not {other.model_digest(id) for id in other.ids} & {two.model_digest(id) for id in two.ids}


def test_epochs_and_data_are_part_of_what_a_model_is(tmp_path: Path, store: Store) -> None:
    digests = {
        built(tmp_path / name, store, models=1, **changes).digest()
        for name, changes in {
            "plain": {},
            "epochs": {"epochs": 2},
            "shift": {"shift": 0},
            "data": {"images": toys.stripes(toys.POOL_KINDS, 25, seed=1)},
        }.items()
    }
    assert len(digests) == 4


def test_colour_and_oblong_images(tmp_path: Path, store: Store) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 16, 24), generator=generator, dtype=torch.uint8)
    data = LabelledImages(images, torch.arange(20) % 2, ("a", "ü☂ b"))
    found = built(tmp_path / "pool", store, data, models=1, way=2)
    assert found[0].input.shape == (3, 16, 24)
    assert found[0].classes == ("a", "ü☂ b")


def test_one_colour_only_has_a_deviation_to_divide_by(tmp_path: Path, store: Store) -> None:
    data = LabelledImages(torch.full((20, 1, 16, 16), 200, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"))
    assert built(tmp_path / "pool", store, data, models=1, way=2)[0].input.std == (1e-3,)


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "held"), [(0.2, 2), (0.01, 1), (0.5, 5), (0.96, 9), (0.999, 9)])
def test_a_share_of_every_class_is_held_out(share: float, held: int) -> None:
    images = toys.stripes((0, 1, 2), 10)
    rest, out = split_within_classes(images, share, torch.Generator().manual_seed(0))
    assert torch.bincount(out.labels).tolist() == [held] * 3
    assert torch.bincount(rest.labels).tolist() == [10 - held] * 3
    seen = {image.numpy().tobytes() for part in (rest, out) for image in part.images}
    assert len(seen) == 30, "every image stands on one side"
    other = split_within_classes(images, share, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(out.images, other.images)


def test_fitting_leaves_the_network_alone_and_lowers_the_loss(pool: ModelPool) -> None:
    entry = pool.manifest.models[0]
    network = build(entry.network, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = IMAGES.select([0, 3, 6])
    state = fit_classifier(network, images, entry.input, toys.TRAINING, torch.Generator().manual_seed(0))
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert set(state) == set(before)
    losses = []
    for weights in (before, state):
        network.load_state_dict(weights)
        logits = network.eval()(entry.input.prepare(to_float(images.images)))
        losses.append(torch.nn.functional.cross_entropy(logits, images.labels).item())
    assert losses[1] < 0.7 * losses[0]


# Mistakes -------------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "too few classes": ({"way": 9}, "9-way model needs 9 classes; there are 8"),
    "too few images": ({"images": toys.stripes(toys.POOL_KINDS, 4)}, "'0-degrees-4-pixels' has 4 images"),
    "unknown architecture": ({"architectures": ("vgg:8",)}, "'vgg:8'.*NAME one of conv4, resnet10, resnet18"),
    "width is no number": ({"architectures": ("conv4:wide",)}, "'conv4:wide': expected NAME:WIDTH"),
    "width is zero": ({"architectures": ("conv4:0",)}, "'conv4:0': width 0: .*greater than or equal to 1"),
    "second one wrong": ({"architectures": ("conv4:4", "conv5:4")}, "'conv5:4'"),
    "images too small": (
        {"images": LabelledImages(torch.zeros(40, 1, 8, 16, dtype=torch.uint8), torch.arange(40) % 4, tuple("abcd"))},
        "'conv4:8': height 8: .*greater than or equal to 16",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_error_before_anything_is_trained(name: str, tmp_path: Path, store: Store) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(MetapoolError, match=message):
        built(tmp_path / "pool", store, **changes)
    assert not store.root.exists()
    assert not (tmp_path / "pool").exists()


def test_a_pool_is_not_overwritten(tmp_path: Path, store: Store) -> None:
    first = built(tmp_path / "pool", store, models=1).digest()
    with pytest.raises(MetapoolError, match=f"{tmp_path / 'pool'} already holds a pool"):
        built(tmp_path / "pool", store, models=2)
    assert ModelPool.open(tmp_path / "pool").digest() == first
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MetapoolError, match=str(tmp_path / "file")):
        built(tmp_path / "file", store)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "my pool", "../out", ".hidden", "größe", "a" * 120])
def test_a_name_that_is_no_file_name_is_refused_before_training(name: str, tmp_path: Path, store: Store) -> None:
    with pytest.raises(MetapoolError, match="pool name"):
        build_pool(IMAGES, HASTY, store, tmp_path / "pool", name=name, seed=0)
    assert not store.root.exists()


@pytest.mark.parametrize("bad", [{"models": 0}, {"way": 1}, {"architectures": ()}, {"held_out": 1.0}, {"epochs": 0}])
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PoolSettings(**bad)


# The oracle -----------------------------------------------------------------------------------------------------------


def test_the_oracle_learns_from_real_images(tmp_path: Path) -> None:
    settings = OracleSettings(steps=40, width=8, way=4, shot=2, query=4, learning_rate=1e-2)
    told: list[tuple[str, int, int]] = []
    for name, seed, steps in (("first", 0, 40), ("again", 0, 40), ("other", 1, 40), ("start", 0, 1)):
        torch.manual_seed(steps)
        changed = settings.model_copy(update={"steps": steps})
        train_oracle(IMAGES, changed, seed, tmp_path / name, lambda *step: told.append(step))
    assert told[:40] == [("oracle", step + 1, 40) for step in range(40)]
    bits = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other")}
    assert bits["first"] == bits["again"]
    assert bits["first"] != bits["other"]

    model = load_model(tmp_path / "first")
    assert isinstance(model, MetaModel)
    assert isinstance(model.learner, ProtoNet)
    images = toys.stripes(toys.NEW_KINDS, 20, seed=5)
    episodes = sample_episodes(images, 4, 1, 5, 60, 0)
    trained, start = (evaluate(load_model(tmp_path / name), images, episodes).interval for name in ("first", "start"))
    assert trained.low > start.high


def test_the_oracle_needs_enough_classes(tmp_path: Path) -> None:
    with pytest.raises(MetapoolError, match="9-way"):
        train_oracle(IMAGES, OracleSettings(steps=1, way=9), 0, tmp_path / "model", lambda *_: None)
    assert not (tmp_path / "model").exists()
