r"""TEAPOT: a memory of mixed tasks against forgetting, learned reliability weights against lying models.

Hu, Wei, Shen, Wang, Wu, Yuan, Tao: "Task-Distributionally Robust Data-Free Meta-Learning", IEEE TPAMI 2025, arXiv
2311.14756.

==================  =========================================  ==============================================
symbol              meaning                                    name here
==================  =========================================  ==============================================
M_i                 model of the pool                          ``ids[i]``
w, π                reliability weights, π = softmax(w)        ``Reliability.weights``, ``.probabilities``
i_1, …, i_n         models of a step                           ``order``
φ, c_k              features, prototype of class k             ``features``; inside ``learner.classify``
λ                   share of the second task, Beta(½, ½)       ``arcsine(share)``
R, b                reward of a draw, its baseline             ``reward_of``, ``Reliability.baseline``
==================  =========================================  ==============================================

A step: (1) draw :math:`i_1, …, i_n` without replacement by π; (2) descend :math:`\mathrm{KL}(M_i(q) \| s(q))` with
:math:`s_k = -\|\phi(q) - c_k\|^2 / \tau`; (3) descend, ``memory_updates`` times, the cross-entropy of episodes whose
classes come from all models, or whose features are :math:`(1 - \lambda) \phi(x) + \lambda \phi(x')` of two such; (4)
follow :math:`(R - b) \nabla_w \log P(i_1, …, i_n)`. The reward needs no real image: models that claim the same class
names judge each other's recovered images (:func:`agreement`), each as far as it is trusted itself. Names that are
shuffled are wrong more often than by chance, a model that never learned is right by chance. A model that shares no name
cannot be judged; where only two share one, both are blamed; a majority that lies alike is believed.

Deviations, each for a reason: recovery once into a bank, which is the memory, not anew whenever accuracy stalls (cost);
so the memory is drawn from in proportion to π, where the paper lets in only what chosen models made. The published code
rewards by *real* labelled validation episodes in every iteration, so it is not data-free; here ``validation`` only
chooses the checkpoint. The meta-model's accuracy on recovered tasks is no substitute: young it is at chance, later it
has learned the false names by heart. A teacher stays with its task (the code distils all tasks of a step from its last
teacher). The log-probability is that of a draw without replacement (the code adds those of independent draws); the
advantage has unit size and the baseline starts at the first reward (the code's, at 40 %, pushes away from whatever came
first). A class is never mixed with itself. Images stand at random sizes on a plain background, which is ours: recovered
ones fill their frame. ProtoNet only: mixing features is not defined for MAML and ANIL.

Cost of a step: forward and backward passes over n + 1.5 ``memory_tasks`` · ``memory_updates`` episodes on average, none
of any teacher; the bank stays in memory. Before the first one: every model, one in memory at a time, looks at images of
the others that share a name with it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.errors import MetapoolError
from metapool.base.functional import call, half_precision, widen
from metapool.base.images import InputSpec, LabelledImages, Scales, commonest, place, to_bytes, to_float
from metapool.base.store import Key, Store, generator_for
from metapool.episodes import draw_classes
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.teapot.reliability import Reliability, agreement, draw_order, reward_of
from metapool.pool import Access, ModelPool
from metapool.recover import AnyRecovery, GeneratorRecovery, recover_pool
from metapool.student import MetaTraining, Student
from metapool.task_losses import distillation_loss
from metapool.training import Training, training_key


def arcsine(uniform: Tensor) -> Tensor:
    """sin²(πu/2): of Beta(½, ½) when u is uniform on [0, 1], since it is that distribution's quantile function."""
    return torch.sin(0.5 * math.pi * uniform).square()


