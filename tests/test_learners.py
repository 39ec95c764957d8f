"""Learners against slow references that adapt a copy of the network; any number of classes; save and load."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import params_of, running_statistics, statistics_of_first
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import Network, build
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.learners import ANIL, MAML, ProtoNet, centroid_logits, episode_loss
from metapool.meta_model import MetaModel

AnyLearner = MAML | ANIL | ProtoNet
SHAPE = (1, 16, 16)
LEARNERS: dict[str, AnyLearner] = {
    "maml": MAML(inner_steps=2, test_steps=3, inner_rate=0.1),
    "maml-first-order": MAML(inner_steps=2, test_steps=3, inner_rate=0.1, first_order=True),
    "anil": ANIL(inner_steps=2, test_steps=3, inner_rate=0.1),
    "protonet": ProtoNet(),
    "protonet-cosine": ProtoNet(normalise=True, temperature=0.1),
}
EACH = pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())


def network_of(classes: int = 5, seed: int = 0) -> Network:
    """A Conv4 with running statistics of smooth images and a head whose biases differ."""
    network = build(cases.network_spec("conv4", SHAPE, classes), torch.Generator().manual_seed(seed))
    nn.init.normal_(network.head.bias)
    cases.fit_statistics(network, cases.input_spec(SHAPE).prepare(cases.smooth_images(32, SHAPE)))
    return network


def meta_model(learner: AnyLearner, classes: int = 5) -> MetaModel:
    return MetaModel(network_of(classes), cases.network_spec("conv4", SHAPE, classes), learner, cases.input_spec(SHAPE))


def episode(shots: list[int], query: int = 4, shape: cases.Shape = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Support images in mixed order with ``shots[k]`` of class k, and queries."""
    labels = torch.cat([torch.full((shot,), label) for label, shot in enumerate(shots)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return cases.smooth_images(len(labels), shape, 1), labels, cases.smooth_images(query, shape, 2)


# Against slow references ----------------------------------------------------------------------------------------------


def adapted_copy(network: Network, learner: MAML | ANIL, images: Tensor, labels: Tensor, steps: int) -> Network:
    """Plain gradient descent on a copy in training mode: what the inner loop is."""
    twin = copy.deepcopy(network).train()
    moving = list(twin.parameters() if isinstance(learner, MAML) else twin.head.parameters())
    optimizer = torch.optim.SGD(moving, learner.inner_rate)
    for _ in range(steps):
        twin.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        optimizer.step()
    return twin


@pytest.mark.parametrize("learner", [MAML(inner_rate=0.1), ANIL(inner_rate=0.1)], ids=["maml", "anil"])
@pytest.mark.parametrize("shots", [[1, 1, 1, 1, 1], [3, 1, 2, 1, 4]], ids=str)
def test_gradient_learners_adapt_like_a_copy_under_sgd(learner: MAML | ANIL, shots: list[int]) -> None:
    network = network_of().double()
    support, labels, query = (x.double() if x.is_floating_point() else x for x in episode(shots))
    adapted = adapted_copy(network, learner, support, labels, learner.test_steps)
    with torch.no_grad(), statistics_of_first(len(support)):
        expected = adapted(torch.cat([support, query]))[len(support) :]
    found = learner.classify(network, params_of(network), support, labels, query)
    torch.testing.assert_close(found, expected)
    none = learner.model_copy(update={"test_steps": 0})
    assert not torch.allclose(none.classify(network, params_of(network), support, labels, query), expected)
    fewer = adapted_copy(network, learner, support, labels, learner.inner_steps)
    with torch.no_grad(), statistics_of_first(len(support)):
        expected = fewer(torch.cat([support, query]))[len(support) :]
    trained = learner.query_logits(network, params_of(network), support, labels, query)
    torch.testing.assert_close(trained, expected)


def test_anil_moves_the_head_only_and_maml_everything() -> None:
    network = network_of()
    support, labels, query = episode([2, 2, 2, 2, 2])
    maml, anil = (
        LEARNERS[name].classify(network, params_of(network), support, labels, query) for name in ("maml", "anil")
    )
    assert not torch.allclose(maml, anil)


@pytest.mark.parametrize("normalise", [False, True])
def test_prototypes_are_class_means_and_logits_negative_squared_distances(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (7, 3))
    labels = torch.tensor([1, 0, 2, 1, 1, 0, 2])
    unit = lambda vector: vector / vector.norm() if normalise else vector
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for q in range(3):
        for k in range(3):
            members = [unit(support[index]) for index in range(7) if labels[index] == k]
            prototype = unit(sum(members) / len(members))
            expected[q, k] = -sum((unit(query[q]) - prototype) ** 2)
    torch.testing.assert_close(centroid_logits(support, labels, query, normalise=normalise), expected)
    other = centroid_logits(support, labels, query, normalise=not normalise)
    assert not torch.allclose(other, expected)
    learner, network = ProtoNet(normalise=normalise, temperature=0.5), network_of()
    torch.testing.assert_close(learner.classify(network, {}, support, labels, query), expected / 0.5)


def test_protonet_trains_on_batch_statistics_and_answers_with_running_ones() -> None:
    network = network_of()
    support, labels, query = episode([1, 1, 1])
    learner, params = ProtoNet(), params_of(network)
    together = copy.deepcopy(network).train().features(torch.cat([support, query]))
    expected = centroid_logits(together[:3], labels, together[3:], normalise=False)
    trained = learner.query_logits(network, params, support, labels, query)
    torch.testing.assert_close(trained, expected)
    encoded = learner.encode(network, params, dict(network.named_buffers()), support)
    torch.testing.assert_close(encoded, network.features(support))
    answered = learner.classify(network, params, encoded, labels, network.features(query))
    assert not torch.allclose(answered, trained)


# Any episode ----------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("shots", [[1, 1], [3, 1], [1, 1, 1, 1, 1], [5, 1, 2], [1, 2, 1, 2, 1, 2, 1]], ids=str)
def test_any_number_of_classes_and_uneven_shots(learner: AnyLearner, shots: list[int]) -> None:
    model = meta_model(learner)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    support, labels, query = episode(shots)
    logits = model.logits(support, labels, query)
    assert logits.shape == (4, len(shots))
    assert logits.isfinite().all()
    assert not logits.requires_grad
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@EACH
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 40, 9), (4, 20, 28)], ids=str)
def test_images_of_any_size_and_channels(learner: AnyLearner, shape: cases.Shape) -> None:
    assert meta_model(learner).logits(*episode([2, 1], shape=shape)).shape == (4, 2)


