"""LoRA Recycle: the transformer and its adapters, pools of them, the losses of the paper, the method."""

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.errors import MetapoolError
from metapool.base.images import to_float
from metapool.base.networks import Network, NetworkSpec, build
from metapool.base.store import Store, digest_of_file
from metapool.base.transformer import AdaptedQKV, class_attention, is_adapter, only_patches
from metapool.check import CHECKS, World
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.interface.cli import main
from metapool.interface.recipe import backbone_images
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.lora_recycle import FrozenBackbone, LoRARecycle
from metapool.methods.lora_recycle.tasks import Draws, Episode, MetaLoRA, important_patches
from metapool.pool import BACKBONE, ModelPool, PretrainedModel
from metapool.realdata.pretrain import PoolSettings, build_pool, fit_classifier
from metapool.recover import PRIORS, GeneratorRecovery, recover_pool
from metapool.task_losses import distillation_loss

SHAPE = (1, 16, 16)
IMAGES = toys.stripes(toys.POOL_KINDS, 25)
BACKBONE_IMAGES = toys.stripes((0, 2, 7, 10), 25, seed=8)
TRAINING = PoolSettings(
    models=3, way=3, architectures=("vit-lora:16",), epochs=12, backbone_epochs=8, batch=16, shift=1, learning_rate=1e-2
)
RECOVERY = GeneratorRecovery(per_class=8, steps=10, code=16, width=8, shift=1, learning_rate=0.02, weights=PRIORS)
SMALL = LoRARecycle(recovery=RECOVERY, way=3, query=3, tasks=2, steps=30, check_every=10, learning_rate=5e-3)


def network_of(architecture: Any, seed: int = 0, shape: cases.Shape = SHAPE, classes: int = 3) -> Network:
    return build(cases.network_spec(architecture, shape, classes, width=16), torch.Generator().manual_seed(seed))


def adapted(seed: int = 0, size: float = 0.3) -> Network:
    """A transformer whose adapters do add something."""
    network = network_of("vit-lora", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "lora_" in name:
                value.normal_(0, size, generator=generator)
    return network


def plain(network: Network) -> Network:
    """The same backbone and head without adapters."""
    other = network_of("vit").to(next(network.parameters()).dtype)
    other.load_state_dict({name: value for name, value in network.state_dict().items() if "lora_" not in name})
    return other


def build_stripes(folder: Path, store: Store, **changes: Any) -> ModelPool:
    settings = TRAINING.model_copy(update=changes)
    return build_pool(IMAGES, settings, store, folder, name="toy", seed=0, backbone_images=BACKBONE_IMAGES)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, told: list[tuple[str, int, int]]) -> ModelPool:
    root = tmp_path_factory.mktemp("adapters")
    return build_stripes(root / "pool", Store(root / "store", progress=lambda *step: told.append(step)))


@pytest.fixture(scope="module")
def world(pool: ModelPool, tmp_path_factory: pytest.TempPathFactory) -> World:
    images = toys.stripes(toys.NEW_KINDS, 20, seed=5)
    return World(tmp_path_factory.mktemp("world"), pool, images, sample_episodes(images, 4, 1, 5, 100, 0))


@pytest.fixture(scope="module")
def bank(pool: ModelPool, world: World) -> TaskBank:
    return recover_pool(pool, RECOVERY, world.store("whole"))


# The transformer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["vit", "vit-lora"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (2, 20, 28)], ids=str)
def test_any_size_channels_and_classes(architecture: str, shape: cases.Shape) -> None:
    network, images = network_of(architecture, shape=shape, classes=7), torch.randn(3, *shape)
    features = network.features(images)
    assert features.shape == (3, 16)
    assert network(images).shape == (3, 7)
    torch.testing.assert_close(network(images), network.head(features))
    assert sum("lora_" in name for name in network.state_dict()) == (24 if architecture == "vit-lora" else 0)


