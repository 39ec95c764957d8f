"""The product's units against ``benchmarks/reference.py``, in float64; and the benchmark itself, at tiny sizes."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.functional import Params, call, in_chunks, params_of
from metapool.base.images import LabelledImages, shift, to_bytes, to_float
from metapool.base.networks import Network, build
from metapool.embed import fisher_diagonal
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.gradients import Batch, implicit_step
from metapool.learners import MAML, AnyLearner, ProtoNet
from metapool.meta_model import MetaModel
from metapool.pool import PretrainedModel
from metapool.recover import Generator, LossWeights, inversion_loss
from metapool.task_losses import classify_loss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = (3, 32, 32)
WAY = 3
SPEC = cases.network_spec("conv4", SHAPE, WAY, width=4)
INPUT = cases.input_spec(SHAPE)
LABELS = torch.arange(WAY).repeat_interleave(4)
assert_same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def _load() -> ModuleType:
    # By path: tests have a module of the same name.
    found = importlib.util.spec_from_file_location("benchmarks_reference", BENCHMARKS / "reference.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


reference = _load()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0) -> Network:
    made = build(SPEC, seeded(seed)).double()
    cases.fit_statistics(made, normalised(images(32, seed=9)))
    return made.eval()


def plain(made: Network) -> torch.nn.Module:
    twin: torch.nn.Module = reference.Conv4(SHAPE[0], SPEC.width, WAY, SHAPE[1:]).double()
    twin.load_state_dict(made.state_dict())
    return twin.requires_grad_(False)


def images(count: int = len(LABELS), seed: int = 1) -> Tensor:
    return cases.smooth_images(count, SHAPE, seed).double()


def normalised(some: Tensor) -> Tensor:
    out: Tensor = reference.normalise(some, INPUT.mean, INPUT.std)
    return out


def differ(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, rtol=1e-4, atol=1e-8)


def test_networks_agree_in_every_mode() -> None:
    made, some = network(), normalised(images())
    params, twin = params_of(made), plain(made)
    assert_same(made(some), twin(some))
    for first in (5, len(some)):
        assert_same(call(made, params, some, first=first), twin(some, first=first))
    assert differ(twin(some, first=5), twin(some, first=len(some)))
    assert differ(twin(some), twin(some, first=len(some)))


# Recovery.


def test_shift() -> None:
    some = images()
    offsets = torch.randint(0, 5, (2, len(some)), generator=seeded(3))
    torch.testing.assert_close(shift(some, 2, seeded(3)), reference.shifted(some, offsets, 2), rtol=0, atol=0)
    assert differ(shift(some, 2, seeded(4)), reference.shifted(some, offsets, 2))


def test_generator() -> None:
    """In float32: metapool's sigmoid is."""
    painter = Generator(8, 4, INPUT).initialise(seeded())
    twin = reference.Painter(8, 4, SHAPE[0], SHAPE[1:])
    twin.load_state_dict(painter.state_dict())
    codes = torch.randn(6, 8, generator=seeded(1))
    torch.testing.assert_close(painter.train()(codes), twin.train()(codes))
    assert differ(painter(codes), twin.eval()(codes))