@EACH
def test_order_of_the_support_images_does_not_matter_their_labels_do(learner: AnyLearner) -> None:
    model = meta_model(learner)
    support, labels, query = episode([2, 1, 3])
    logits = model.logits(support, labels, query)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    torch.testing.assert_close(model.logits(support[order], labels[order], query), logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model.logits(support, labels[order], query), logits, rtol=1e-3, atol=1e-3)


@EACH
def test_renaming_classes_renames_the_answers_when_the_head_has_no_rows_of_its_own(learner: AnyLearner) -> None:
    """Three classes for a head of five: no class is preferred before the support has spoken."""
    model = meta_model(learner)
    support, labels, query = episode([2, 1, 3])
    names = torch.tensor([2, 0, 1])
    logits = model.logits(support, labels, query)
    torch.testing.assert_close(model.logits(support, names[labels], query)[:, names], logits, rtol=1e-3, atol=1e-3)
    assert logits.std(1).min() > 0


@pytest.mark.parametrize("kind", [MAML, ANIL])
def test_without_steps_the_trained_head_answers_and_an_untrained_one_prefers_nothing(
    kind: type[MAML] | type[ANIL],
) -> None:
    model = meta_model(kind(test_steps=0))
    support, labels, query = episode([1, 1, 1, 1, 1])
    prepare = model.input.prepare
    with torch.no_grad(), statistics_of_first(5):
        expected = model.network(prepare(torch.cat([support, query])))[5:]
    torch.testing.assert_close(model.logits(support, labels, query), expected, rtol=1e-4, atol=1e-4)
    assert expected.std(1).min() > 1e-2
    flat = model.logits(*episode([1, 1, 1]))
    torch.testing.assert_close(flat, flat[:, :1].expand(-1, 3), rtol=1e-4, atol=1e-4)


@EACH
def test_new_classes_are_learned_from_their_support(learner: AnyLearner, toy_images: LabelledImages) -> None:
    """Blurred patterns with noise: even a random network tells them apart, so every learner must."""
    if isinstance(learner, MAML):
        learner = learner.model_copy(update={"test_steps": 10})
    if isinstance(learner, ANIL):  # its head sees four features, so it needs longer
        learner = learner.model_copy(update={"test_steps": 20, "inner_rate": 1.0})
    episodes = sample_episodes(toy_images, 4, 5, 5, 5, seed=0)
    accuracy = evaluate(meta_model(learner, classes=4), toy_images, episodes).interval.mean
    assert accuracy > 50, "chance is 25"