@pytest.mark.parametrize("architecture", ["vit", "vit-lora"])
def test_same_seed_same_weights_whatever_the_global_seed(architecture: str) -> None:
    torch.manual_seed(1)
    first = network_of(architecture).state_dict()
    torch.manual_seed(2)
    torch.testing.assert_close(network_of(architecture).state_dict(), first, rtol=0, atol=0)
    other = network_of(architecture, seed=1).state_dict()
    constant = ("bias", "norm", "_up")
    assert all(torch.equal(other[n], first[n]) == any(part in n for part in constant) for n in first)


@pytest.mark.parametrize("learning", [True, False])
def test_an_adapter_that_never_learned_is_the_backbone_exactly(learning: bool) -> None:
    network, images = network_of("vit-lora"), torch.randn(4, *SHAPE)
    with torch.set_grad_enabled(learning):
        torch.testing.assert_close(network(images), plain(network)(images), rtol=0, atol=0)
        assert not torch.allclose(adapted()(images), plain(adapted())(images), rtol=1e-2, atol=1e-2)


def test_two_branches_and_one_merged_matrix_say_the_same() -> None:
    network, images = adapted().double(), torch.randn(4, *SHAPE, dtype=torch.float64)
    branches = network(images).detach()
    with torch.no_grad():
        merged = network(images)
    frozen = copy.deepcopy(network).requires_grad_(False)(images)
    expected = plain(network)
    for own, block in zip(expected.encoder[0].blocks, network.encoder[0].blocks):
        layer = block.attn.qkv
        assert isinstance(layer, AdaptedQKV)
        with torch.no_grad():
            own.attn.qkv.weight[:16] += layer.lora_query_up @ layer.lora_query_down
            own.attn.qkv.weight[32:] += layer.lora_value_up @ layer.lora_value_down
    slow = expected(images).detach()
    for answer in (branches, merged, frozen):
        torch.testing.assert_close(answer, slow)
    with torch.no_grad():
        for own in expected.encoder[0].blocks:
            own.attn.qkv.weight[16:32] *= 1.5  # keys have no adapter
    assert not torch.allclose(expected(images), slow)


def test_spec_of_a_transformer_needs_whole_heads_and_patches() -> None:
    good = cases.network_spec("vit", SHAPE, 3, width=32).model_dump()
    NetworkSpec(**good)
    for bad, words in (({"width": 24}, "multiple of 16"), ({"height": 18}, "multiples of 4")):
        with pytest.raises(ValueError, match=words):
            NetworkSpec(**{**good, **bad})
        NetworkSpec(**{**good, **bad, "architecture": "conv4"})


def test_without_timm_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    network_of("vit")
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(MetapoolError, match=r"pip install 'metapool\[vit\]'"):
        network_of("vit")
    network_of("conv4")


# Patches --------------------------------------------------------------------------------------------------------------


