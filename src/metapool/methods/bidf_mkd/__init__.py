r"""BiDf-MKD: meta-learning from models that can only be asked, by bi-level knowledge distillation.

Hu, Shen, Wang, Wu, Yuan, Tao: "Learning to Learn from APIs: Black-Box Data-Free Meta-Learning", ICML 2023, arXiv
2305.18413. Only abstract, figure and released code were at hand, not the body of the paper.

==============  =======================================================  =====================================
symbol          meaning                                                  name here
==============  =======================================================  =====================================
A_i             service ("API") behind which model i answers             ``blackbox.BlackBox``
G, z            generator of images and its codes                        ``painter``, ``codes``
S, Q            support and query set recovered out of one service       ``Task``
μ, q            radius and number of the directions that are tried       ``radius``, ``directions``
u_k             k-th direction, uniform on the unit sphere               ``units``
d               numbers of an image, C · H · W                           ``images[0].numel()``
θ, s            meta-model, and its answer once adapted to S             ``params``, ``adapted_logits``
L_b             boundary term of query sets                              ``boundary_term``
==============  =======================================================  =====================================

Recovery: with no gradient of A at hand, that of an image's loss l is estimated out of 1 + q answers (zero order),

.. math:: \hat g(x) = \frac{d}{q} \sum_{k=1}^q \frac{l(x + \mu u_k) - l(x)}{\mu} u_k, \qquad
    l(x) = -\log A_y(x) - \lambda\, [\arg\max s(x) = \arg\max A(x) = y]\, \| \log A(x) - \log s(x) \|_1,

and G and z descend :math:`\langle x, \hat g(x) \rangle` with :math:`\hat g` held fixed. Support sets have λ = 0, and so
have query sets at first; later these are to lie where the adapted meta-model and the service differ.
Bi-level distillation: the inner loop adapts θ to S and A's answers to it, the outer loss is KL(A ‖ s) on Q. MAML and
ANIL descend the inner cross-entropy with A's probabilities as targets, whose gradient is that of KL(A ‖ student);
ProtoNet's inner loop is in closed form: prototypes weighted by A's probabilities. Whatever was recovered stays in a
memory, from which episodes mix classes of all services ("task interpolation", by recombination).

Deviations, each for a reason. Probabilities, not logits: a service gives no others; the radius counts in [0, 1], before
a service normalises. KL of log-probabilities, averaged over images (the code takes probabilities for their logarithms).
Whether s and A agree is asked at x alone, not at x + μ u: there it jumps, and jumps are divided by μ; and they must
agree on y, else the boundary term, unbounded, holds an image in any class that it happens to be in. An image is kept
at its lowest true loss, not when the whole batch is lowest in the surrogate. Q comes out of the generator that S has
fitted, with new codes (cost). Services are visited in turn; a task recovered once is distilled again with the answers
then given (the code distils it once). One learner for distillation and replay (there 10 and 5 inner steps). Shifts and
no flips; a fixed number of replay updates; batch norm inductive; the best step chosen on validation classes.

Label-only services are refused: a one-hot answer is constant around nearly every image, so its estimate is 0. Nor does
a larger radius help: on three models of the shipped pool, thirty images of an untrained generator all got one to three
of the five labels, so that nothing points to the others.

Cost of a step: every ``visit_every``-th asks one service 2 · way · per_class · (steps · (1 + q) + 1) times,
and the generator passes forward and backward over 2 · way · per_class · steps images (q, per_class and steps are those
of ``zero_order``); once the boundary counts, the adapted meta-model passes forward too (its inner loop in every step of
the recovery, for MAML and ANIL). All steps distil ``teachers`` tasks, and replay. One model at a time is in memory.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.bank import Memory as Memory
from metapool.bank import fit_bytes as fit_bytes
from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.base.functional import call as call
from metapool.base.functional import half_precision as half_precision
from metapool.base.functional import widen as widen
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import Network as Network
from metapool.base.store import Key, Store, generator_for
from metapool.blackbox import FLOOR as FLOOR
from metapool.blackbox import BlackBox, ZeroOrderRecovery, wanted_loss
from metapool.episodes import draw_episodes
from metapool.gradients import Batch, mean_gradient, task_gradients
from metapool.learners import AnyLearner as AnyLearner
from metapool.learners import ProtoNet as ProtoNet
from metapool.learners import episode_loss
from metapool.meta_model import MetaModel
from metapool.methods.bidf_mkd.tasks import Found, Task, adapted_logits, among, boundary_term
from metapool.pool import Access, ModelPool
from metapool.student import MetaTraining, Student
from metapool.training import Training, training_key


class BiDfMKD(MetaTraining):
    """The method; its fields are its settings."""

    paper: ClassVar[str] = "Hu et al., ICML 2023, arXiv 2305.18413"
    needs: ClassVar[Access] = "answers"
    version: ClassVar[int] = 1

    name: Literal["bidf-mkd"] = "bidf-mkd"
    """Which method this is."""
    queries: int = pydantic.Field(default=1_500_000, ge=1)
    """Images that all services together may be asked about; when no visit fits any more, replay and tasks of earlier
    visits go on."""
    label_only: bool = False
    """Whether services answer with a class and no probabilities; such are refused, since they give no slope."""
    steps: int = pydantic.Field(default=290, ge=1)
    """Steps, each of distillation and replay."""
    visit_every: int = pydantic.Field(default=5, ge=1)
    """Steps from one visit of a service to the next."""
    zero_order: ZeroOrderRecovery = ZeroOrderRecovery()
    """Images out of a service: of either set of a visit."""
    boundary: float = pydantic.Field(default=1.0, ge=0)
    """Weight of the boundary term, λ."""
    boundary_after: float = pydantic.Field(default=0.3, ge=0, le=1)
    """Share of the steps after which query sets are drawn to the boundary."""
    teachers: int = pydantic.Field(default=4, ge=1)
    """Tasks that a step distils, the newest among them."""
    memory: int = pydantic.Field(default=60, ge=1)
    """Recovered images that are kept of a class."""
    replay_updates: int = pydantic.Field(default=4, ge=0)
    """Optimiser steps on the memory after each step of distillation."""
    replay_tasks: int = pydantic.Field(default=4, ge=1)
    """Episodes of a replay."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> None:
        """Nothing: images are recovered while the meta-model trains.

        Args:
            pool: not used.
            store: not used.
            seed: not used.
        """

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """Visits, distils, replays.

        Args:
            pool: the models, asked only through :class:`BlackBox`.
            store: keeps checkpoints and the meta-model.
            seed: of everything random.
            validation: images of meta-validation classes; the best checkpoint on them is kept, else the last.

        Returns:
            The meta-model.

        Raises:
            MetapoolError: when services answer with labels alone, or the budget does not suffice for any first visit.
        """
        if self.label_only:
            raise MetapoolError("bidf-mkd needs probabilities: a service that answers with labels alone gives no slope")
        if (dearest := max(self._cost(len(entry.classes)) for entry in pool.manifest.models)) > self.queries:
            raise MetapoolError(f"queries is {self.queries}: one visit takes {dearest} (lower per_class or directions)")
        key = training_key(self, seed, validation, pool=pool.digest())
        return MetaModel.load(
            store.artifact("meta-model", key, partial(self._train, pool, store, seed, validation, key))
        )

    def _train(
        self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None, key: Key, folder: Path
    ) -> None:
        input = pool.input
        nothing = torch.zeros(1, *input.shape, dtype=torch.uint8)  # until the first visit
        student = Student(self.width, self.way, self.learner, input, nothing, seed)
        updates = self.steps * (1 + self.replay_updates)
        training = Training(student.initial(), updates, self.learning_rate, self.average)
        found = Found(student, self.memory)

        def take(step: int) -> dict[str, Any]:
            generator = generator_for(seed, "bidf-mkd", "step", str(step))
            record: dict[str, Any] = {"method": self.name, "step": step}
            if step % self.visit_every == 0:
                id = self._service(pool.ids, step, seed)
                box = BlackBox(pool.get(id), self.queries - found.queries)
                if self._cost(len(box.classes)) <= box.most:
                    task = self.visit(box, student, training.params, step, generator)
                    found.add(id, task, box.queries)
                    record |= {"model": id, "agreement": task.agreement()}
            tasks = found.draw(self.teachers, "model" in record, generator)
            record["loss"], direction = self.distil(student, training.params, tasks)
            training.descend(direction)
            images = found.memory.labelled()
            for _ in range(self.replay_updates):
                record["replay"], direction = self.replay(student, training.params, images, generator)
                training.descend(direction)
            return record | {"queries": found.queries}

        student.train(training, self, take, store, key, validation, folder, found=found)

    def _service(self, ids: list[str], step: int, seed: int) -> str:
        """Whom to visit: all in turn, in a new order every time."""
        turn, place = divmod(step // self.visit_every, len(ids))
        order = torch.randperm(len(ids), generator=generator_for(seed, "bidf-mkd", "turn", str(turn)))
        return ids[int(order[place])]

    def _cost(self, classes: int) -> int:
        """Queries of a visit to a service of so many classes: two sets, and their answers once they are rounded."""
        way = min(self.way, classes)
        return 2 * (self.zero_order.queries(way) + way * self.zero_order.per_class)

    def visit(self, box: BlackBox, student: Student, params: Params, step: int, generator: torch.Generator) -> Task:
        """Recovers a support and a query set out of a service.

        Args:
            box: the service.
            student: the meta-model.
            params: its parameters.
            step: number of the step; it tells whether the query set is drawn to the boundary.
            generator: source of all randomness.

        Returns:
            The task.
        """
        chosen = torch.randperm(len(box.classes), generator=generator)[: self.way]
        labels = torch.arange(len(chosen)).repeat_interleave(self.zero_order.per_class)
        wanted = chosen[labels]
        painter = self.zero_order.painter(box.input, generator)

        def alone(images: Tensor, answers: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda near: wanted_loss(near, wanted)

        support = self.zero_order.recover(box, painter, len(wanted), alone, generator)
        targets = among(box(to_float(support)), chosen)
        known = student.input.prepare(to_float(support))

        def against_student(images: Tensor, answers: Tensor) -> Callable[[Tensor], Tensor]:
            asked = student.input.prepare(images)
            logits = adapted_logits(self.learner, student.network, params, known, targets, asked).detach()
            agree = (logits.argmax(1) == labels) & (answers.argmax(1) == wanted)
            apart = partial(boundary_term, student=logits.softmax(1), agree=agree)
            return lambda near: wanted_loss(near, wanted) + self.boundary * apart(among(near, chosen))

        loss_near = against_student if step >= self.boundary_after * self.steps else alone
        query = self.zero_order.recover(box, painter, len(wanted), loss_near, generator)
        names = tuple(box.classes[int(k)] for k in chosen)
        return Task(support, targets, query, among(box(to_float(query)), chosen), names)

    def distil(self, student: Student, params: Params, tasks: list[Task]) -> tuple[float, Params]:
        """Outer distillation: the mean KL(service ‖ adapted meta-model) on the query sets, and its gradient.

        Args:
            student: the meta-model.
            params: its parameters.
            tasks: what services have told.

        Returns:
            The loss and its gradient.
        """
        losses: list[Tensor] = []
        for task in tasks:
            known, asked = (student.input.prepare(to_float(images)) for images in (task.support, task.query))
            logits = adapted_logits(self.learner, student.network, params, known, task.support_answers, asked)
            losses.append(F.kl_div(logits.log_softmax(1), task.query_answers, reduction="batchmean"))
        loss = torch.stack(losses).mean()
        found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        return loss.item(), dict(zip(params, found))

    def replay(
        self, student: Student, params: Params, images: LabelledImages, generator: torch.Generator
    ) -> tuple[float, Params]:
        """Episodes whose classes mix services.

        Args:
            student: the meta-model.
            params: its parameters.
            images: the memory's.
            generator: of the draw.

        Returns:
            Their mean loss and its gradient.
        """

        def episodic(params: Params, batch: Batch) -> Tensor:
            return episode_loss(self.learner, student.network, params, batch[0], batch[1], self.shot)

        per_class = self.shot + self.query
        batches = draw_episodes(images, student.input, self.way, per_class, self.replay_tasks, generator)
        gradients, losses = task_gradients(episodic, params, batches)
        return sum(losses) / len(losses), mean_gradient(gradients)
