"""Identity 10: k steps, a reload and k more are 2k steps, bit for bit; and the checkpoint differs from the end."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.functional import Params, call, params_of
from metapool.base.networks import build
from metapool.base.store import Store, generator_for
from metapool.gradients import Batch, implicit_step
from metapool.training import Training

SHAPE = (1, 16, 16)
NETWORK = build(cases.network_spec("conv4", SHAPE, 3, width=3), torch.Generator().manual_seed(0))
STEPS, EVERY = 8, 2


class Stop(Exception):
    """The power goes off."""


def draw(step: int) -> Batch:
    """Three tasks of one step, by the step's number alone."""
    generator = generator_for(0, "step", str(step))
    images = torch.rand(3, 6, *SHAPE, generator=generator)
    return images, torch.randint(3, (3, 6), generator=generator)


def loss(params: Params, batch: Batch) -> Tensor:
    return F.cross_entropy(call(NETWORK, params, batch[0]), batch[1])


def train(store: Store, stop: int | None = None, decay: float = 0.9, die: bool = False) -> Training:
    """The loop of a method: implicit steps, the best candidate, a record of every step."""
    state = Training(params_of(NETWORK), STEPS, 0.01, decay)
    for step in store.steps("train", {"decay": decay}, state, STEPS, EVERY):
        if step == stop and die:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop:
            raise Stop
        direction, stats = implicit_step(loss, state.params, draw(step), 0.01)
        state.descend(direction)
        state.keep_if_better(-float(abs(step - 2)))  # the third step is the best: in the first half
        state.records.append({"step": step, **vars(stats)})
    return state


def everything(state: Training) -> dict[str, Any]:
    found = state.state_dict()
    return {**found, "schedule": found["schedule"] | {"_last_lr": list(map(float, found["schedule"]["_last_lr"]))}}


def assert_same_bits(first: Training, second: Training) -> None:
    torch.testing.assert_close(everything(first), everything(second), rtol=0, atol=0)


def checkpoint(store: Store) -> dict[str, Any]:
    (file,) = (store.root / "checkpoints").glob("train-*.pt")
    return torch.load(file, weights_only=True)


@pytest.fixture
def unbroken(tmp_path: Path) -> Training:
    return train(Store(tmp_path / "unbroken", threads=1))


@pytest.mark.parametrize("stop", [0, 1, 2, 4, 5, 7])
def test_a_broken_run_ends_like_an_unbroken_one(stop: int, store: Store, unbroken: Training) -> None:
    with pytest.raises(Stop):
        train(store, stop)
    assert_same_bits(train(store), unbroken)


def test_broken_again_and_again(store: Store, unbroken: Training) -> None:
    for stop in (1, 3, 3, 5, 6):
        with pytest.raises(Stop):
            train(store, stop)
    assert_same_bits(train(store), unbroken)


def test_killed_in_the_middle_of_a_step(store: Store, unbroken: Training) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=train, args=(store,), kwargs={"stop": 5, "die": True}, daemon=True
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert checkpoint(store)["step"] == 4
    assert_same_bits(train(store), unbroken)


def test_the_checkpoint_differs_from_the_end_in_every_part(store: Store, unbroken: Training) -> None:
    """Companion: were the two the same, resuming would prove nothing."""
    with pytest.raises(Stop):
        train(store, 4)
    saved = checkpoint(store)
    assert saved["step"] == 4
    half = saved["state"]
    for name, value in unbroken.params.items():
        if not name.endswith("0.bias"):  # of a convolution before batch norm: its gradient is rounding noise
            assert not torch.equal(half["params"][name], value), name
            assert not torch.equal(half["average"][name], unbroken.average[name]), name
    assert len(half["records"]) == half["steps_done"] == 4
    assert half["records"] == unbroken.records[:4]
    assert half["schedule"]["_last_lr"] != unbroken.schedule.get_last_lr()
    end = unbroken.optimizer.state_dict()["state"]
    assert all(not torch.equal(half["optimizer"]["state"][i]["exp_avg"], end[i]["exp_avg"]) for i in end)


@pytest.mark.parametrize("part", ["optimizer", "schedule", "average", "steps_done", "best", "records"])
def test_every_part_of_the_state_is_needed(
    part: str, store: Store, unbroken: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Companion: with one part forgotten at the reload, the end is another."""
    with pytest.raises(Stop):
        train(store, 4)
    complete = Training.load_state_dict

    def forgetful(self: Training, state: dict[str, Any]) -> None:
        complete(self, {**state, part: Training(params_of(NETWORK), STEPS, 0.01, 0.9).state_dict()[part]})

    monkeypatch.setattr(Training, "load_state_dict", forgetful)
    resumed = train(store)
    with pytest.raises(AssertionError):
        assert_same_bits(resumed, unbroken)


def test_a_finished_run_is_only_read(store: Store, unbroken: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    train(store)

    def refuse(self: Training, direction: Params) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(Training, "descend", refuse)
    assert_same_bits(train(store), unbroken)


def test_another_setting_does_not_go_on_from_this_checkpoint(store: Store, unbroken: Training) -> None:
    train(store, decay=0.2)
    resumed = train(store)
    assert_same_bits(resumed, unbroken)
    other = train(store, decay=0.2)
    assert not torch.equal(other.average["head.weight"], resumed.average["head.weight"])