def last_attention(network: Network, images: Tensor) -> Tensor:
    """Slow: softmax rows [N, T] of the class token in the last block, head by head."""
    vit: Any = network.encoder[0]
    tokens = vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    block = vit.blocks[-1]
    seen, width = block.norm1(tokens), tokens.shape[-1]
    query, key, _ = block.attn.qkv(seen).split(width, -1)
    rows = []
    for head in range(width // 16):
        part = slice(16 * head, 16 * head + 16)
        rows.append(torch.softmax((key[..., part] @ query[:, 0, part].unsqueeze(-1)).squeeze(-1) / math.sqrt(16), -1))
    return torch.stack(rows).mean(0)


def test_importance_is_the_class_token_s_attention() -> None:
    spec = cases.network_spec("vit-lora", SHAPE, 3, width=32)
    network = build(spec, torch.Generator().manual_seed(3)).double()
    images = torch.randn(5, *SHAPE, dtype=torch.float64)
    row = last_attention(network, images)
    importance = class_attention(network.encoder[0], images)
    assert importance.shape == (5, 16)
    torch.testing.assert_close(importance, row[:, 1:])
    torch.testing.assert_close(importance.sum(1), 1 - row[:, 0])
    assert not torch.allclose(importance, torch.full_like(importance, 1 / 16), rtol=1e-2)
    assert not network.encoder[0].blocks[-1].attn.qkv._forward_hooks


def test_left_out_patches_are_as_if_they_had_never_been() -> None:
    network, images = adapted().double(), torch.randn(3, *SHAPE, dtype=torch.float64)
    kept = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    vit: Any = network.encoder[0]
    tokens = vit._pos_embed(vit.patch_embed(images))
    slow = []
    for image, patches in zip(tokens, kept):
        own = torch.stack([image[0], *(image[1 + int(patch)] for patch in patches)]).unsqueeze(0)
        slow.append(vit.norm(vit.blocks(own))[0, 0])
    with only_patches(kept):
        found = network.features(images)
    torch.testing.assert_close(found, torch.stack(slow))
    with only_patches(kept.flip(1)):
        torch.testing.assert_close(network.features(images), found)
    with only_patches(torch.arange(16).expand(3, -1)):
        torch.testing.assert_close(network.features(images), vit(images))
    assert not torch.allclose(network.features(images), found), "all patches are seen outside the context"
    with only_patches((kept + 1) % 16):
        assert not torch.allclose(network.features(images), found)


def test_important_patches_are_those_looked_at_most(pool: ModelPool, bank: TaskBank) -> None:
    model, task = pool[1], bank[pool.ids[1]]
    with torch.no_grad():
        looks = last_attention(model.network, model.input.prepare(to_float(task.images)))[:, 1:]
    kept = important_patches(model, task, 0.25)
    assert kept.shape == (len(task.images), 4)
    for row, look in zip(kept, looks):
        others = [patch for patch in range(16) if patch not in row.tolist()]
        assert row.tolist() == sorted(set(row.tolist()))
        assert look[row].min() >= look[others].max() - 1e-6
    assert important_patches(model, task, 0.001).shape[1] == 1
    assert len({tuple(row.tolist()) for row in kept}) > 1


# A pool of adapters ---------------------------------------------------------------------------------------------------


def states(pool: ModelPool, own: bool) -> list[dict[str, Tensor]]:
    return [{n: w for n, w in m.network.state_dict().items() if is_adapter(n) == own} for m in pool]


def test_models_are_adapters_of_one_backbone(pool: ModelPool, told: list[tuple[str, int, int]]) -> None:
    files = sorted(path.name for path in pool.path.iterdir())
    assert files == [BACKBONE, "pool.json", *(f"toy-{number:03d}.safetensors" for number in range(3))]
    assert all(is_adapter(name) for name in load_file(pool.path / "toy-000.safetensors"))
    assert not any(is_adapter(name) for name in load_file(pool.path / BACKBONE))
    assert [step for step in told if step[0] == "backbone"] == [("backbone", epoch + 1, 8) for epoch in range(8)]
    first, second, third = states(pool, own=False)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(third, first, rtol=0, atol=0)
    first, second, _ = states(pool, own=True)
    assert not any(torch.equal(first[name], second[name]) for name in first), "each learned its own"
    for entry in pool.manifest.models:
        assert entry.accuracy is not None
        assert entry.accuracy > 100 / 3 + 25
        assert entry.input == pool.manifest.models[0].input
        assert "backbone, frozen, was trained on 4 classes" in entry.provenance


def test_round_trip(pool: ModelPool, tmp_path: Path) -> None:
    again = ModelPool.create(tmp_path / "again", "again")
    for model in pool:
        again.add(model, torch.float16)
    again = ModelPool.open(again.path)
    images = cases.smooth_images(4, SHAPE)
    for first, second in zip(pool, again):
        torch.testing.assert_close(second(images), first(images), rtol=0, atol=0)
    assert again.digest() == pool.digest()
    assert again[:2].digest() != pool.digest()
    more = cases.fitted("conv", "conv4", classes=3, shape=SHAPE)
    again.add(more)
    torch.testing.assert_close(ModelPool.open(again.path)[-1](images), more(images), rtol=0, atol=0)


def test_a_pool_has_one_backbone(pool: ModelPool, tmp_path: Path) -> None:
    mine = ModelPool.create(tmp_path / "mine", "mine")
    for model in pool[:1]:
        mine.add(model, torch.float16)
    other = network_of("vit-lora", seed=9)
    stranger = PretrainedModel("x", other, pool[0].input, "abc", spec=pool[0].spec)
    before = {path.name: path.read_bytes() for path in mine.path.iterdir()}
    with pytest.raises(MetapoolError, match="model 'x' stands on another backbone"):
        mine.add(stranger, torch.float16)
    assert {path.name: path.read_bytes() for path in mine.path.iterdir()} == before


def test_digest_depends_on_the_backbone(pool: ModelPool, tmp_path: Path) -> None:
    pools = []
    for seed in (1, 2):
        network = copy.deepcopy(pool[0].network)
        assert isinstance(network, Network)
        backbone = {n: w for n, w in network_of("vit-lora", seed).state_dict().items() if not is_adapter(n)}
        network.load_state_dict(backbone, strict=False)
        model = PretrainedModel("same", network, pool[0].input, pool[0].classes, spec=pool[0].spec)
        pools.append(ModelPool.create(tmp_path / str(seed), "mine"))
        pools[-1].add(model)
    entries = [made.manifest.models[0] for made in pools]
    assert entries[0].sha256 == entries[1].sha256
    assert pools[0].digest() != pools[1].digest()


def edit_backbone(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """What an attacker would do: other weights, and a manifest that names them."""

    def edit(path: Path) -> None:
        weights = load_file(path / BACKBONE)
        change(weights)
        save_file(weights, path / BACKBONE)
        manifest = json.loads((path / "pool.json").read_text())
        for entry in manifest["models"]:
            entry["backbone"] = digest_of_file(path / BACKBONE)
        (path / "pool.json").write_text(json.dumps(manifest))

    return edit


def edit_entry(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads((path / "pool.json").read_text())
        manifest["models"][0].update(changes)
        (path / "pool.json").write_text(json.dumps(manifest))

    return edit


PLACES = "encoder.0.pos_embed"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: (path / BACKBONE).unlink(), f"{BACKBONE} is missing: pool.json names model 'toy-000'"),
    "changed": (lambda path: (path / BACKBONE).write_bytes(b"x" * 99), f"{BACKBONE}: its SHA-256 is not the one"),
    "other file": (lambda path: shutil.copy(path / "toy-001.safetensors", path / BACKBONE), "its SHA-256 is not"),
    "shape": (edit_backbone(lambda w: w.update({PLACES: w[PLACES][:, 1:].clone()})), "pos_embed should have shape"),
    "not a number": (edit_backbone(lambda w: w[PLACES].fill_(float("nan"))), "pos_embed holds values that are not"),
    "more": (edit_backbone(lambda w: w.update(more=torch.zeros(1))), "tensors do not fit vit-lora: more"),
    "adapters in it": (
        edit_backbone(lambda w: w.update({"head.bias": torch.zeros(3)})),
        r"tensors do not fit vit-lora: head\.bias",
    ),
    "two": (edit_entry(backbone="0" * 64), "its models name different backbones"),
    "none named": (edit_entry(backbone=None), "'toy-000': adapters, and nothing else, name the backbone"),
    "no hash": (edit_entry(backbone="../x"), r"models\.0\.backbone: .*pattern"),
    "a network of its own": (
        edit_entry(network=cases.network_spec("vit", SHAPE, 3, 16).model_dump()),
        "'toy-000': adapters, and nothing else",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_backbone_that_does_not_fit_is_one_error(name: str, pool: ModelPool, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(pool.path, tmp_path / "copied"))
    ModelPool.open(copied).get("toy-000")
    spoil, message = SPOILT[name]
    spoil(copied)
    with pytest.raises(MetapoolError, match=message) as caught:
        ModelPool.open(copied).get("toy-000")
    assert "\n" not in str(caught.value)


def test_pools_of_before_are_read(tiny_pool: ModelPool, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_pool.path, tmp_path / "copied"))
    manifest = json.loads((copied / "pool.json").read_text())
    for entry in manifest["models"]:
        assert entry.pop("backbone") is None
    (copied / "pool.json").write_text(json.dumps(manifest))
    assert ModelPool.open(copied).digest() == tiny_pool.digest()


# Building one ---------------------------------------------------------------------------------------------------------


def test_only_adapters_and_head_learn() -> None:
    network, spec = network_of("vit-lora"), cases.input_spec(SHAPE)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    hasty = TRAINING.model_copy(update={"epochs": 1})
    state = fit_classifier(network, IMAGES.select([0, 1, 2]), spec, hasty, torch.Generator().manual_seed(0))
    assert set(state) == set(before)
    assert {name for name in state if not torch.equal(state[name], before[name])} == set(filter(is_adapter, before))


def test_a_broken_build_goes_on_and_trains_nothing_twice(tmp_path: Path) -> None:
    quick = {"epochs": 1, "backbone_epochs": 1}
    told: list[str] = []

    def stop(kind: str, done: int, total: int) -> None:
        told.append(kind)
        if (kind, done) == ("pretrained", 2) and len(told) < 5:
            raise KeyboardInterrupt

    store = Store(tmp_path / "store", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        build_stripes(tmp_path / "pool", store, **quick)
    assert not (tmp_path / "pool").exists()
    broken = build_stripes(tmp_path / "pool", store, **quick)
    assert told.count("backbone") == 1
    whole = build_stripes(tmp_path / "whole", Store(tmp_path / "other"), **quick)
    assert broken.digest() == whole.digest()
    other = build_stripes(tmp_path / "longer", Store(tmp_path / "other"), epochs=1, backbone_epochs=2)
    assert other.digest() != whole.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ("vit-lora:16", "vit-lora:32")}, "stand on one backbone, so they have one width"),
        ({"architectures": ("vit-lora:24",)}, "'vit-lora:24': .*multiple of 16"),
        ({"backbone_images": None}, "give images that their backbone learns from"),
    ],
)
def test_mistakes_are_one_error_before_anything_is_trained(
    changes: dict[str, Any], message: str, tmp_path: Path, store: Store
) -> None:
    images = changes.pop("backbone_images", BACKBONE_IMAGES)
    settings = TRAINING.model_copy(update=changes)
    with pytest.raises(MetapoolError, match=message):
        build_pool(IMAGES, settings, store, tmp_path / "pool", name="toy", seed=0, backbone_images=images)
    assert not store.root.exists()


