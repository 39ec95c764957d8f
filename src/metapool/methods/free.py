r"""FREE: a meta-generator that a few steps fit to any model of the pool, and a learner aligned across models.

Wei, Hu, Wang, Shen, Yuan, Tao: "FREE: Faster and Better Data-Free Meta-Learning", CVPR 2024, arXiv 2405.00984.

======  =================================================================  ==============================
symbol  meaning                                                            name here
======  =================================================================  ==============================
T_i     model of the pool; n of them in a step                             ``model``; ``teachers``
φ, φ_i  weights of the meta-generator (FIVE); after k steps on T_i         ``painters``; ``Visit``
θ, θ_f  those of the meta-model (BELL); after a step of rate η per model   ``params``; ``moved``
======  =================================================================  ==============================

FIVE fits φ_i and z to :math:`\ell_i` and descends φ along :math:`\frac1n \sum_i \nabla \ell_i(\varphi_i)`; BELL goes to
θ_f in random order on :math:`L_i = \mathrm{KL}(T_i \| \theta)`, :math:`g_i = \nabla L_i(\theta)`, and descends θ along
d, whose mean over all orders aligns the gradients of unlike models; replay answers episodes of a memory of the images.

.. math:: \ell_i = \mathrm{CE}(T_i(x), y) + \lambda_{bn} \mathrm{BN}_i(x)
    - \lambda_{adv}\, \mathrm{mean}_x [T_i, \theta \text{ agree}]\, \mathrm{KL}(T_i \| \theta)(x), \qquad x = A(G(z))

    d = (\theta - \theta_f) / n\eta, \, n \bar d = \sum_i g_i - \frac\eta2 \sum_{i<j} \nabla (g_i \cdot g_j) + O(\eta^2)

Deviations. The published code was seen, the paper's text was not. From that code: all image sets of a step enter the
memory, not the last alone; φ has one Adam all along, not a new one in every step (which only takes signs), and its
gradient is that at φ_i, averaged, not the one a step before, summed; models drawn without replacement; divergences of
log-probabilities, not of probabilities; adversarial gradients pass through the frozen θ to the images, too, else they
know nothing of what it says next to x; SGD in BELL (the expansion does not hold for Adam), d divided by n η, not times
67; no flips (an arrow has a direction); batch norm inductive; the best step chosen on validation classes. And for
hundreds of steps on a CPU: a set number of replay updates, fewer images, a visit's rate 1e-2 that falls (1e-3 that does
not). λ_bn = 0 is as there: in a few steps batch norm's part drowns the labels.

Cost of a step: n (k + 1) passes forth and back of generator, model and, after the warm-up, meta-model over all images
of a visit; n of the meta-model over them; the replay. Two models at most are in memory.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.bank import Memory, fit_bytes
from metapool.base.errors import MetapoolError
from metapool.base.functional import Params, call, half_precision, in_chunks, widen
from metapool.base.images import LabelledImages, to_bytes, to_float
from metapool.base.store import Key, States, Store, generator_for
from metapool.episodes import draw_episodes
from metapool.gradients import Batch, GradientStats, TaskLoss, describe, mean_gradient, task_gradients
from metapool.learners import episode_loss
from metapool.meta_model import MetaModel
from metapool.pool import Access, ModelPool, PretrainedModel
from metapool.recover import Generator, GeneratorRecovery, Inversion, LossWeights
from metapool.student import MetaTraining, Student
from metapool.training import Training, training_key

Rival = Callable[[Tensor], Tensor] | None  # from images in [0, 1] to logits of the frozen θ; none in the warm-up


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of every image, float [N], from logits [N, K] and [N, way], of which the first K count."""
    wanted, found = F.log_softmax(teacher, 1), F.log_softmax(student[:, : teacher.shape[1]], 1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(1)


def adversarial_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Minus the mean :func:`divergence`, where images on which the two choose different classes count as 0."""
    agree = teacher.argmax(1) == student[:, : teacher.shape[1]].argmax(1)
    return -(divergence(teacher, student) * agree).mean()


def sequential_direction(
    task_loss: TaskLoss, params: Params, batches: Sequence[Batch], rate: float, order: Iterable[int]
) -> tuple[Params, GradientStats]:
    r"""BELL: :math:`d = (\theta - \theta_f) / (n \eta)`, the mean of the gradients that the steps meet.

    Args:
        task_loss: L_i, differentiable in the parameters.
        params: θ, leaves that require gradients; not changed.
        batches: of every task.
        rate: η; 0 gives the mean gradient at θ.
        order: in which the tasks are met.

    Returns:
        d by parameter, and what was seen along the way.
    """
    moved, gradients, losses = params, [], []
    for index in order:
        loss = task_loss(moved, batches[index])
        found = torch.autograd.grad(loss, list(moved.values()), materialize_grads=True)
        gradients.append(dict(zip(params, found)))
        losses.append(loss.item())
        moved = {n: (v.detach() - rate * g).requires_grad_() for (n, v), g in zip(moved.items(), found)}
    return mean_gradient(gradients), describe(gradients, losses)


class FREE(MetaTraining):
    """The method; its fields are its settings."""

    paper: ClassVar[str] = "Wei et al., CVPR 2024, arXiv 2405.00984"
    needs: ClassVar[Access] = "weights"
    version: ClassVar[int] = 1
    name: Literal["free"] = "free"
    """Which method this is."""
    teachers: int = pydantic.Field(default=4, ge=1)
    """Models of one step, n."""
    visit: GeneratorRecovery = GeneratorRecovery(per_class=6, steps=5, width=16, weights=LossWeights(batch_norm=0.0))
    """FIVE on one model. It begins at φ, so there is nothing for ``warm_steps`` and ``seed`` to do."""
    adversarial: float = pydantic.Field(default=1.0, ge=0)
    """Weight of the adversarial loss, λ_adv."""
    warm_up: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Share of the steps, the first ones, in which φ learns alone and without the adversarial loss."""
    inner_rate: float = pydantic.Field(default=0.01, gt=0)
    """Of BELL's steps from model to model, η."""
    steps: int = pydantic.Field(default=220, ge=1)
    """Steps of the method, those of the warm-up among them."""
    memory: int = pydantic.Field(default=100, ge=1)
    """Latest images of a class name that are kept for replay."""
    replay_updates: int = pydantic.Field(default=8, ge=0)
    """Optimiser steps of the replay after each step."""
    replay_tasks: int = pydantic.Field(default=4, ge=1)
    """Episodes of one of them."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> None:
        """Makes nothing, since images come while the meta-model learns; refuses a pool that no episode is made of."""
        if len(names := {name for entry in pool.manifest.models for name in entry.classes}) < 2:
            raise MetapoolError(f"{pool.path}: free needs a pool of two or more class names, and found {len(names)}")

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """FIVE, BELL and replay.

        Args:
            pool: the models.
            store: keeps checkpoints and the result.
            seed: of everything random.
            validation: images of meta-validation classes; the best checkpoint on them is kept, else the last.

        Returns:
            The meta-model.
        """
        self.prepare(pool, store, seed)
        key = training_key(self, seed, validation, pool=pool.digest())
        build = partial(self._train, pool, store, seed, validation, key)
        return MetaModel.load(store.artifact("meta-model", key, build))

    def _train(
        self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None, key: Key, folder: Path
    ) -> None:
        input, warm_steps = pool.input, int(self.warm_up * self.steps)
        noise = torch.randint(256, (64, *input.shape), generator=generator_for(seed, "free", "noise")).to(torch.uint8)
        student = Student(self.width, self.way, self.learner, input, noise, seed)  # noise until there are images
        learning = (self.steps - warm_steps) * (1 + self.replay_updates)
        training = Training(student.initial(), learning, self.learning_rate, self.average)
        five = MetaGenerator(self, pool, student, seed)

        def answer(params: Params, images: Tensor) -> Tensor:
            with half_precision():
                return widen(call(student.network, params, input.prepare(images)))

        def distil(params: Params, batch: Batch) -> Tensor:
            return divergence(batch[1], answer(params, batch[0])).mean()

        def answer_episode(params: Params, batch: Batch) -> Tensor:
            return episode_loss(self.learner, student.network, params, batch[0], batch[1], self.shot)

        def take(step: int) -> dict[str, Any]:
            generator = generator_for(seed, "free", "step", str(step))
            rival = partial(answer, {n: v.detach() for n, v in training.params.items()}) if step >= warm_steps else None
            tasks, recovery = five.step(rival, generator)
            record: dict[str, Any] = {"method": self.name, "step": step, "recovery": recovery}
            if rival is None:
                return record
            order = torch.randperm(len(tasks), generator=generator).tolist()
            direction, stats = sequential_direction(distil, training.params, tasks, self.inner_rate, order)
            training.descend(direction)
            student.calibrate_on((images := five.memory.labelled()).images)
            for _ in range(self.replay_updates):
                batches = draw_episodes(images, input, self.way, self.shot + self.query, self.replay_tasks, generator)
                gradients, losses = task_gradients(answer_episode, training.params, batches)
                training.descend(mean_gradient(gradients))
                record["replay"] = sum(losses) / len(losses)
            return record | vars(stats)

        student.train(training, self, take, store, key, validation, folder, five=five)


class Visit(Inversion):
    """FIVE on one model, with φ to begin at; ``outputs`` are the classes that those of the rival stand for."""

    def __init__(self, method: FREE, model: PretrainedModel, phi: Params, rival: Rival, generator: torch.Generator):
        self.rival, self.weight = rival, method.adversarial
        self.outputs = torch.randperm(len(model.classes), generator=generator)[: method.way].sort().values
        super().__init__(method.visit, model, generator, phi)

    def loss(self, images: Tensor) -> Tensor:
        """The inversion loss, and the adversarial one when there is a rival."""
        seen: list[Tensor] = []
        with self.model.register_forward_hook(lambda model, inputs, logits: seen.append(logits)):
            loss = super().loss(images)
        if self.rival is None:
            return loss
        return loss + self.weight * adversarial_loss(widen(seen[0])[:, self.outputs], self.rival(images))


class MetaGenerator:
    """φ of every input size in the pool, under one Adam, and the memory of what its copies painted."""

    def __init__(self, method: FREE, pool: ModelPool, student: Student, seed: int) -> None:
        self.method, self.pool, self.student = method, pool, student
        self.memory, self.painters = Memory(method.memory), nn.ModuleDict()
        for input in {entry.input.shape: entry.input for entry in pool.manifest.models}.values():
            painter = Generator(method.visit.code, method.visit.width, input)
            self.painters[str(input.shape)] = painter.initialise(generator_for(seed, "free", str(input.shape)))
        self.optimizer = torch.optim.Adam(self.painters.parameters(), 1e-3, betas=(0.5, 0.999))
        self.parts = States(phi=self.painters, optimizer=self.optimizer, memory=self.memory)

    def step(self, rival: Rival, generator: torch.Generator) -> tuple[list[Batch], float]:
        """Visits models and takes φ one step; gives images and logits for BELL, once there is a rival, and the loss."""
        total, tasks = 0.0, list[Batch]()
        drawn = torch.randperm(len(self.pool), generator=generator)[: self.method.teachers]
        for model in map(self.pool.__getitem__, drawn.tolist()):
            painter = self.painters[str(model.input.shape)]
            visit = Visit(self.method, model, painter.state_dict(), rival, generator)
            for _ in range(self.method.visit.steps):
                visit.step()
            total += visit.gradient() / len(drawn)
            for value, fitted in zip(painter.parameters(), visit.unknowns):  # the codes come last, and are left out
                assert fitted.grad is not None
                value.grad = fitted.grad / len(drawn) + (0 if value.grad is None else value.grad)
            if rival is not None:
                painted = to_bytes(visit.best)
                logits = in_chunks(model, to_float(painted), 128)[:, visit.outputs]
                self.memory.add(images := fit_bytes(painted, self.student.input), visit.labels, model.classes)
                tasks.append((to_float(images), logits))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return tasks, total

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return self.parts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave."""
        self.parts.load_state_dict(state)
        if len(self.memory):
            self.student.calibrate_on(self.memory.labelled().images)