@EACH
def test_evaluation_splits_encoding_from_classifying_without_changing_the_answer(
    learner: AnyLearner, toy_images: LabelledImages
) -> None:
    model, images = meta_model(learner), to_float(toy_images.images[::6])
    labels = torch.tensor([0, 1, 2, 0])
    encoded = model.encode(images)
    split = model.classify(encoded[:4], labels, encoded[10:13])
    torch.testing.assert_close(split, model.logits(images[:4], labels, images[10:13]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(split, model.logits(images[:4], labels, images[13:16]))


# Saving ---------------------------------------------------------------------------------------------------------------


@EACH
def test_a_saved_model_gives_the_same_logits(learner: AnyLearner, tmp_path: Path) -> None:
    model = meta_model(learner)
    model.history = [{"step": 0, "loss": 1.5, "validation": None}, {"step": 1, "loss": 1.25, "validation": 40.0}]
    model.save(tmp_path)
    loaded = MetaModel.load(tmp_path)
    torch.testing.assert_close(loaded.logits(*episode([2, 1, 3])), model.logits(*episode([2, 1, 3])), rtol=0, atol=0)
    assert (loaded.learner, loaded.input, loaded.spec) == (model.learner, model.input, model.spec)
    assert loaded.history == model.history
    assert loaded.parameter_count == model.parameter_count
    assert loaded.models_at_inference == 1
    other = MetaModel(network_of(seed=1), model.spec, learner, model.input)
    assert not torch.allclose(other.logits(*episode([2, 1, 3])), model.logits(*episode([2, 1, 3])))


def test_a_model_without_history_writes_none(tmp_path: Path) -> None:
    meta_model(ProtoNet()).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert MetaModel.load(tmp_path).history == []


def test_protonet_needs_no_head_at_inference() -> None:
    whole, head = meta_model(MAML()).parameter_count, network_of().head
    assert meta_model(ProtoNet()).parameter_count == whole - head.weight.numel() - head.bias.numel()


def test_half_precision_moves_what_a_model_encodes_by_a_percent_at_most() -> None:
    model = MetaModel(network_of(), cases.network_spec("conv4", SHAPE, 5), ProtoNet(), cases.input_spec(SHAPE))
    images = cases.smooth_images(20, SHAPE, 7)
    exact = model.network.features(model.input.prepare(images))
    assert (model.encode(images) - exact).norm() < 0.01 * exact.norm()
    assert model.encode(images).dtype == torch.float32


def test_a_model_in_eval_mode_with_its_own_statistics_is_what_training_calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metapool.meta_model.half_precision", nullcontext)
    network = network_of()
    images = cases.input_spec(SHAPE).prepare(cases.smooth_images(20, SHAPE, 7))
    statistics = running_statistics(network, params_of(network), images)
    network.load_state_dict({**params_of(network), **statistics})
    model = MetaModel(network, cases.network_spec("conv4", SHAPE, 5), ProtoNet(), cases.input_spec(SHAPE))
    torch.testing.assert_close(model.encode(cases.smooth_images(20, SHAPE, 7)), network.features(images))
    assert not torch.allclose(model.encode(cases.smooth_images(20, SHAPE, 7)), network_of().features(images))


def edit(path: Path, **changes: object) -> None:
    about = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps(about | changes))


BROKEN = {
    "no model.json": (lambda path: (path / "model.json").unlink(), "no saved model: .*model.json is missing"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no saved model: .*missing"),
    "empty model.json": (lambda path: (path / "model.json").write_text(""), "do not fit"),
    "broken JSON": (lambda path: (path / "model.json").write_text('{"kind": '), "do not fit"),
    "not UTF-8": (lambda path: (path / "model.json").write_bytes(b"\xff\xfe"), "do not fit"),
    "other kind": (lambda path: edit(path, kind="ensemble"), "do not fit"),
    "other version": (lambda path: edit(path, version=2), "do not fit"),
    "unknown learner": (lambda path: edit(path, learner={"name": "reptile"}), "do not fit"),
    "unknown field": (lambda path: edit(path, code="import os"), "do not fit"),
    "other network": (
        lambda path: edit(path, network=cases.network_spec("resnet10", SHAPE, 5).model_dump()),
        "do not fit",
    ),
    "weights cut off": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-50]),
        "do not fit",
    ),
    "weights no safetensors": (lambda path: (path / "model.safetensors").write_bytes(b"\x80\x04K."), "do not fit"),
    "broken history": (lambda path: (path / "steps.jsonl").write_text('{"step": 0}\n{"st'), "do not fit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_error(name: str, tmp_path: Path) -> None:
    meta_model(ProtoNet()).save(tmp_path)
    assert isinstance(MetaModel.load(tmp_path), MetaModel)
    spoil, message = BROKEN[name]
    spoil(tmp_path)
    with pytest.raises(MetapoolError, match=message) as caught:
        MetaModel.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(MetapoolError, match="nowhere is no saved model"):
        MetaModel.load(tmp_path / "nowhere")


def test_the_loss_of_an_episode_is_that_of_its_queries() -> None:
    network, input = network_of(3), cases.input_spec(SHAPE)
    images = input.prepare(cases.smooth_images(12, SHAPE))
    labels = torch.arange(3).repeat_interleave(4)
    learner, params = ProtoNet(normalise=True), dict(network.named_parameters())
    support, query = [0, 4, 8], [1, 2, 3, 5, 6, 7, 9, 10, 11]
    logits = learner.query_logits(network, params, images[support], labels[support], images[query])
    found = episode_loss(learner, network, params, images, labels, 1)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels[query]))
    assert (episode_loss(learner, network, params, images, labels, 2) - found).abs() > 1e-4
