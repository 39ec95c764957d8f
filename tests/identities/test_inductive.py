"""Identity 8: adding, removing or permuting queries never changes another query's logits."""

from typing import cast

import cases
import pytest
import torch
from torch import Tensor, nn

from metapool.base.functional import BatchNorm, call, params_of
from metapool.base.networks import Architecture, build
from metapool.learners import ANIL, MAML, ProtoNet
from metapool.meta_model import MetaModel

SHAPE = (1, 16, 16)
LEARNERS = {
    "maml": MAML(test_steps=3, inner_rate=0.1),
    "anil": ANIL(test_steps=3, inner_rate=0.1),
    "protonet": ProtoNet(),
    "protonet-cosine": ProtoNet(normalise=True, temperature=0.1),
}
EACH = pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())


def meta_model(learner: MAML | ANIL | ProtoNet, architecture: Architecture = "conv4") -> MetaModel:
    """In float64, so that the number of images in a convolution shows in no digit that is compared."""
    spec, input = cases.network_spec(architecture, SHAPE, 3), cases.input_spec(SHAPE)
    network = build(spec, torch.Generator().manual_seed(0)).double()
    cases.fit_statistics(network, input.prepare(cases.smooth_images(32, SHAPE).double()))
    return MetaModel(network, spec, learner, input)


def episode() -> tuple[Tensor, Tensor, Tensor]:
    support = cases.smooth_images(5, SHAPE, 1).double()
    return support, torch.tensor([0, 1, 2, 0, 1]), cases.smooth_images(6, SHAPE, 2).double()


@EACH
@pytest.mark.parametrize("architecture", ["conv4", "resnet10"])
def test_a_query_s_logits_do_not_depend_on_the_other_queries(
    learner: MAML | ANIL | ProtoNet, architecture: Architecture
) -> None:
    model = meta_model(learner, architecture)
    support, labels, query = episode()
    logits = model.logits(support, labels, query)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(model.logits(support, labels, query[order]), logits[order])
    torch.testing.assert_close(model.logits(support, labels, query[:2]), logits[:2])
    for index in range(6):
        alone = model.logits(support, labels, query[index : index + 1])
        torch.testing.assert_close(alone, logits[index : index + 1])
    strange = torch.cat([query, torch.zeros(3, *SHAPE), torch.ones(3, *SHAPE), query[:1]]).double()
    torch.testing.assert_close(model.logits(support, labels, strange)[:6], logits)
    torch.testing.assert_close(model.logits(support, labels, strange)[-1:], logits[:1])
    assert not torch.allclose(logits[0], logits[1]), "the queries do differ"


@EACH
def test_a_query_s_logits_do_depend_on_the_support(learner: MAML | ANIL | ProtoNet) -> None:
    model = meta_model(learner)
    support, labels, query = episode()
    changed = support.clone()
    changed[0] = 1 - changed[0]
    assert not torch.allclose(model.logits(changed, labels, query), model.logits(support, labels, query))


@EACH
def test_a_query_that_is_in_the_support_is_answered_like_it(learner: MAML | ANIL | ProtoNet) -> None:
    """The same image beside other queries or alone: also when it is known from the support."""
    model = meta_model(learner)
    support, labels, query = episode()
    with_copy = model.logits(support, labels, torch.cat([query, support[:1]]))[-1:]
    torch.testing.assert_close(with_copy, model.logits(support, labels, support[:1]))


def transductive(model: MetaModel, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """What published MAML and ProtoNet code does: batch norm over support and queries together."""
    params = params_of(model.network)
    support, query = model.input.prepare(support), model.input.prepare(query)
    if isinstance(model.learner, ProtoNet):
        return model.learner.query_logits(model.network, params, support, labels, query)
    for _ in range(model.learner.test_steps):
        loss = nn.functional.cross_entropy(call(model.network, params, support), labels)
        gradients = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: (value - model.learner.inner_rate * part).detach().requires_grad_()
            for (name, value), part in zip(params.items(), gradients)
        }
    return call(model.network, params, query)


@pytest.mark.parametrize("name", ["maml", "protonet", "protonet-cosine"])
def test_a_transductive_batch_norm_does_change_them(name: str) -> None:
    model = meta_model(LEARNERS[name])
    support, labels, query = episode()
    logits = transductive(model, support, labels, query)
    fewer = transductive(model, support, labels, query[:2])
    assert (fewer - logits[:2]).abs().max() > 1e-2
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(transductive(model, support, labels, query[order]), logits[order])
    assert (logits - model.logits(support, labels, query)).abs().max() > 1e-2


@EACH
def test_the_same_holds_for_encoded_queries(learner: MAML | ANIL | ProtoNet) -> None:
    """Evaluation encodes once and classifies slices: a slice is answered like the whole."""
    model = meta_model(learner)
    support, labels, query = episode()
    known, asked = model.encode(support), model.encode(query)
    whole = model.classify(known, labels, asked)
    torch.testing.assert_close(torch.cat([model.classify(known, labels, part) for part in asked.split(4)]), whole)
    torch.testing.assert_close(whole, model.logits(support, labels, query))


def test_batch_norm_layers_of_every_architecture_can_be_steered() -> None:
    for architecture in ("conv4", "resnet10", "resnet18"):
        network = build(cases.network_spec(cast(Architecture, architecture), SHAPE, 3), torch.Generator())
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, BatchNorm) for norm in norms)


def test_the_released_mode_looks_at_all_queries_and_says_so() -> None:
    inductive = meta_model(LEARNERS["maml"])
    model = meta_model(LEARNERS["maml"].model_copy(update={"transductive": True}))
    assert (model.transductive, inductive.transductive) == (True, False)
    support, labels, query = episode()
    logits = model.logits(support, labels, query)
    torch.testing.assert_close(logits, transductive(model, support, labels, query))
    assert (model.logits(support, labels, query[:2]) - logits[:2]).abs().max() > 1e-2