def test_inversion_loss_and_its_gradient() -> None:
    made, some = network(), images()
    model = PretrainedModel("model", made, INPUT, [str(k) for k in range(WAY)])

    def of(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = some.clone().requires_grad_()
        value = loss(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    ours = of(lambda leaf: inversion_loss(model, leaf, LABELS, LossWeights()))
    theirs = of(lambda leaf: reference.inversion_loss(plain(made), normalised(leaf), LABELS))
    assert_same(ours, theirs)
    half = of(lambda leaf: reference.inversion_loss(plain(made), normalised(leaf), LABELS, 0.5))
    assert differ(ours[0], half[0])
    assert differ(ours[1], half[1])


def test_a_recovery_keeps_its_best_images_and_finds_better_ones() -> None:
    made, codes = network(), torch.randn(len(LABELS), 8, generator=seeded(1)).double()
    painter = reference.Painter(8, 4, SHAPE[0], SHAPE[1:]).double()
    state = reference.Recovery(plain(made), painter, codes, LABELS, INPUT.mean, INPUT.std, 0, learning_rate=1e-2)
    generator = seeded(2)
    before, first = state.gradient(generator)
    for _ in range(10):
        state.step(generator)
    assert state.lowest < first
    found = reference.inversion_loss(plain(made), normalised(state.best), LABELS)
    assert found.item() == pytest.approx(state.lowest, rel=1e-9)
    assert differ(state.best, before)


# Teachers, embeddings.


def test_teacher_outputs() -> None:
    made, some = network(), images(20)
    model = PretrainedModel("model", made, INPUT, [str(k) for k in range(WAY)])
    ours = model.features_and_logits(some)
    assert_same(ours, reference.teacher_outputs(plain(made), normalised(some), 7))
    assert_same(in_chunks(model, some, 3), ours[1])
    assert differ(ours[1], reference.teacher_outputs(plain(network(1)), normalised(some), 7)[1])


def test_fisher_diagonal() -> None:
    made, some = network(), normalised(images(5))
    params = params_of(made)
    ours = fisher_diagonal(made, params, some, chunk=2)
    assert_same(ours, reference.fisher(plain(made), params, some))
    fewer = reference.fisher(plain(made), params, some[:4])
    assert all(differ(ours[name], fewer[name]) for name in ours)


def test_batch_gradient_is_not_the_fisher_diagonal() -> None:
    made, some = network(), normalised(images())
    params = params_of(made)
    loss = F.cross_entropy(call(made, params, some), LABELS)
    ours = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
    theirs = reference.batch_gradient(plain(made), params, some, LABELS)
    assert_same(ours, theirs)
    fisher = reference.fisher(plain(made), params, some)
    assert differ(fisher["head.weight"], theirs["head.weight"].square())


# Meta-training.


def test_implicit_step() -> None:
    made = network()
    params = params_of(made)
    tasks = [
        (normalised(images(seed=seed)), LABELS, torch.randn(len(LABELS), WAY, generator=seeded(seed)).double())
        for seed in range(3)
    ]
    batches = tuple(torch.stack(parts) for parts in zip(*tasks))

    def task_loss(values: Params, batch: Batch) -> Tensor:
        return classify_loss(call(made, values, batch[0]), batch[1], batch[2])

    ours = implicit_step(task_loss, params, batches, 0.1)[0]
    assert_same(ours, reference.implicit_direction(plain(made), params, tasks, 0.1))
    other = reference.implicit_direction(plain(made), params, tasks, 0.05)
    assert differ(ours["head.weight"], other["head.weight"])


def episode(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    some = normalised(images(len(LABELS), seed))
    in_support = torch.arange(len(LABELS)) % 4 < 1
    return some[in_support], LABELS[in_support], some[~in_support], LABELS[~in_support]


def test_second_order_maml() -> None:
    made, learner = network(), MAML(inner_steps=3, inner_rate=0.05)
    params, episodes = params_of(made), [episode(seed) for seed in range(2)]

    def gradient(learner: MAML) -> Params:
        losses = [F.cross_entropy(learner.query_logits(made, params, s, y, q), a) for s, y, q, a in episodes]
        return dict(zip(params, torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))))

    theirs, _ = reference.maml_gradient(plain(made), params, episodes, 3, 0.05)
    assert_same(gradient(learner), theirs)
    first_order = gradient(learner.model_copy(update={"first_order": True}))
    assert differ(first_order["head.weight"], theirs["head.weight"])
    assert differ(
        reference.maml_gradient(plain(made), params, episodes, 2, 0.05)[0]["head.weight"], theirs["head.weight"]
    )


# Evaluation.


def expected(learner: AnyLearner, made: Network) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The reference's answer to one episode."""
    if isinstance(learner, MAML):
        steps, rate = learner.test_steps, learner.inner_rate
        return lambda *one: reference.maml_logits(plain(made), params_of(made), *one, steps, rate)
    return lambda *one: reference.protonet_logits(plain(made), *one)


LEARNERS = pytest.mark.parametrize("learner", [ProtoNet(normalise=True), MAML(test_steps=3)], ids=["protonet", "maml"])


@LEARNERS
def test_logits_of_an_episode(learner: AnyLearner) -> None:
    made = network()
    support, labels, query, _ = episode(4)
    # The model's input does nothing here: the images are normalised already.
    input = INPUT.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    ours = MetaModel(made, SPEC, learner, input).logits(support, labels, query)
    assert_same(ours, expected(learner, made)(support, labels, query))
    assert differ(ours, expected(learner, made)(support, labels.flip(0), query))


@LEARNERS
def test_accuracies_of_stored_episodes(learner: AnyLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images encoded once give the accuracies of each episode encoded anew."""
    monkeypatch.setattr("metapool.meta_model.half_precision", nullcontext)  # an episode of few images turns on a hair
    labels = torch.arange(5).repeat_interleave(8)
    stored = LabelledImages(to_bytes(cases.smooth_images(len(labels), SHAPE)), labels, tuple("abcde"))
    episodes = sample_episodes(stored, WAY, 1, 4, 6, seed=0)
    made = network().float()
    ours = torch.from_numpy(evaluate(MetaModel(made, SPEC, learner, INPUT), stored, episodes).accuracies)
    made, seen = made.double(), normalised(to_float(stored.images).double())
    found = []
    for support, query in zip(episodes.support, episodes.query):
        logits = expected(learner, made)(seen[support.flatten()], episodes.support_labels, seen[query.flatten()])
        found.append((logits.argmax(1) == episodes.query_labels).double().mean())
    torch.testing.assert_close(ours, torch.stack(found), rtol=0, atol=0)
    assert differ(ours, torch.stack(found).flip(0))


# The benchmark.


def test_a_small_benchmark_writes_every_unit(tmp_path: Path) -> None:
    out = tmp_path / "new" / "units.json"
    # A process of its own: its workers import the script by its name.
    command = [sys.executable, str(BENCHMARKS / "units.py"), "--small", "--threads", "1", "--repeats", "2"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["units.json"], "no temporary file is left"
    assert set(result) == {"units", "machine", "command"}
    assert {"capability", "cores", "torch", "threads"} <= set(result["machine"])
    assert "--small" in result["command"]
    assert set(result["units"]) == {
        "recovery-step", "teacher-outputs", "fisher", "batch-gradient", "tgr-step", "maml-step",
        "evaluation-protonet", "evaluation-maml",
    }  # fmt: skip
    for name, row in result["units"].items():
        assert name in done.stdout
        assert row["ratio"] == pytest.approx(row["reference_ms"] / row["product_ms"])
        for side in ("reference", "product"):
            low, high = row[f"{side}_quartiles_ms"]
            assert 0 < low <= row[f"{side}_ms"] <= high
        assert row["repeats"] == 2
        assert row["sizes"]["side"] == 16
        # Half precision, where the product uses it, at tiny sizes: no more than that nothing is mixed up.
        assert 0 <= row["max_abs_difference"] < 0.3 * row["max_abs_reference"]
        assert max(row["relative_difference"].values()) < 0.3
    for name in ("fisher", "maml-step", "evaluation-maml"):
        assert max(result["units"][name]["relative_difference"].values()) < 1e-3
