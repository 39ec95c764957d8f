"""Identity 6: gradients through the inner loop equal finite differences; first-order ones their own formula."""

import copy

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.functional import Params, params_of, statistics_of_first
from metapool.base.networks import Network, build
from metapool.learners import ANIL, MAML, ProtoNet

SHAPE = (1, 16, 16)
SECOND = {
    "maml": MAML(inner_steps=3, inner_rate=0.05),
    "anil": ANIL(inner_steps=3, inner_rate=0.5),
}
LEARNERS = pytest.mark.parametrize("learner", SECOND.values(), ids=SECOND.keys())
ARCHITECTURES = pytest.mark.parametrize("architecture", ["conv4", "resnet10"])


class Episode:
    """A network of width 2 in float64, its parameters, and one 3-way episode with uneven shots."""

    def __init__(self, architecture: str = "conv4") -> None:
        spec = cases.network_spec(architecture, SHAPE, 3, width=2)  # type: ignore[arg-type]
        self.network: Network = build(spec, torch.Generator().manual_seed(1)).double()
        self.params = params_of(self.network)
        self.support = cases.smooth_images(4, SHAPE, 1).double()
        self.labels = torch.tensor([2, 0, 1, 0])
        self.query = cases.smooth_images(6, SHAPE, 2).double()
        self.answers = torch.tensor([0, 1, 2, 2, 1, 0])

    def loss(self, learner: MAML | ANIL | ProtoNet, params: Params) -> Tensor:
        logits = learner.query_logits(self.network, params, self.support, self.labels, self.query)
        assert logits.dtype == torch.float64
        return F.cross_entropy(logits, self.answers)

    def gradient(self, learner: MAML | ANIL | ProtoNet) -> Params:
        leaves = list(self.params.values())
        found = torch.autograd.grad(self.loss(learner, self.params), leaves, materialize_grads=True)
        return dict(zip(self.params, found))

    def slope(self, learner: MAML | ANIL | ProtoNet, direction: Params, step: float = 1e-7) -> float:
        """Central difference of the whole loss, inner loop included, along one direction."""
        ends = [
            self.loss(learner, {n: (v.detach() + s * direction[n]).requires_grad_() for n, v in self.params.items()})
            for s in (step, -step)
        ]
        return (ends[0] - ends[1]).item() / (2 * step)