def test_the_command_takes_images_for_the_backbone(tmp_path: Path) -> None:
    data = toys.write_images(tmp_path / "images", toys.stripes((0, 4), 5))
    backbone = toys.write_images(tmp_path / "others", toys.stripes((1, 7, 9), 6))
    main([
        *("pool", "build", "--out", str(tmp_path / "pool"), "--data", str(data), "--backbone-data", str(backbone)),
        *("--architectures", "vit-lora:16", "--models", "2", "--way", "2", "--epochs", "1", "--backbone-epochs", "1"),
        *("--size", "16", "--channels", "1", "--jobs", "1", "--store", str(tmp_path / "store")),
    ])  # fmt: skip
    pool = ModelPool.open(tmp_path / "pool")
    assert [entry.network.architecture for entry in pool.manifest.models] == ["vit-lora", "vit-lora"]
    assert "trained on 3 classes of other images" in pool.manifest.models[1].provenance


def test_a_backbone_learns_from_the_other_domains() -> None:
    images = backbone_images("icons", None, 32, 3)
    assert {name.split("/")[0] for name in images.classes} == {"emoji", "logos"}
    assert images.labels.unique().tolist() == list(range(len(images.classes)))
    assert {name.split("/")[0] for name in backbone_images("emoji", None, 32, 3).classes} == {"icons", "logos"}
    assert backbone_images("icons", "logos", 32, 3).classes[0] == images.classes[-128].removeprefix("logos/")


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shot", [1, 2])
def test_losses_are_those_of_each_episode_alone(shot: int, pool: ModelPool) -> None:
    student = MetaLoRA(pool, ProtoNet(normalise=False, temperature=2.0), 3, 0)
    params = {name: value.detach() + 0.1 for name, value in student.initial().items()}
    images = toys.stripes((0, 4, 9), 5, seed=3).images
    teacher = torch.randn(10, 2)
    episodes = [
        Episode(images, torch.arange(3).repeat_interleave(5), None, None),
        Episode(images[:10], torch.arange(2).repeat_interleave(5), None, teacher),
    ]
    model = student.model(params)
    slow = []
    for episode in episodes:
        features, classes = model.encode(to_float(episode.images)), int(episode.labels.max()) + 1
        centres = [features[5 * k : 5 * k + shot].mean(0) for k in range(classes)]
        queries = [row for row in range(len(features)) if row % 5 >= shot]
        logits = torch.stack([torch.stack([-(features[q] - c).square().sum() / 2 for c in centres]) for q in queries])
        if episode.teacher is None:
            chosen = [logits[i].softmax(0)[episode.labels[q]] for i, q in enumerate(queries)]
            slow.append(-torch.stack(chosen).log().mean())
        else:
            slow.append(distillation_loss(logits, episode.teacher[queries]))
    found = student.losses(params, episodes, shot)
    torch.testing.assert_close(torch.stack(found), torch.stack(slow), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.stack(student.losses(student.initial(), episodes, shot)), torch.stack(slow))