def as_episode(features: Tensor, per_class: int, shot: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class-major features as support, its labels, queries, and the rows of the queries."""
    rows = torch.arange(len(features))
    in_support = rows % per_class < shot
    return features[in_support], rows[in_support] // per_class, features[~in_support], rows[~in_support]


class TaskMemory:
    """All recovered tasks at one size, shown on a plain background.

    Args:
        bank: recovered tasks.
        input: the meta-model's.
        method: its settings.

    Raises:
        MetapoolError: when there is nothing to tell apart.
    """

    def __init__(self, bank: TaskBank, input: InputSpec, method: "Teapot") -> None:
        named, tasks = bank.labelled("by-name", input), list(bank.values())
        if len(named.classes) < 2:
            raise MetapoolError(f"teapot needs two class names in the pool to tell apart; found {len(named.classes)}")
        self.images, self.names, self.method = named.images, named.labels, method
        self.labels = torch.cat([task.labels for task in tasks])
        self.owner = torch.arange(len(tasks)).repeat_interleave(torch.tensor([len(task.labels) for task in tasks]))
        self.logits = [task.logits for task in tasks]
        self.background = to_float(commonest(self.images))

    def shown(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Images of these rows at random sizes and places: float [N, C, H, W] in [0, 1]."""
        floats = to_float(self.images[rows])
        return place(floats, self.method.scales, self.method.shift, self.background, generator)

    def of_model(self, model: int, way: int, per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of ``way`` classes of one model, class-major, and its own logits of these images over these classes."""
        rows, logits = torch.where(self.owner == model)[0], self.logits[model]
        drawn, chosen = draw_classes(self.labels[rows], logits.shape[1], way, per_class, generator)
        return rows[drawn], logits[drawn][:, chosen]

    def of_all(self, trust: Tensor, way: int, per_class: int, generator: torch.Generator) -> Tensor:
        """Rows of two episodes, which come from each model in proportion to trust.

        Args:
            trust: π, float [M].
            way: classes of an episode, all names when there are fewer.
            per_class: images of a class, of whatever models claim its name.
            generator: of the draw.

        Returns:
            int64 [2, way · per_class], class-major; the k-th classes of the two are never the same.
        """
        weights = (trust / torch.bincount(self.owner))[self.owner]
        mass = torch.bincount(self.names, weights)
        names = torch.multinomial(mass, min(2 * way, len(mass)), generator=generator)
        rows: list[Tensor] = []
        for name in torch.cat([names[:way], names.roll(-(len(names) // 2))[:way]]):
            of_name = weights * (self.names == name)
            scarce = int(of_name.count_nonzero()) < per_class
            rows.append(torch.multinomial(of_name, per_class, replacement=scarce, generator=generator))
        return torch.stack(rows).view(2, -1)


class Teapot(MetaTraining):
    """The method; its fields are its settings."""

    paper: ClassVar[str] = "Hu et al., IEEE TPAMI 2025, arXiv 2311.14756"
    needs: ClassVar[Access] = "weights"
    version: ClassVar[int] = 1

    name: Literal["teapot"] = "teapot"
    """Which method this is."""
    recovery: AnyRecovery = GeneratorRecovery()
    """Images out of each model."""
    learner: ProtoNet = ProtoNet(normalise=True, temperature=0.15)
    """How the meta-model answers an episode; features are mixed, so it answers by features."""
    teachers: int = pydantic.Field(default=4, ge=1)
    """Models of one step, n."""
    steps: int = pydantic.Field(default=370, ge=1)
    """Steps, each on the teachers and then on the memory."""
    memory_updates: int = pydantic.Field(default=4, ge=0)
    """Optimiser steps on the memory after each step on the teachers."""
    memory_tasks: int = pydantic.Field(default=4, ge=1)
    """Episodes of one such step."""
    interpolate: float = pydantic.Field(default=0.5, ge=0, le=1)
    """Share of these episodes whose features are mixed with those of a second one."""
    policy_rate: float = pydantic.Field(default=0.03, ge=0)
    """Learning rate of the reliability weights; 0 trusts all models alike."""
    policy_every: int = pydantic.Field(default=4, ge=1)
    """Draws between two steps of the reliability weights."""
    scales: Scales = (0.4, 1.0)
    """Least and largest size at which an image is shown, relative to its frame."""
    shift: int = pydantic.Field(default=4, ge=0)
    """Largest shift of an image when it is shown, in pixels."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> TaskBank:
        """Recovers the bank, which other methods share."""
        return recover_pool(pool, self.recovery, store)

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """Meta-trains on the bank and learns whom to trust; each record of the history has all reliabilities.

        Args:
            pool: the models.
            store: keeps every stage.
            seed: of everything random.
            validation: images of meta-validation classes; they choose the checkpoint, and reward nothing.

        Returns:
            The meta-model.
        """
        bank = self.prepare(pool, store, seed)
        key = training_key(self, seed, validation, bank=bank.digest())
        build = partial(self._train, pool, bank, store, seed, validation, key)
        return MetaModel.load(store.artifact("meta-model", key, build))

    def _train(
        self,
        pool: ModelPool,
        bank: TaskBank,
        store: Store,
        seed: int,
        validation: LabelledImages | None,
        key: Key,
        folder: Path,
    ) -> None:
        """The checkpointed loop."""
        ids, input = pool.ids, pool.input
        memory, opinions = TaskMemory(bank, input, self), agreement(pool, bank)
        shown = memory.shown(torch.arange(len(memory.images)), generator_for(seed, "teapot", "calibrate"))
        student = Student(self.width, self.way, self.learner, input, to_bytes(shown), seed)
        updates = self.steps * (1 + self.memory_updates)
        training = Training(student.initial(), updates, self.learning_rate, self.average)
        reliability = Reliability(len(ids), self.policy_rate, self.policy_every)
        per_class = self.shot + self.query
        answer = partial(self.learner.classify, student.network, {})

        def features(rows: Tensor, generator: torch.Generator) -> Tensor:
            images = input.prepare(memory.shown(rows, generator))
            with half_precision():
                return widen(call(student.network, training.params, images, method="features"))

        def teach(model: int, generator: torch.Generator) -> Tensor:
            rows, teacher = memory.of_model(model, self.way, per_class, generator)
            support, labels, query, queries = as_episode(features(rows, generator), per_class, self.shot)
            return distillation_loss(answer(support, labels, query), teacher[queries])

        def remember(generator: torch.Generator) -> Tensor:
            first, second = memory.of_all(reliability.probabilities, self.way, per_class, generator)
            kind, share = torch.rand(2, generator=generator)
            if kind < self.interpolate:
                found, other = features(torch.cat([first, second]), generator).chunk(2)
                found = torch.lerp(found, other, arcsine(share))
            else:
                found = features(first, generator)
            support, labels, query, queries = as_episode(found, per_class, self.shot)
            return F.cross_entropy(answer(support, labels, query), queries // per_class)

        def descend(losses: list[Tensor]) -> float:
            loss = torch.stack(losses).mean()
            found = torch.autograd.grad(loss, list(training.params.values()), materialize_grads=True)
            training.descend(dict(zip(training.params, found)))
            return loss.item()

        def take(step: int) -> dict[str, Any]:
            generator = generator_for(seed, "teapot", "step", str(step))
            order = draw_order(reliability.weights.detach(), min(self.teachers, len(ids)), generator)
            record: dict[str, Any] = {"method": self.name, "step": step, "models": [ids[i] for i in order]}
            record["loss"] = descend([teach(model, generator) for model in order.tolist()])
            for _ in range(self.memory_updates):
                record["memory"] = descend([remember(generator) for _ in range(self.memory_tasks)])
            record["reward"] = reward_of(order, reliability.probabilities, opinions)
            if record["reward"] is not None:
                reliability.learn(order, record["reward"])
            record["reliability"] = {id: round(float(p), 4) for id, p in zip(ids, reliability.probabilities)}
            return record

        student.train(training, self, take, store, key, validation, folder, reliability=reliability)
