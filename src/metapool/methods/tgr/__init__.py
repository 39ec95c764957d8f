r"""Task Groupings Regularization: data-free meta-learning from heterogeneous models.

Wei, Hu, Shen, Wang, Li, Yuan, Tao: "Task Groupings Regularization: Data-Free Meta-Learning with Heterogeneous
Pre-trained Models", ICML 2024, arXiv 2405.16560.

==================  =========================================  ==============================================
symbol              meaning                                    name here
==================  =========================================  ==============================================
M_i                 model of the pool                          ``pool[i]``
F_i                 Fisher embedding of task i                 ``embeddings[id]``
D_ij                dissimilarity (§3.2)                       ``distances``
θ                   parameters of the meta-model               ``params``
L_i(θ)              task loss of model i                       ``tasks.Tasks``
n                   models of a step                           ``teachers``
α                   displacement of the implicit step (§3.3)   ``alpha``
R                   gradient discrepancy                       ``GradientStats.discrepancy``
==================  =========================================  ==============================================

Deviations from the published code, each for a reason: recovery once into a bank, not anew in every epoch (cost);
per-sample Fisher with a refitted head, not the squared batch gradient (identity 2 of the design); θ_i detached (the
kept graph regularises twice as much, at second order); Kullback-Leibler divergence of log-probabilities, not of
probabilities; models drawn without replacement, groups in proportion to their size; batch norm inductive; a fixed
number of replay updates instead of an early-stop rule; the best step chosen on validation classes, not on test classes.
The loss ``relational``, as task loss and as replay, is ours.

Cost of a step: 2n forward and backward passes over ``batch`` images (n with α = 0), those of the replay, and no pass of
any teacher.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
import torch

from metapool.bank import TaskBank
from metapool.base.functional import Params as Params
from metapool.base.functional import call as call
from metapool.base.functional import half_precision as half_precision
from metapool.base.functional import widen as widen
from metapool.base.images import InputSpec, LabelledImages
from metapool.base.images import to_float as to_float
from metapool.base.store import Store, generator_for
from metapool.embed import ProbeSettings, dissimilarity, embed_bank
from metapool.episodes import draw_classes as draw_classes
from metapool.gradients import Batch as Batch
from metapool.gradients import TaskLoss as TaskLoss
from metapool.gradients import attached_step, implicit_step
from metapool.gradients import mean_gradient as mean_gradient
from metapool.gradients import task_gradients as task_gradients
from metapool.group import Grouping, group_models
from metapool.meta_model import MetaModel
from metapool.methods.tgr.tasks import Tasks
from metapool.pool import Access, ModelPool
from metapool.recover import AnyRecovery, GeneratorRecovery, recover_pool
from metapool.student import MetaTraining, Student
from metapool.task_losses import classify_loss as classify_loss
from metapool.task_losses import relational_loss as relational_loss
from metapool.training import Training, training_key
from metapool.views import Views, ViewSettings, view_bank

TaskLossName = Literal["relational", "classify", "episodic"]


class TGR(MetaTraining):
    """The method; its fields are its settings."""

    paper: ClassVar[str] = "Wei et al., ICML 2024, arXiv 2405.16560"
    needs: ClassVar[Access] = "weights"
    version: ClassVar[int] = 4

    name: Literal["tgr"] = "tgr"
    """Which method this is."""
    variant: Literal["corrected", "released"] = "corrected"
    """``released`` does what the published code does instead of what the paper means: a divergence of probabilities, a
    displacement that keeps its graph, squared batch gradients as Fisher information, transductive batch norm."""
    recovery: AnyRecovery = GeneratorRecovery()
    """Stage 1: images out of each model."""
    probe: ProbeSettings = ProbeSettings()
    """Stage 2: the network whose Fisher information embeds a task."""
    grouping: Grouping = "dissimilar"
    """Stage 3: which models share a group."""
    groups: int = pydantic.Field(default=5, ge=1)
    """Number of groups."""
    teachers: int = pydantic.Field(default=4, ge=1)
    """Models of one step, n."""
    task_loss: TaskLossName = "relational"
    """Stage 4: what the meta-model is to do on one model's task."""
    temperature: float = pydantic.Field(default=0.05, gt=0)
    """Of the neighbourhoods that ``relational`` compares."""
    whiten: float = pydantic.Field(default=0.3, ge=0, le=1)
    """How far the meta-model's features are whitened by their second moment on images of training, when it answers by
    ProtoNet: a linear map that evens out what each direction says. 0 leaves it out."""
    alpha: float = pydantic.Field(default=1e-3, ge=0)
    """Displacement of the implicit step; 0 turns the gradient regularization off."""
    views: ViewSettings = ViewSettings()
    """Images that all models look at, for ``relational`` as task loss or replay."""
    steps: int = pydantic.Field(default=240, ge=1)
    """Steps of stage 4, each followed by replay."""
    batch: int = pydantic.Field(default=64, ge=8)
    """Images of one task in one step."""
    replay: Literal["none", "episodes", "relational"] = "relational"
    """Stage 5, on the whole bank. ``episodes``: the paper's, classes mixed across models, through the learner;
    ``relational``: ours, the neighbourhoods of all models together."""
    replay_updates: int = pydantic.Field(default=15, ge=0)
    """Optimiser steps of the replay after each step of stage 4."""
    replay_batch: int = pydantic.Field(default=128, ge=8)
    """Images of a relational replay."""
    names: float = pydantic.Field(default=0.05, ge=0)
    """Added, in a relational replay, to the cosine of two recovered images whose classes have one name in whatever
    models: what no single model knows. 0 for pools whose class names do not mean the same everywhere."""
    replay_tasks: int = pydantic.Field(default=4, ge=1)
    """Episodes of a replay."""
    freeze: tuple[Annotated[float, pydantic.Field(ge=0, le=1)], ...] = pydantic.Field(default=(0.05, 0.3), max_length=3)
    """Share of the steps after which the first block of the network stops learning, then the second, and so on; what
    they make of the views is then made once and kept, which halves the time (FreezeOut, Brock et al. 2017, arXiv
    1706.04983). For relational losses only; others train all blocks to the end."""

    @pydantic.model_validator(mode="after")
    def _released_as_a_whole(self) -> Self:
        if self.variant == "released" and (
            self.task_loss != "classify"
            or self.replay == "relational"
            or self.probe.per_sample
            or not getattr(self.learner, "transductive", False)
        ):
            raise ValueError(
                "variant 'released' needs task_loss classify, replay episodes, probe {per_sample: false} and learner "
                "{name: maml, transductive: true}"
            )
        return self

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """Algorithm 1 of the paper.

        Args:
            pool: the models.
            store: keeps every stage.
            seed: of everything random.
            validation: images of meta-validation classes; the best checkpoint on them is kept, else the last.

        Returns:
            The meta-model.
        """
        bank = recover_pool(pool, self.recovery, store)
        return self.fit_bank(pool, bank, self.grouped(pool, bank, store, seed), store, seed, validation)

    def fit_bank(
        self,
        pool: ModelPool,
        bank: TaskBank,
        groups: list[list[str]],
        store: Store,
        seed: int,
        validation: LabelledImages | None = None,
    ) -> MetaModel:
        """What :meth:`fit` does with a bank, however that was made.

        Args:
            pool: the models.
            bank: a task of every model.
            groups: model ids of every group.
            store: keeps every stage.
            seed: of everything random.
            validation: images of meta-validation classes; the best checkpoint on them is kept, else the last.

        Returns:
            The meta-model.
        """
        key = self.key(bank, groups, seed, validation)
        views = self._views(pool, bank, store)
        build_model = partial(self.train, bank, groups, views, pool.input, store, seed, validation, key)
        return MetaModel.load(store.artifact("meta-model", key, build_model))

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> tuple[TaskBank, list[list[str]], Views | None]:
        """All stages that open models of the pool.

        Args:
            pool: the models.
            store: keeps every stage.
            seed: of the clustering.

        Returns:
            The bank, model ids of every group, and what all models see, when a loss asks for it.
        """
        bank = recover_pool(pool, self.recovery, store)
        return bank, self.grouped(pool, bank, store, seed), self._views(pool, bank, store)

    def _views(self, pool: ModelPool, bank: TaskBank, store: Store) -> Views | None:
        """What all models say of the bank's images, when a loss asks for it."""
        return view_bank(pool, bank, [pool.ids], pool.input, self.views, store)[0] if self.relational else None

    @property
    def relational(self) -> bool:
        """Whether a loss compares with what the models see, so that it needs views."""
        return "relational" in (self.task_loss, self.replay)

    def phases(self, done: int = 0) -> Mapping[int, int]:
        """How long the blocks of the network learn.

        Args:
            done: steps that are taken already.

        Returns:
            Numbers of the steps that are left, by the number of blocks that no longer learn then.
        """
        return Counter(self._frozen(step) for step in range(done, self.steps))

    def key(
        self, bank: TaskBank, groups: list[list[str]], seed: int, validation: LabelledImages | None
    ) -> dict[str, Any]:
        """What the trained model depends on.

        Args:
            bank: recovered tasks, or what will be.
            groups: model ids of every group.
            seed: of everything random.
            validation: images of meta-validation classes.

        Returns:
            A key of the store.
        """
        return training_key(self, seed, validation, bank=bank.digest(), groups=groups)

    def grouped(self, pool: ModelPool, bank: TaskBank, store: Store, seed: int) -> list[list[str]]:
        """Stages 2 and 3.

        Args:
            pool: the models.
            bank: their recovered tasks.
            store: keeps the embeddings.
            seed: of the clustering.

        Returns:
            Model ids of every group.
        """
        embeddings = embed_bank(bank, pool.input, self.probe, store)
        distances = dissimilarity(embeddings)
        smallest = min(self.teachers, len(pool))
        return [
            [pool.ids[index] for index in group]
            for group in group_models(distances, self.grouping, self.groups, smallest, seed)
        ]

    def train(
        self,
        bank: TaskBank,
        groups: list[list[str]],
        views: Views | None,
        input: InputSpec,
        store: Store,
        seed: int,
        validation: LabelledImages | None,
        key: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """Stages 4 and 5: the checkpointed loop.

        Args:
            bank: recovered tasks.
            groups: model ids of every group.
            views: what all models say of the bank's images, when a loss asks for it.
            input: the meta-model's.
            store: keeps the checkpoints.
            seed: of everything random.
            validation: images of meta-validation classes.
            key: what the checkpoints depend on.
            folder: is filled with the trained model.
        """
        images = bank.labelled("distinct", input).images if views is None else views.images
        student = Student(self.width, self.way, self.learner, input, images, seed, self.whiten)
        updates = 0 if self.replay == "none" else self.replay_updates
        training = Training(student.initial(), self.steps * (1 + updates), self.learning_rate, self.average)
        tasks = Tasks(self, student, bank, groups, views)
        sizes = torch.tensor([float(len(group)) for group in groups])

        def take(step: int) -> dict[str, Any]:
            if (blocks := self._frozen(step)) > tasks.start:
                tasks.freeze(training, blocks)
            generator = generator_for(seed, "tgr", "step", str(step))
            group = int(torch.multinomial(sizes, 1, generator=generator))
            batches, task_loss = tasks.draw(group, generator)
            if self.variant == "released":
                direction, stats = attached_step(task_loss, training.params, batches, self.alpha)
            else:
                direction, stats = implicit_step(task_loss, training.params, batches, self.alpha, tasks.together)
            training.descend(direction)
            record = {"method": self.name, "step": step, "group": group, **vars(stats)}
            for _ in range(updates):
                record["replay"], gradient = tasks.replay(training.params, generator)
                training.descend(gradient)
            return record

        student.train(training, self, take, store, key, validation, folder)

    def _frozen(self, step: int) -> int:
        """Blocks that no longer learn."""
        if self.task_loss != "relational" or self.replay == "episodes":
            return 0
        return sum(step >= share * self.steps for share in self.freeze)