def test_episodes_are_of_one_model_or_of_several(pool: ModelPool, bank: TaskBank) -> None:
    def drawn(interpolate: float, keep: float = 1.0) -> list[Episode]:
        draws = Draws(pool, bank, 3, 4, interpolate, keep)
        return [draws.draw(torch.Generator().manual_seed(seed)) for seed in range(12)]

    tasks = list(bank.values())
    images = {image.numpy().tobytes(): (t, i) for t, task in enumerate(tasks) for i, image in enumerate(task.images)}
    for episode in drawn(0.0):
        places = [images[image.numpy().tobytes()] for image in episode.images]
        (owner,) = {task for task, _ in places}
        labels = [int(tasks[owner].labels[row]) for _, row in places]
        order = list(dict.fromkeys(labels))
        assert [order.index(label) for label in labels] == episode.labels.tolist()
        assert episode.teacher is not None
        expected = torch.stack([tasks[owner].logits[row][order] for _, row in places])
        torch.testing.assert_close(episode.teacher, expected, rtol=0, atol=0)
    mixed = 0
    for episode in drawn(1.0):
        assert episode.teacher is None
        places = [images[image.numpy().tobytes()] for image in episode.images]
        names = [tasks[task].classes[int(tasks[task].labels[row])] for task, row in places]
        assert [list(dict.fromkeys(names)).index(name) for name in names] == episode.labels.tolist()
        mixed += len({task for task, _ in places}) > 1
    assert mixed > 6
    assert 0 < sum(episode.teacher is None for episode in drawn(0.5)) < 12
    kept = drawn(0.5, 0.25)[0].kept
    assert kept is not None
    assert kept.shape == (12, 4)


