"""The student: initial weights by seed, statistics of recovered images, accuracy on validation classes."""

import cases
import pytest
import torch
import toys
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.functional import Params, running_statistics
from metapool.base.images import InputSpec, LabelledImages, to_float
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.learners import ANIL, AnyLearner, ProtoNet
from metapool.student import CALIBRATION_IMAGES, Student

SPEC = cases.input_spec((1, 16, 16))


def student(bank: TaskBank, seed: int = 0, input: InputSpec = SPEC, learner: AnyLearner | None = None) -> Student:
    return Student(6, 4, learner or ProtoNet(normalise=True), input, bank.labelled("distinct", input).images, seed)


def other_params(made: Student) -> Params:
    return {name: value.detach() * 1.5 + 0.01 for name, value in made.initial().items()}


def test_initial_parameters_are_leaves_decided_by_the_seed(tiny_bank: TaskBank) -> None:
    torch.manual_seed(7)
    first = student(tiny_bank).initial()
    torch.manual_seed(8)
    again, other = student(tiny_bank).initial(), student(tiny_bank, seed=1).initial()
    assert all(value.is_leaf and value.requires_grad for value in first.values())
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    for name in ("encoder.0.0.weight", "encoder.3.0.weight", "head.weight"):
        assert not torch.equal(first[name], other[name])


def test_changing_the_parameters_in_place_leaves_the_network_alone(tiny_bank: TaskBank) -> None:
    made = student(tiny_bank)
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    with torch.no_grad():
        for value in made.initial().values():
            value.add_(1)
    torch.testing.assert_close(dict(made.network.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 20)], ids=str)
def test_the_network_fits_width_way_and_input(shape: cases.Shape, tiny_bank: TaskBank) -> None:
    """Recovered images of any size and colour become the student's."""
    made = student(tiny_bank, input=cases.input_spec(shape))
    assert (made.spec.architecture, made.spec.width, made.spec.classes) == ("conv4", 6, 4)
    assert (made.spec.channels, made.spec.height, made.spec.image_width) == shape
    assert tuple(made.calibration.shape) == (4 * (3 + 2 + 3 + 4), *shape)
    assert tuple(made.network(made.calibration).shape) == (48, 4)


def test_calibration_images_are_those_of_the_bank_in_an_order_by_seed(tiny_bank: TaskBank) -> None:
    images = SPEC.prepare(to_float(tiny_bank.labelled("distinct", SPEC).images))
    drawn, other = student(tiny_bank).calibration, student(tiny_bank, seed=1).calibration

    def in_order(batch: Tensor) -> Tensor:
        return batch[batch.flatten(1).double().sum(1).argsort()]

    torch.testing.assert_close(in_order(drawn), in_order(images), rtol=0, atol=0)
    assert not torch.equal(drawn, other)


def test_calibration_is_bounded(tiny_bank: TaskBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapool.student.CALIBRATION_IMAGES", 10)
    assert CALIBRATION_IMAGES >= 256, "a chunk of running_statistics at least"
    assert len(student(tiny_bank).calibration) == 10


def test_a_model_has_the_parameters_and_the_statistics_that_belong_to_them(tiny_bank: TaskBank) -> None:
    made = student(tiny_bank)
    params = other_params(made)
    model = made.model(params, [{"step": 0}])
    torch.testing.assert_close({n: p.detach() for n, p in model.network.named_parameters()}, params, rtol=0, atol=0)
    wanted = running_statistics(made.network, params, made.calibration)
    torch.testing.assert_close(dict(model.network.named_buffers()), wanted, rtol=0, atol=0)
    assert model.history == [{"step": 0}]
    assert (model.learner, model.input, model.spec) == (made.learner, SPEC, made.spec)

    first = model.network.encoder[0]
    torch.testing.assert_close(first[1].running_mean, first[0](made.calibration).mean((0, 2, 3)))
    statistics = {name: value.clone() for name, value in wanted.items()}
    made.model(made.initial())
    assert not torch.allclose(model.network.encoder[0][1].running_mean, statistics["encoder.0.1.running_mean"])


def test_a_model_shares_the_student_s_network(tiny_bank: TaskBank) -> None:
    """As documented: the next call changes it, so a model is saved or used before."""
    made = student(tiny_bank)
    first = made.model(made.initial())
    before = first.encode(torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    made.model(other_params(made))
    after = first.encode(torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("learner", [ProtoNet(normalise=True), ANIL(test_steps=2)], ids=["protonet", "anil"])
def test_accuracy_is_that_of_stored_one_shot_episodes(learner: AnyLearner, tiny_bank: TaskBank) -> None:
    images = toys.stripes(toys.NEW_KINDS, 8)
    made = student(tiny_bank, learner=learner)
    params = other_params(made)
    found = made.accuracy(params, images, episodes=20)
    episodes = sample_episodes(images, 4, 1, 5, 20, 0)
    assert found == evaluate(made.model(params), images, episodes).interval.mean
    made.accuracy(made.initial(), images, episodes=20)
    assert made.accuracy(params, images, episodes=20) == found, "the same episodes at every call"
    others = (sample_episodes(images, 4, 1, 5, 20, seed) for seed in (1, 2, 3))
    assert any(found != evaluate(made.model(params), images, other).interval.mean for other in others)


def test_without_validation_there_is_no_accuracy(tiny_bank: TaskBank, toy_images: LabelledImages) -> None:
    made = student(tiny_bank)
    assert made.accuracy(made.initial(), None) is None
    assert made.accuracy(made.initial(), toy_images, episodes=5) is not None


@pytest.mark.parametrize("blocks", [1, 2])
def test_maps_are_what_the_first_blocks_of_its_model_give(blocks: int, tiny_bank: TaskBank) -> None:
    made = student(tiny_bank)
    params = other_params(made)
    images = torch.randint(0, 256, (140, *made.input.shape), dtype=torch.uint8)  # more than one chunk
    maps = made.maps(params, images, blocks)
    network, prepared = made.model(params).network, made.input.prepare(to_float(images))
    with torch.no_grad():
        wanted, all_features = network.encoder[:blocks](prepared), network.features(prepared)
        features = network.features(maps.float(), start=blocks)
    assert maps.shape == wanted.shape
    assert maps.is_contiguous(memory_format=torch.channels_last)
    for found, exact in ((maps.float(), wanted), (features, all_features)):  # but for half precision
        assert (found - exact).norm() < 0.02 * exact.norm()
        assert (found.flip(0) - exact).norm() > 0.1 * exact.norm()
