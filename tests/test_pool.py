"""Pools on disk: what goes in comes out, and whatever does not fit is one clear error before anything is used."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.store import digest_of_file
from metapool.pool import ModelPool, PretrainedModel

# What goes in comes out -----------------------------------------------------------------------------------------------


def test_round_trip_keeps_weights_inputs_and_words(fitted_model: PretrainedModel, tmp_path: Path) -> None:
    pool = ModelPool.create(tmp_path / "pool", "mine")
    pool.add(fitted_model)
    found = ModelPool.open(tmp_path / "pool").get("fitted")
    torch.testing.assert_close(
        dict(found.network.state_dict()), dict(fitted_model.network.state_dict()), rtol=0, atol=0
    )
    for field in ("id", "spec", "input", "classes", "accuracy", "licence", "provenance"):
        assert getattr(found, field) == getattr(fitted_model, field)
    images = cases.smooth_images(5, (1, 16, 16))
    torch.testing.assert_close(found(images), fitted_model(images), rtol=0, atol=0)


def test_half_precision_round_trip_is_the_nearest_half(fitted_model: PretrainedModel, tmp_path: Path) -> None:
    pool = ModelPool.create(tmp_path / "pool", "mine")
    pool.add(fitted_model, torch.float16)
    found = pool.get("fitted").network.state_dict()
    whole = fitted_model.network.state_dict()
    for name, value in whole.items():
        assert found[name].dtype == value.dtype
        expected = value.half().float() if value.is_floating_point() else value
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)
    assert any(not torch.equal(found[name], value) for name, value in whole.items()), "half precision does lose bits"
    size = (tmp_path / "pool" / "fitted.safetensors").stat().st_size
    ModelPool.create(tmp_path / "whole", "mine").add(fitted_model)
    assert size < 0.7 * (tmp_path / "whole" / "fitted.safetensors").stat().st_size


def test_a_pool_is_a_sequence_in_the_order_added(tiny_pool: ModelPool) -> None:
    assert len(tiny_pool) == 4
    assert tiny_pool.ids == ["a-conv4", "b-resnet10", "c-conv4", "d-conv4"]
    assert [model.id for model in tiny_pool] == tiny_pool.ids
    assert tiny_pool[-1].id == "d-conv4"
    assert tiny_pool[1:3].ids == ["b-resnet10", "c-conv4"]
    with pytest.raises(IndexError):
        tiny_pool[4]


def test_models_of_any_size_and_channels_take_the_same_images(tiny_pool: ModelPool) -> None:
    images = cases.smooth_images(3, (3, 20, 24))
    for model in tiny_pool:
        assert model(images).shape == (3, len(model.classes))


def test_digest_depends_on_weights_and_classes_not_on_name_or_place(
    fitted_model: PretrainedModel, tmp_path: Path
) -> None:
    first, again = (ModelPool.create(tmp_path / name, name) for name in ("first", "again"))
    first.add(fitted_model)
    again.add(fitted_model)
    assert first.digest() == again.digest()
    renamed = PretrainedModel("fitted", fitted_model.network, fitted_model.input, "xyz", spec=fitted_model.spec)
    half, other = (ModelPool.create(tmp_path / name, "first") for name in ("half", "other"))
    half.add(fitted_model, torch.float16)
    other.add(renamed)
    assert len({first.digest(), half.digest(), other.digest()}) == 3


def test_a_slice_s_digest_is_its_own(tiny_pool: ModelPool) -> None:
    assert tiny_pool[:2].digest() != tiny_pool.digest() != tiny_pool[::-1].digest()
    assert tiny_pool[:].digest() == tiny_pool.digest()


def test_what_cannot_be_added(fitted_model: PretrainedModel, tmp_path: Path) -> None:
    pool = ModelPool.create(tmp_path / "pool", "mine")
    pool.add(fitted_model)
    with pytest.raises(MetapoolError, match="'fitted' is there already"):
        pool.add(fitted_model)
    nameless = PretrainedModel("plain", nn.Flatten(), fitted_model.input, "ab")
    with pytest.raises(MetapoolError, match="'plain' has no architecture by name"):
        pool.add(nameless)
    with pytest.raises(MetapoolError, match="already holds a pool"):
        ModelPool.create(tmp_path / "pool", "mine")
    with pytest.raises(MetapoolError, match="no model 'x'; there are fitted"):
        pool.get("x")
    assert ModelPool.open(tmp_path / "pool").ids == ["fitted"]


@pytest.mark.parametrize("id", ["../outside", "a/b", "", ".hidden"])
def test_a_path_like_id_is_not_written_anywhere(fitted_model: PretrainedModel, tmp_path: Path, id: str) -> None:
    pool = ModelPool.create(tmp_path / "deep" / "pool", "mine")
    bad = PretrainedModel(id, fitted_model.network, fitted_model.input, fitted_model.classes, spec=fitted_model.spec)
    with pytest.raises(MetapoolError, match="id"):
        pool.add(bad)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["pool.json"]


def test_a_model_that_contradicts_itself_is_not_written(fitted_model: PretrainedModel, tmp_path: Path) -> None:
    pool = ModelPool.create(tmp_path / "pool", "mine")
    network, input, spec = fitted_model.network, fitted_model.input, fitted_model.spec
    with pytest.raises(MetapoolError, match="names 2 classes but has 3 outputs"):
        pool.add(PretrainedModel("m", network, input, "ab", spec=spec))
    with pytest.raises(MetapoolError, match="differ in channels or size"):
        pool.add(PretrainedModel("m", network, cases.input_spec((3, 16, 16)), "abc", spec=spec))
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["pool.json"]
    pool.add(PretrainedModel("m", network, input, "abc", spec=spec))
    assert ModelPool.open(tmp_path / "pool").ids == ["m"]


# Pretrained models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_features_of_any_network_are_what_its_last_linear_layer_sees(case: cases.Case) -> None:
    model, images = case.model(), cases.smooth_images(4, (3, 18, 22)) if case.shape[0] != 2 else torch.rand(4, 2, 9, 9)
    features, logits = model.features_and_logits(images)
    torch.testing.assert_close(logits, model(images))
    torch.testing.assert_close(model.features(images), features)
    head = [module for module in model.network.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(head(features), logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_without_a_linear_layer_has_no_features() -> None:
    model = PretrainedModel("m", nn.Flatten(), cases.input_spec((1, 16, 16)), ["a"] * 256)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 256)
    with pytest.raises(MetapoolError, match="model 'm': its network has no linear layer"):
        model.features(torch.rand(2, 1, 16, 16))


def test_a_pretrained_model_is_frozen(fitted_model: PretrainedModel) -> None:
    images = cases.smooth_images(4, (1, 16, 16))
    before = fitted_model(images)
    assert fitted_model.train() is fitted_model
    assert not any(module.training for module in fitted_model.modules())
    assert not any(parameter.requires_grad for parameter in fitted_model.parameters())
    torch.testing.assert_close(fitted_model(images), before, rtol=0, atol=0)
    assert fitted_model.parameter_count == sum(value.numel() for value in fitted_model.network.parameters())


# What does not fit ----------------------------------------------------------------------------------------------------


def edit_manifest(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads((path / "pool.json").read_text())
        change(manifest)
        (path / "pool.json").write_text(json.dumps(manifest))

    return edit


def edit_model(**changes: object) -> Callable[[Path], None]:
    return edit_manifest(lambda manifest: manifest["models"][0].update(changes))


def edit_network(**changes: object) -> Callable[[Path], None]:
    return edit_manifest(lambda manifest: manifest["models"][0]["network"].update(changes))


def edit_input(**changes: object) -> Callable[[Path], None]:
    return edit_manifest(lambda manifest: manifest["models"][0]["input"].update(changes))


def trust_file(path: Path) -> None:
    """The manifest names whatever bytes are there: what an attacker would write."""
    edit_model(sha256=digest_of_file(path / "a-conv4.safetensors"))(path)


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        weights = load_file(path / "a-conv4.safetensors")
        change(weights)
        save_file(weights, path / "a-conv4.safetensors")
        trust_file(path)

    return edit


def edit_bytes(change: Callable[[bytearray], object], trusted: bool = False) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = bytearray((path / "a-conv4.safetensors").read_bytes())
        change(content)
        (path / "a-conv4.safetensors").write_bytes(content)
        if trusted:
            trust_file(path)

    return edit


def set_bytes(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes(content) and None


def put(weights: dict[str, Tensor], name: str, index: int, value: float) -> None:
    weights[name].view(-1)[index] = value


def double_last(manifest: Any) -> None:
    manifest["models"].append(manifest["models"][-1])


BAD_MANIFESTS = {
    "missing": (lambda path: (path / "pool.json").unlink(), "is not a pool: it has no pool.json"),
    "empty": (set_bytes("pool.json", b" "), r"pool\.json: the file: Invalid JSON"),
    "broken JSON": (set_bytes("pool.json", b'{"version": 1, "name": '), r"pool\.json: the file: Invalid JSON"),
    "not UTF-8": (set_bytes("pool.json", b"\xff\xfe\x00"), r"pool\.json: .*decode"),
    "a list": (set_bytes("pool.json", b"[]"), r"pool\.json: the file: "),
    "wrong version": (edit_manifest(lambda m: m.update(version=2)), r"pool\.json: version: Input should be 1"),
    "no name": (edit_manifest(lambda m: m.pop("name")), r"pool\.json: name: Field required"),
    "unknown field": (edit_manifest(lambda m: m.update(run="rm")), r"pool\.json: run: Extra inputs"),
    "duplicate ids": (edit_manifest(double_last), r"pool\.json: model id 'd-conv4' stands twice"),
    "id that climbs": (edit_model(id="../x"), r"pool\.json: models\.0\.id: .*pattern"),
    "id with a slash": (edit_model(id="a/x"), r"pool\.json: models\.0\.id: .*pattern"),
    "absolute id": (edit_model(id="/x"), r"pool\.json: models\.0\.id: .*pattern"),
    "id with a newline": (edit_model(id="x\n"), r"pool\.json: models\.0\.id: .*pattern"),
    "number as id": (edit_model(id=3), r"pool\.json: models\.0\.id: "),
    "hash too short": (edit_model(sha256="abc"), r"pool\.json: models\.0\.sha256: "),
    "class count": (edit_model(classes=["x", "y"]), r"model 'a-conv4' names 2 classes but has 3 outputs"),
    "unknown architecture": (edit_network(architecture="vgg"), r"models\.0\.network\.architecture: .*conv4"),
    "dotted architecture": (edit_network(architecture="os.system"), r"models\.0\.network\.architecture: "),
    "absurd width": (edit_network(width=10**9), r"models\.0\.network\.width: "),
    "mean of other length": (edit_input(mean=[0.5, 0.5]), r"models\.0\.input: .*1 numbers each"),
    "zero std": (edit_input(std=[0.0]), r"models\.0\.input: .*positive"),
    "input unlike the network": (edit_input(height=32), r"model 'a-conv4': its input and its network differ"),
    "accuracy above 100": (edit_model(accuracy=101), r"models\.0\.accuracy: "),
}

BAD_WEIGHTS = {
    "missing file": (lambda path: (path / "a-conv4.safetensors").unlink(), "is missing: pool.json names .*a-conv4"),
    "changed byte": (edit_bytes(lambda b: b.__setitem__(-1, b[-1] ^ 1)), "SHA-256 is not the one in pool.json"),
    "cut off": (edit_bytes(lambda b: b.__delitem__(slice(-100, None))), "SHA-256 is not the one in pool.json"),
    "cut off, trusted": (edit_bytes(lambda b: b.__delitem__(slice(-100, None)), True), "no readable safetensors file"),
    "absurd header": (
        edit_bytes(lambda b: b.__setitem__(slice(8), b"\xff" * 8), True),
        "no readable safetensors file",
    ),
    "wrong shape": (
        edit_weights(lambda w: w.update({"head.bias": torch.zeros(4)})),
        r"head\.bias should have shape \(3,\)",
    ),
    "not a number": (edit_weights(lambda w: put(w, "head.bias", 1, float("nan"))), r"head\.bias holds values .*finite"),
    "infinite": (
        edit_weights(lambda w: put(w, "encoder.0.0.weight", 0, float("inf"))),
        r"encoder\.0\.0\.weight holds values .*finite",
    ),
    "extra tensor": (edit_weights(lambda w: w.update(more=torch.zeros(1))), "tensors do not fit conv4: more"),
    "tensor left out": (edit_weights(lambda w: w.pop("head.bias")), r"tensors do not fit conv4: head\.bias"),
    "other architecture": (edit_network(architecture="resnet10"), "tensors do not fit resnet10"),
    "other width": (edit_network(width=7), "should have shape"),
}


@pytest.fixture
def copied(tiny_pool: ModelPool, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pool.path, tmp_path / "copied"))


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_bad_manifest_is_one_error_at_opening(name: str, copied: Path) -> None:
    assert len(ModelPool.open(copied)) == 4
    spoil, message = BAD_MANIFESTS[name]
    spoil(copied)
    with pytest.raises(MetapoolError, match=message) as caught:
        ModelPool.open(copied)
    assert "\n" not in str(caught.value)
    assert str(copied) in str(caught.value)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_one_error_at_reading_and_spoil_no_other_model(name: str, copied: Path) -> None:
    assert ModelPool.open(copied).get("a-conv4").id == "a-conv4"
    spoil, message = BAD_WEIGHTS[name]
    spoil(copied)
    pool = ModelPool.open(copied)
    with pytest.raises(MetapoolError, match=message) as caught:
        pool.get("a-conv4")
    assert "\n" not in str(caught.value)
    assert "a-conv4" in str(caught.value)
    assert pool.get("d-conv4").id == "d-conv4"


class Exploit:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_nothing_in_a_pool_is_executed(write: Callable[[object, Any], object], copied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    with (copied / "a-conv4.safetensors").open("wb") as file:
        write(Exploit(mark), file)
    trust_file(copied)
    with pytest.raises(MetapoolError, match="no readable safetensors file"):
        ModelPool.open(copied).get("a-conv4")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists(), "the exploit does work where a pickle is loaded"


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(MetapoolError, match="nowhere is not a pool"):
        ModelPool.open(tmp_path / "nowhere")