# The method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("method", [SMALL, FrozenBackbone()], ids=lambda method: method.name)
def test_it_keeps_the_promises_of_a_method(promise: str, method: Any, world: World, tmp_path: Path) -> None:
    if (promise, method.name) == ("cites its paper and says what it costs", "frozen-backbone"):
        promise = "settings go through YAML and back"
    where = World(tmp_path, world.pool, world.images, world.episodes)
    CHECKS[promise](method, where)


def test_it_learns_adapters_and_nothing_else(world: World, bank: TaskBank) -> None:
    pool = world.pool
    files = {path.name: path.read_bytes() for path in pool.path.iterdir()}
    teachers = [model(to_float(IMAGES.images)) for model in pool]
    frozen = FrozenBackbone().fit(pool, world.store("whole"), 0)
    model = SMALL.fit(pool, world.store("whole"), 0)
    assert {path.name: path.read_bytes() for path in pool.path.iterdir()} == files
    for before, teacher in zip(teachers, pool):
        torch.testing.assert_close(teacher(to_float(IMAGES.images)), before, rtol=0, atol=0)

    first, last = frozen.network.state_dict(), model.network.state_dict()
    moved = {name for name in last if name.startswith("encoder") and not torch.equal(first[name], last[name])}
    assert moved == {name for name in last if "lora_" in name}
    backbone = {name: value for name, value in last.items() if not is_adapter(name)}
    torch.testing.assert_close(backbone, states(pool, own=False)[0], rtol=0, atol=0)
    assert model.spec.architecture == "vit-lora"
    assert [record["step"] for record in model.history] == list(range(30))

    images = bank.labelled("by-name", pool[0].input)
    episodes = sample_episodes(images, 4, 1, 3, 100, 0)
    learned, start = (evaluate(each, images, episodes).interval for each in (model, frozen))
    assert learned.low > start.high, "it learned what it was taught"