def directions(params: Params) -> list[Params]:
    """Random ones, and one for every tensor alone, so that no part can hide behind another."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda value: torch.randn(value.shape, generator=generator, dtype=value.dtype)
    everywhere = [{name: draw(value) for name, value in params.items()} for _ in range(2)]
    alone = [{n: draw(v) if n == name else torch.zeros_like(v) for n, v in params.items()} for name in params]
    return everywhere + alone


def inner(first: Params, second: Params) -> float:
    return sum((first[name] * second[name]).sum().item() for name in first)


@LEARNERS
def test_gradient_through_the_inner_loop_is_the_finite_difference(learner: MAML | ANIL) -> None:
    """Including the queries' batch norm, whose statistics are the support's and change with every inner step."""
    episode = Episode()
    gradient = episode.gradient(learner)
    for direction in directions(episode.params):
        assert inner(gradient, direction) == pytest.approx(episode.slope(learner, direction), rel=1e-5, abs=1e-7)


@LEARNERS
def test_gradient_of_a_resnet_too(learner: MAML | ANIL) -> None:
    episode = Episode("resnet10")
    gradient = episode.gradient(learner)
    for direction in directions(episode.params)[:2]:
        assert inner(gradient, direction) == pytest.approx(episode.slope(learner, direction), rel=1e-5, abs=1e-7)


@LEARNERS
def test_first_order_is_not_the_finite_difference(learner: MAML | ANIL) -> None:
    episode = Episode()
    first = learner.model_copy(update={"first_order": True})
    gradient = episode.gradient(first)
    direction = directions(episode.params)[0]
    assert inner(gradient, direction) != pytest.approx(episode.slope(learner, direction), rel=1e-2)


@ARCHITECTURES
@LEARNERS
def test_first_order_is_the_gradient_at_the_adapted_weights(learner: MAML | ANIL, architecture: str) -> None:
    """Slow reference: descend a copy of the network, then differentiate the query loss there, as at a start."""
    episode = Episode(architecture)
    twin = copy.deepcopy(episode.network).train()
    moving = list(twin.parameters() if isinstance(learner, MAML) else twin.head.parameters())
    for _ in range(learner.inner_steps):
        twin.zero_grad()
        F.cross_entropy(twin(episode.support), episode.labels).backward()
        with torch.no_grad():
            for parameter in moving:
                assert parameter.grad is not None
                parameter -= learner.inner_rate * parameter.grad
    twin.zero_grad()
    with statistics_of_first(len(episode.support)):
        logits = twin(torch.cat([episode.support, episode.query]))[len(episode.support) :]
    F.cross_entropy(logits, episode.answers).backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    found = episode.gradient(learner.model_copy(update={"first_order": True}))
    torch.testing.assert_close(found, expected)
    start = torch.autograd.grad(
        episode.loss(learner.model_copy(update={"inner_steps": 0}), episode.params), list(episode.params.values())
    )
    assert any(not torch.allclose(found[name], part) for name, part in zip(episode.params, start))


@ARCHITECTURES
@LEARNERS
def test_orders_give_the_same_loss_and_other_gradients(learner: MAML | ANIL, architecture: str) -> None:
    episode = Episode(architecture)
    first = learner.model_copy(update={"first_order": True})
    torch.testing.assert_close(episode.loss(first, episode.params), episode.loss(learner, episode.params))
    one, two = episode.gradient(first), episode.gradient(learner)
    difference = sum((one[name] - two[name]).square().sum() for name in one) ** 0.5
    size = sum(part.square().sum() for part in two.values()) ** 0.5
    assert difference > 0.05 * size


@LEARNERS
def test_without_steps_both_orders_agree(learner: MAML | ANIL) -> None:
    episode = Episode()
    none = learner.model_copy(update={"inner_steps": 0})
    torch.testing.assert_close(episode.gradient(none.model_copy(update={"first_order": True})), episode.gradient(none))
    assert episode.loss(none, episode.params) != episode.loss(learner, episode.params)


def test_the_difference_of_the_orders_vanishes_with_the_inner_rate() -> None:
    """Second order adds a Hessian-vector product per step: the gap is of first order in the inner rate."""
    episode = Episode()
    gaps = []
    for rate in (1e-5, 5e-6):
        orders = [episode.gradient(MAML(inner_steps=2, inner_rate=rate, first_order=order)) for order in (True, False)]
        gaps.append(sum((orders[0][name] - orders[1][name]).square().sum().item() for name in orders[0]) ** 0.5)
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)
    assert gaps[1] > 0


@pytest.mark.parametrize("normalise", [False, True])
def test_protonet_s_gradient_is_the_finite_difference(normalise: bool) -> None:
    episode = Episode()
    learner = ProtoNet(normalise=normalise, temperature=0.5)
    gradient = episode.gradient(learner)
    for direction in directions(episode.params):
        assert inner(gradient, direction) == pytest.approx(episode.slope(learner, direction), rel=1e-5, abs=1e-7)
    assert all(gradient[name].abs().max() == 0 for name in gradient if name.startswith("head."))
    assert any(part.abs().max() > 1e-3 for part in gradient.values())


@LEARNERS
def test_training_moves_no_parameter(learner: MAML | ANIL) -> None:
    episode = Episode()
    before = {name: value.detach().clone() for name, value in episode.params.items()}
    stored = {name: value.clone() for name, value in episode.network.state_dict().items()}
    episode.gradient(learner)
    torch.testing.assert_close({n: v.detach() for n, v in episode.params.items()}, before, rtol=0, atol=0)
    torch.testing.assert_close(dict(episode.network.state_dict()), stored, rtol=0, atol=0)
