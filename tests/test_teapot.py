"""TEAPOT: the policy's formulas by enumeration, the memory's draws, and a pool with models that lie."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import pydantic
import pytest
import torch
import toys
from scipy import stats
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import build
from metapool.base.store import Store
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.learners import MAML
from metapool.meta_model import MetaModel
from metapool.methods import load_model
from metapool.methods.teapot import TaskMemory, Teapot, arcsine, as_episode
from metapool.methods.teapot.reliability import (
    Reliability,
    above_chance,
    advantages,
    agreement,
    draw_order,
    log_probability,
    policy_loss,
    reward_of,
)
from metapool.pool import ModelPool, PretrainedModel
from metapool.realdata.pretrain import build_pool
from metapool.recover import GeneratorRecovery, recover_pool
from metapool.training import Training

WEIGHTS = torch.tensor([0.3, -1.2, 0.9, 0.0], dtype=torch.float64)
ORDERS = [torch.tensor(order) for order in itertools.permutations(range(4), 2)]
SMALL: dict[str, Any] = {
    "recovery": toys.HASTY,
    "width": 8,
    "way": 3,
    "query": 2,
    "steps": 4,
    "check_every": 2,
    "teachers": 2,
    "memory_updates": 2,
    "memory_tasks": 2,
    "policy_every": 3,
    "shift": 1,
}


def different(first: object, second: object) -> None:
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first, second)


# The policy -----------------------------------------------------------------------------------------------------------


def slow_probability(weights: Tensor, order: Sequence[int]) -> float:
    """One draw after the other, from what is left."""
    share = [math.exp(weight) for weight in weights.tolist()]
    found = 1.0
    for place, index in enumerate(order):
        found *= share[index] / sum(s for i, s in enumerate(share) if i not in order[:place])
    return found


def independent(weights: Tensor, order: Tensor) -> Tensor:
    """The published code's: each model of a draw as if it were drawn alone."""
    return weights.log_softmax(0)[order].sum()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_probability_of_an_ordered_draw(count: int) -> None:
    orders = list(itertools.permutations(range(4), count))
    found = torch.stack([log_probability(WEIGHTS, torch.tensor(order)).exp() for order in orders])
    slow = torch.tensor([slow_probability(WEIGHTS, order) for order in orders], dtype=torch.float64)
    torch.testing.assert_close(found, slow)
    torch.testing.assert_close(found.sum().item(), 1.0)
    if count > 1:
        different(found, torch.stack([independent(WEIGHTS, torch.tensor(order)).exp() for order in orders]))
        different(torch.stack([independent(WEIGHTS, torch.tensor(order)).exp() for order in orders]).sum().item(), 1.0)
        different(log_probability(WEIGHTS, ORDERS[0]), log_probability(WEIGHTS, ORDERS[0].flip(0)))


def test_draws_come_as_often_as_their_probability_says() -> None:
    generator, draws = torch.Generator().manual_seed(0), 4000
    counts = dict.fromkeys((tuple(order.tolist()) for order in ORDERS), 0)
    for _ in range(draws):
        counts[tuple(draw_order(WEIGHTS, 2, generator).tolist())] += 1
    seen = list(counts.values())
    expected = [draws * slow_probability(WEIGHTS, order) for order in counts]
    assert stats.chisquare(seen, expected).pvalue > 0.01
    assert stats.chisquare(seen).pvalue < 1e-6, "not all orders alike"


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_expected_estimate_is_the_gradient_of_the_expected_reward(baseline: float) -> None:
    rewards = torch.rand(len(ORDERS), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = WEIGHTS.clone().requires_grad_()
    probabilities = torch.stack([log_probability(weights, order).exp() for order in ORDERS])
    (truth,) = torch.autograd.grad((probabilities * rewards).sum(), [weights])

    def expected(loss_of: Any) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)
        for order, reward in zip(ORDERS, rewards):
            (gradient,) = torch.autograd.grad(loss_of(order, (reward - baseline).view(1)), [weights])
            total -= slow_probability(WEIGHTS, order.tolist()) * gradient
        return total

    torch.testing.assert_close(expected(lambda order, above: policy_loss(weights, [order], above)), truth)
    different(expected(lambda order, above: -above.squeeze() * independent(weights, order)), truth)