def test_a_frozen_backbone_is_the_backbone(pool: ModelPool, store: Store) -> None:
    model = FrozenBackbone().fit(pool, store, 0)
    network = pool[2].network
    assert isinstance(network, Network)
    vit = plain(network)
    images = to_float(IMAGES.images[::9])
    torch.testing.assert_close(model.encode(images), vit.features(model.input.prepare(images)))
    assert not torch.allclose(model.encode(images), pool[2].features(images), atol=1e-3)
    assert not store.root.exists()


def test_settings_change_what_is_learned(world: World, bank: TaskBank) -> None:
    brief = SMALL.model_copy(update={"steps": 3})
    changes: list[dict[str, Any]] = [{}, {"interpolate": 0.0}, {"interpolate": 1.0}, {"keep_tokens": 0.5}, {"tasks": 1}]
    learned = []
    for change in changes:
        model = brief.model_copy(update=change).fit(world.pool, world.store("whole"), 0)
        assert isinstance(model, MetaModel)
        learned.append(model.network.state_dict()["encoder.0.blocks.0.attn.qkv.lora_value_up"])
    assert len({value.numpy().tobytes() for value in learned}) == len(changes)


@pytest.mark.parametrize("method", [SMALL, FrozenBackbone()], ids=lambda method: method.name)
def test_other_pools_are_refused(method: Any, tiny_pool: ModelPool, store: Store, tmp_path: Path) -> None:
    with pytest.raises(MetapoolError, match=r"one shared backbone was expected, but 'a-conv4' is a conv4 of its own"):
        method.fit(tiny_pool, store, 0)
    with pytest.raises(MetapoolError, match="it is empty"):
        method.fit(ModelPool.create(tmp_path / "empty", "empty"), store, 0)
    assert not store.root.exists()


@pytest.mark.parametrize("bad", [{"tasks": 0}, {"interpolate": 1.1}, {"keep_tokens": 0}, {"learner": {"name": "maml"}}])
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoRARecycle(**bad)
