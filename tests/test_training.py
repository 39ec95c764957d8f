"""The state of a meta-training loop: Adam with a schedule, the running mean, the best candidate."""

import copy

import pytest
import torch

from metapool.base.functional import Params
from metapool.training import Training


def start(decay: float = 0.0, steps: int = 10) -> Training:
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(3, 2, generator=generator).requires_grad_() for name in ("a", "b")}
    return Training(params, steps, 0.1, decay)


def direction(step: int) -> Params:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(3, 2, generator=generator) for name in ("a", "b")}


def test_descends_like_adam_under_half_a_cosine() -> None:
    state = start()
    reference = {name: value.detach().clone() for name, value in state.params.items()}
    first = {name: torch.zeros(3, 2) for name in reference}
    second = {name: torch.zeros(3, 2) for name in reference}
    for step in range(10):
        state.descend(direction(step))
        rate = 0.001 + 0.5 * (0.1 - 0.001) * (1 + torch.cos(torch.tensor(torch.pi * step / 10)).item())
        for name, gradient in direction(step).items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            reference[name] -= rate * mean / (square.sqrt() + 1e-8)
    for name, value in reference.items():
        torch.testing.assert_close(state.params[name].detach(), value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(state.params[name], start().params[name])
    assert state.steps_done == 10
    assert state.schedule.get_last_lr()[0] == pytest.approx(0.001)


def test_running_mean_forgets_by_the_decay_and_faster_while_young() -> None:
    state = start(decay=0.5)
    average = {name: value.detach().clone() for name, value in state.params.items()}
    for step in range(20):
        state.descend(direction(step))
        decay = min(0.5, (step + 1) / (step + 11))
        for name, value in state.params.items():
            average[name] = decay * average[name] + (1 - decay) * value.detach()
    torch.testing.assert_close(state.average, average)
    torch.testing.assert_close(state.kept(), average)
    assert not torch.allclose(state.kept()["a"], state.params["a"])


def test_without_decay_the_last_weights_are_kept() -> None:
    state = start(decay=0.0)
    state.descend(direction(0))
    torch.testing.assert_close(state.kept(), {name: value.detach() for name, value in state.params.items()})


def test_the_best_is_a_copy_and_only_a_better_one_replaces_it() -> None:
    state = start()
    state.descend(direction(0))
    state.keep_if_better(50.0)
    best = {name: value.detach().clone() for name, value in state.params.items()}
    for accuracy in (49.0, 50.0):
        state.descend(direction(state.steps_done))
        state.keep_if_better(accuracy)
        torch.testing.assert_close(state.best_params, best, rtol=0, atol=0)
        assert not torch.equal(state.params["a"], best["a"])
    state.keep_if_better(50.1)
    assert state.best == 50.1
    torch.testing.assert_close(state.best_params["a"], state.params["a"].detach(), rtol=0, atol=0)


def test_without_validation_the_latest_is_the_best() -> None:
    state = start()
    for step in range(3):
        state.descend(direction(step))
        state.keep_if_better(None)
    assert state.best is None
    torch.testing.assert_close(state.best_params["a"], state.params["a"].detach(), rtol=0, atol=0)


def test_state_goes_through_a_file_that_holds_no_code(tmp_path) -> None:
    state = start(decay=0.9)
    for step in range(4):
        state.descend(direction(step))
        state.keep_if_better(float(step))
        state.records.append({"step": step, "loss": 0.5, "validation": None})
    torch.save(state.state_dict(), tmp_path / "state.pt")
    other = Training({name: torch.zeros(3, 2).requires_grad_() for name in ("a", "b")}, 10, 0.1, 0.9)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.records == state.records
    assert (other.best, other.steps_done) == (3.0, 4)
    for part in ("params", "average", "best_params"):
        torch.testing.assert_close(getattr(other, part), getattr(state, part), rtol=0, atol=0)
    frozen = copy.deepcopy(other.average)
    for which in (state, other):
        which.descend(direction(4))
    torch.testing.assert_close(other.params, state.params, rtol=0, atol=0)
    torch.testing.assert_close(other.average, state.average, rtol=0, atol=0)
    assert not torch.equal(other.average["a"], frozen["a"])


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_what_is_frozen_stays_at_what_was_kept_and_the_rest_goes_on(decay: float) -> None:
    state, other = start(decay), start(decay)
    for step in range(3):
        state.descend(direction(step))
        other.descend(direction(step))
    kept = state.kept()
    state.freeze("a")
    assert set(state.params) == {"b"}
    for step in range(3, 6):
        state.descend({"b": direction(step)["b"]})
        other.descend(direction(step))
    torch.testing.assert_close(state.kept()["a"], kept["a"], rtol=0, atol=0)
    torch.testing.assert_close(state.kept()["b"], other.kept()["b"], rtol=0, atol=0)
    assert not torch.allclose(other.kept()["a"], kept["a"])
    again = copy.deepcopy(state.kept())
    state.freeze("a")
    torch.testing.assert_close(state.kept(), again, rtol=0, atol=0)


def test_a_state_with_frozen_parameters_goes_on_where_it_was() -> None:
    state = start(decay=0.5)
    state.descend(direction(0))
    state.freeze("a")
    state.descend({"b": direction(1)["b"]})
    resumed = start(decay=0.5)
    resumed.load_state_dict(copy.deepcopy(state.state_dict()))
    resumed.freeze("a")
    for training in (state, resumed):
        training.descend({"b": direction(2)["b"]})
    torch.testing.assert_close(resumed.kept(), state.kept(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.frozen["a"], state.frozen["a"], rtol=0, atol=0)