def test_advantages_have_unit_size_whatever_the_unit_of_the_reward() -> None:
    rewards = torch.tensor([0.1, 0.5, 0.3, 0.9], dtype=torch.float64)
    found = advantages(rewards, 0.3)
    torch.testing.assert_close(found.square().mean().item(), 1.0)
    torch.testing.assert_close(advantages(100 * rewards, 30.0), found)
    torch.testing.assert_close(found.sign(), torch.tensor([-1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    different(advantages(rewards, 0.4), found)
    torch.testing.assert_close(advantages(rewards[:1], 0.1), torch.zeros(1, dtype=torch.float64))


def test_the_baseline_starts_at_the_first_reward() -> None:
    """So equal rewards teach nothing, however small they are; a policy step is taken after every three draws."""
    alike, unlike = Reliability(4, 0.1, 3), Reliability(4, 0.1, 3)
    for step, order in enumerate(ORDERS[:3]):
        assert unlike.weights.eq(0).all(), step
        alike.learn(order, 0.2)
        unlike.learn(order, 0.2 + 0.1 * step)
    assert alike.weights.eq(0).all()
    assert alike.baseline == pytest.approx(0.2)
    assert not unlike.weights.eq(0).all()
    assert unlike.baseline == pytest.approx(0.2 + 0.1 * (0.1 * 0.9 + 0.2))


def test_a_model_that_spoils_every_draw_is_distrusted() -> None:
    reliability, generator = Reliability(4, 0.1, 2), torch.Generator().manual_seed(0)
    for _ in range(60):
        order = draw_order(reliability.weights.detach(), 2, generator)
        reliability.learn(order, 0.0 if 1 in order.tolist() else 1.0)
    assert reliability.probabilities[1] < 0.05 < reliability.probabilities[[0, 2, 3]].min()


def test_above_chance() -> None:
    found = above_chance(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64), 4)
    torch.testing.assert_close(found, torch.tensor([-1 / 3, 0.0, 1.0], dtype=torch.float64))
    different(above_chance(torch.tensor([0.25]), 5), torch.zeros(1))


def test_the_reward_is_what_trusted_models_say() -> None:
    nan = math.nan
    opinions = torch.tensor([[nan, 0.8, 0.2, nan], [0.8, nan, nan, nan], [0.2, nan, nan, nan], [nan] * 4]).double()
    trust = torch.tensor([0.1, 0.6, 0.2, 0.1], dtype=torch.float64)

    def slow(order: list[int], weights: Sequence[float]) -> float:
        means = []
        for i in order:
            known = [j for j in range(4) if not math.isnan(opinions[i, j])]
            if known:
                total = sum(weights[j] for j in known)
                means.append(sum(weights[j] * float(opinions[i, j]) for j in known) / total)
        return sum(means) / len(means)

    for order in ([0], [2, 0], [1, 3, 0]):
        found = reward_of(torch.tensor(order), trust, opinions)
        assert found == pytest.approx(slow(order, trust.tolist()))
        if 0 in order:
            assert found != pytest.approx(slow(order, [0.25] * 4))
    assert reward_of(torch.tensor([3]), trust, opinions) is None


# Losses ---------------------------------------------------------------------------------------------------------------


def test_shares_are_of_the_arcsine_distribution() -> None:
    uniform = torch.linspace(0, 1, 41, dtype=torch.float64)
    truth = torch.from_numpy(stats.beta(0.5, 0.5).ppf(uniform.numpy()))
    torch.testing.assert_close(arcsine(uniform), truth)
    different(uniform, truth)


def test_an_episode_is_cut_class_by_class() -> None:
    support, labels, query, rows = as_episode(torch.arange(8).view(8, 1), 4, 1)
    assert (support.flatten().tolist(), labels.tolist()) == ([0, 4], [0, 1])
    assert query.flatten().tolist() == rows.tolist() == [1, 2, 3, 5, 6, 7]


# The memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(tiny_pool: ModelPool, tiny_bank: TaskBank) -> TaskMemory:
    return TaskMemory(tiny_bank, tiny_pool.input, Teapot(**SMALL))


def test_a_teacher_stays_with_its_task(memory: TaskMemory, tiny_bank: TaskBank) -> None:
    for model, task in enumerate(tiny_bank.values()):
        rows, logits = memory.of_model(model, 3, 2, torch.Generator().manual_seed(model))
        start = sum(len(other.labels) for other in list(tiny_bank.values())[:model])
        labels = task.labels[rows - start]
        chosen = labels[::2]
        assert len(chosen.unique()) == len(chosen) == min(3, len(task.classes))
        torch.testing.assert_close(logits, task.logits[rows - start][:, chosen], rtol=0, atol=0)
        different(logits, task.logits[rows - start][:, chosen.flip(0)])


@pytest.mark.parametrize("way", [1, 2, 3, 4, 9])
def test_no_class_is_mixed_with_itself(memory: TaskMemory, way: int) -> None:
    generator, trust = torch.Generator().manual_seed(0), torch.full((4,), 0.25)
    for _ in range(10):
        first, second = memory.names[memory.of_all(trust, way, 3, generator)].view(2, -1, 3)
        assert first.shape == second.shape == (min(way, 4), 3)
        for names in (first, second):
            assert names.eq(names[:, :1]).all(), "class by class"
            assert len(names[:, 0].unique()) == len(names)
        assert first.ne(second).all()


def test_the_memory_gives_from_each_model_as_far_as_it_is_trusted(memory: TaskMemory) -> None:
    generator, trust = torch.Generator().manual_seed(0), torch.tensor([0.6, 0.0, 0.1, 0.3])
    rows = torch.cat([memory.of_all(trust, 1, 1, generator)[0] for _ in range(1000)])
    counts = torch.bincount(memory.owner[rows], minlength=4).tolist()
    assert counts.pop(1) == 0
    assert stats.chisquare(counts, [600, 100, 300]).pvalue > 0.01
    assert stats.chisquare(counts).pvalue < 1e-6
    assert len(memory.of_all(trust, 2, 3, generator).unique()) == 12, "no image twice while they last"


def test_images_are_shown_at_random_sizes_or_as_they_are(memory: TaskMemory) -> None:
    rows = torch.arange(5)
    plain = to_float(memory.images[rows])
    different(memory.shown(rows, torch.Generator().manual_seed(0)), plain)
    memory.method = Teapot(**{**SMALL, "scales": (1.0, 1.0), "shift": 0})
    torch.testing.assert_close(memory.shown(rows, torch.Generator().manual_seed(0)), plain)


def test_models_judge_each_other_s_images(tiny_pool: ModelPool, tiny_bank: TaskBank) -> None:
    found = agreement(tiny_pool, tiny_bank)
    assert found.diagonal().isnan().all()
    torch.testing.assert_close(found, found.T, equal_nan=True)
    models, both = [tiny_pool.get("a-conv4"), tiny_pool.get("d-conv4")], []
    for judge, other in (models, models[::-1]):
        task, correct = tiny_bank[other.id], []
        for image, label in zip(task.images, task.labels):
            name = task.classes[label]
            if name in judge.classes:
                correct.append(judge.classes[judge(to_float(image[None])).argmax()] == name)
        accuracy, chance = sum(correct) / len(correct), 1 / len(judge.classes)
        both.append((accuracy - chance) / (1 - chance))
    assert found[0, 3].item() == pytest.approx(sum(both) / 2)
    assert both[0] != pytest.approx(both[1])


# The method -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("teapot"), threads=1)


def bits(model: MetaModel) -> list[bytes]:
    return [value.numpy().tobytes() for value in model.network.state_dict().values()]


def other_store(kept: Store, path: Path) -> Store:
    """Has the bank and nothing else."""
    store = Store(path / "other", threads=1)
    store.root.mkdir()
    (store.root / "recover").symlink_to(kept.root / "recover")
    return store


def test_it_cites_its_paper_and_says_what_each_setting_is() -> None:
    assert "arXiv 2311.14756" in Teapot.paper
    assert all(field.description for field in Teapot.model_fields.values())
    with pytest.raises(pydantic.ValidationError):
        Teapot.model_validate({"learner": MAML()})
    with pytest.raises(pydantic.ValidationError, match="least size"):
        Teapot(scales=(1.0, 0.4))


def test_same_seed_same_bits_other_seed_other_bits(tiny_pool: ModelPool, kept: Store, tmp_path: Path) -> None:
    first = Teapot(**SMALL).fit(tiny_pool, kept, 0)
    torch.manual_seed(1234)  # the global seed decides nothing
    store = other_store(kept, tmp_path)
    again = Teapot(**SMALL).fit(tiny_pool, store, 0)
    assert (bits(again), again.history) == (bits(first), first.history)
    assert bits(Teapot(**SMALL).fit(tiny_pool, store, 1)) != bits(first)
    for setting in ({"interpolate": 0.0}, {"interpolate": 1.0}, {"memory_updates": 1}, {"scales": (1.0, 1.0)}):
        assert bits(Teapot(**{**SMALL, **setting}).fit(tiny_pool, store, 0)) != bits(first), setting


@pytest.mark.parametrize("stop", [5, 11])
def test_a_broken_fit_ends_like_an_unbroken_one(
    stop: int, tiny_pool: ModelPool, kept: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy step, after three draws, falls between two checkpoints: its draws are part of the state."""
    method = Teapot(**{**SMALL, "policy_rate": 0.5})
    unbroken = method.fit(tiny_pool, kept, 0)
    store, whole, taken = other_store(kept, tmp_path), Training.descend, []

    def dying(self: Training, direction: dict[str, Tensor]) -> None:
        taken.append(1)
        if len(taken) > stop:
            raise KeyboardInterrupt
        whole(self, direction)

    monkeypatch.setattr(Training, "descend", dying)
    with pytest.raises(KeyboardInterrupt):
        method.fit(tiny_pool, store, 0)
    monkeypatch.setattr(Training, "descend", whole)
    resumed = method.fit(tiny_pool, store, 0)
    assert (bits(resumed), resumed.history) == (bits(unbroken), unbroken.history)
    assert unbroken.history[1]["reliability"] != unbroken.history[3]["reliability"]


def test_every_part_of_the_policy_s_state_is_needed() -> None:
    def run(learner: Reliability, orders: list[Tensor]) -> Reliability:
        for order in orders:
            learner.learn(order, float(order[0]) / 3 + float(order[1]) / 5)
        return learner

    unbroken = run(Reliability(4, 0.1, 3), ORDERS[:10]).weights
    half = run(Reliability(4, 0.1, 3), ORDERS[:5]).state_dict()
    for forgotten in (None, *half):
        resumed = Reliability(4, 0.1, 3)
        resumed.load_state_dict({**half, **({forgotten: resumed.state_dict()[forgotten]} if forgotten else {})})
        assert torch.equal(run(resumed, ORDERS[5:10]).weights, unbroken) == (forgotten is None), forgotten


def test_a_saved_model_answers_alike(tiny_pool: ModelPool, kept: Store, tmp_path: Path) -> None:
    model = Teapot(**SMALL).fit(tiny_pool, kept, 0)
    model.save(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, MetaModel)
    images = to_float(toys.stripes((0, 3), 4).images)
    labels = torch.tensor([0, 0, 1, 1])
    support, query = images[[0, 1, 4, 5]], images[[2, 6]]
    torch.testing.assert_close(
        loaded.logits(support, labels, query), model.logits(support, labels, query), rtol=0, atol=0
    )
    different(model.logits(support, labels, query), model.logits(support, labels.flip(0), query))
    for step, record in enumerate(loaded.history):
        assert record["step"] == step
        assert set(record["reliability"]) == set(tiny_pool.ids)
        assert sum(record["reliability"].values()) == pytest.approx(1, abs=1e-3)
        assert len(set(record["models"])) == 2
        assert torch.tensor([record["loss"], record["memory"], record["reward"]]).isfinite().all()


def test_a_model_alone_is_not_judged(tiny_pool: ModelPool, kept: Store) -> None:
    history = Teapot(**SMALL).fit(tiny_pool[:1], kept, 0).history
    assert {record["reward"] for record in history} == {None}
    assert {record["reliability"]["a-conv4"] for record in history} == {1.0}


def test_one_class_name_is_too_few(tmp_path: Path) -> None:
    pool = ModelPool.create(tmp_path / "pool", "one")
    pool.add(cases.fitted("only", "conv4", classes=1, shape=(1, 16, 16), width=4))
    with pytest.raises(MetapoolError, match="two class names in the pool to tell apart; found 1"):
        Teapot(**SMALL).fit(pool, Store(tmp_path / "store", threads=1), 0)


def test_beats_chance_on_new_classes(tmp_path: Path) -> None:
    pool = toys.striped_pool(tmp_path / "pool", toys.TRAINING.model_copy(update={"epochs": 6}))
    images = toys.stripes(toys.NEW_KINDS, 20, seed=5)
    method = Teapot(**{**SMALL, "recovery": toys.RECOVERY, "steps": 20, "check_every": 20, "learning_rate": 0.01})
    model = method.fit(pool, Store(tmp_path / "store", threads=1), 0)
    episodes = sample_episodes(images, 4, 5, 5, 60, seed=0)
    assert evaluate(model, images, episodes).interval.low > 25 + 10
    wrong = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = LabelledImages(images.images[wrong], images.labels, images.classes)
    assert 15 < evaluate(model, shuffled, episodes).interval.mean < 35


# Models that lie ------------------------------------------------------------------------------------------------------


def test_models_that_lie_are_distrusted(tmp_path: Path) -> None:
    """A model that shuffles its names, and one that never learned, among three clean ones; then the first is honest."""
    store = Store(tmp_path / "store", threads=1)
    training = toys.TRAINING.model_copy(update={"models": 4, "way": 4})
    images = toys.stripes((0, 3, 7, 10), 60)
    *clean, honest = build_pool(images, training, store, tmp_path / "clean", name="clean", seed=0)
    names = honest.classes[1:] + honest.classes[:1]
    liar = PretrainedModel(honest.id, honest.network, honest.input, names, spec=honest.spec)
    assert honest.spec is not None
    network = build(honest.spec, torch.Generator().manual_seed(5))
    untrained = PretrainedModel("untrained", network, honest.input, honest.classes, spec=honest.spec)
    recovery = GeneratorRecovery(per_class=6, steps=60, code=16, width=8, shift=1, learning_rate=0.02)
    small = {**SMALL, "recovery": recovery, "memory_updates": 0, "policy_every": 2, "policy_rate": 0.1}
    method = Teapot(**{**small, "steps": 100, "check_every": 100, "width": 4, "query": 1})
    trust: list[float] = []
    for fourth in (liar, honest):
        pool = ModelPool.create(tmp_path / f"pool-{len(trust)}", "claims")
        for model in (*clean, fourth, untrained):
            pool.add(model, torch.float32)
        opinions = agreement(pool, recover_pool(pool, recovery, store)).nanmean(1)
        found = list(method.fit(pool, store, 0).history[-1]["reliability"].values())
        bad = [3, 4] if fourth is liar else [4]
        good = [index for index in range(5) if index not in bad]
        assert opinions[bad].max() < opinions[good].min()
        assert max(found[index] for index in bad) < sum(found[index] for index in good) / len(good) / 2
        trust.append(found[3])
    assert trust[1] > 2 * trust[0], "the same model, when it does not lie"
