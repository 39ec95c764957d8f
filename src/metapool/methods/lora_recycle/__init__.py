r"""LoRA Recycle: one meta-LoRA out of a pool of LoRAs of one frozen vision transformer.

Hu, Wei, Shen, Yuan, Tao: "LoRA Recycle: Unlocking Tuning-Free Few-Shot Adaptability in Visual Foundation Models by
Recycling Pre-Tuned LoRAs", CVPR 2025, arXiv 2412.02220.

==================  ==================================================  =============================================
symbol              meaning                                             name here
==================  ==================================================  =============================================
f                   frozen transformer                                  the backbone file of the pool
δW^T, h^T           LoRA and head of one task                           ``pool[i]``, called a teacher
X, Y                images recovered from it, and their labels          ``bank[id]``
δW                  meta-LoRA, all that learns                          ``params``
c_i                 prototype, mean support feature of a class (eq. 3)  ``learner.classify``
p_T                 a teacher's softmax over the classes of an episode  ``tasks.Episode.teacher``, as logits
S                   attention of the class token to each patch (eq. 5)  ``class_attention`` (base/transformer.py)
==================  ==================================================  =============================================

The transformer with the meta-LoRA answers episodes by nearest prototype, without tuning. A step takes the mean over
``tasks`` episodes, each of one of two kinds:

.. math:: p(x) = \mathrm{softmax}_i(-\|f_{δW}(x) - c_i\|^2 / τ), \qquad
    L_T = \mathrm{mean}_q \, \mathrm{KL}(p_T(x_q) \,\|\, p(x_q)), \qquad
    L_X = \mathrm{mean}_q \, (-\log p_{y_q}(x_q))

:math:`L_T` (equation 3) on classes of one teacher; :math:`L_X` (equation 4) on classes of several, which no teacher
knows together.

Deviations. From the paper: a teacher's images are recovered once, into a bank, not anew at every visit, and in 100
steps, not 2000 (cost); with image priors alone, since the paper's stand-in for batch-norm statistics, an ImageNet
ResNet-50, would be a model trained on data of the kind that the owners kept; classes of one name are one class in
:math:`L_X`, lest an episode ask to tell a class from itself; features are divided by their length and logits by τ, as
those of every other method here; no flips, since icons have a direction; one half cosine from 1e-3, not cycles of 100
steps, since a thousand episodes and not 240,000 are drawn; :math:`L_T` takes the divergence as KL(teacher ‖ student),
which the paper prints the other way round, because its gradient does not vanish where the student is surely wrong;
patches are left out in training only, by the teacher's last block, and recovery sees all of them (earlier pruning lost
accuracy in the paper's own table). From the published code: teacher and student are two things (there the teacher's
LoRA is loaded into the very object that is its student, so that the divergence is of a network from itself); both kinds
of episode are in use (there a constant switches one off); the adapters that are inverted are the pool's (there one is
trained on real images of all classes and inverted); candidates are compared on validation classes, not on test classes.

Cost of a step: one forward and backward pass of the transformer over ``tasks * way * (shot + query)`` images, and none
of a teacher, whose answers the bank keeps. With ``keep_tokens`` below 1, one pass of every teacher over its images
before the first step.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch

from metapool.bank import TaskBank
from metapool.base.images import LabelledImages
from metapool.base.store import Settings, Store, generator_for
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.lora_recycle.tasks import Draws, MetaLoRA, check_backbone
from metapool.pool import Access, ModelPool
from metapool.recover import PRIORS, AnyRecovery, PixelRecovery, recover_pool
from metapool.student import EpisodicTraining
from metapool.training import Training, training_key


class LoRARecycle(EpisodicTraining):
    """A pool's adapters of one transformer, distilled into one adapter that needs no tuning."""

    paper: ClassVar[str] = "Hu et al., CVPR 2025, arXiv 2412.02220"
    needs: ClassVar[Access] = "adapters of one backbone"
    version: ClassVar[int] = 1

    name: Literal["lora-recycle"] = "lora-recycle"
    """Which method this is."""
    recovery: AnyRecovery = PixelRecovery(per_class=10, steps=100, learning_rate=0.25, weights=PRIORS)
    """How the bank is made: by pixels, as in the paper; a transformer has no batch-norm statistics to go by."""
    learner: ProtoNet = ProtoNet(normalise=True, temperature=0.15)
    """How the transformer answers an episode, in training and after."""
    tasks: int = pydantic.Field(default=4, ge=1)
    """Episodes of a step."""
    interpolate: float = pydantic.Field(default=0.5, ge=0, le=1)
    """Probability that an episode mixes classes of several models, and is learned from labels."""
    keep_tokens: float = pydantic.Field(default=1.0, gt=0, le=1)
    """Share of an image's patches that training sees, those that the image's own teacher looks at most."""
    learning_rate: float = pydantic.Field(default=1e-3, gt=0)
    """Of Adam; it falls to a hundredth along half a cosine. Five times as much lost two points in a small trial."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> TaskBank:
        """Recovers the bank; the seed plays no part."""
        check_backbone(pool)
        return recover_pool(pool, self.recovery, store)

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """Algorithm 1 of the paper, on a bank.

        Args:
            pool: adapters of one transformer.
            store: keeps every stage.
            seed: of everything random.
            validation: images of meta-validation classes; the best checkpoint on them is kept, else the last.

        Returns:
            The transformer with the meta-LoRA.
        """
        bank = self.prepare(pool, store, seed)
        key = training_key(self, seed, validation, bank=bank.digest())
        train = partial(self._train, pool, bank, store, seed, validation, key)
        return MetaModel.load(store.artifact("meta-model", key, train))

    def _train(
        self,
        pool: ModelPool,
        bank: TaskBank,
        store: Store,
        seed: int,
        validation: LabelledImages | None,
        key: Mapping[str, Any],
        folder: Path,
    ) -> None:
        student = MetaLoRA(pool, self.learner, self.way, seed)
        training = Training(student.initial(), self.steps, self.learning_rate, self.average)
        draws = Draws(pool, bank, self.way, self.shot + self.query, self.interpolate, self.keep_tokens)

        def take(step: int) -> dict[str, Any]:
            generator = generator_for(seed, "lora-recycle", "step", str(step))
            drawn = [draws.draw(generator) for _ in range(self.tasks)]
            loss = torch.stack(student.losses(training.params, drawn, self.shot)).mean()
            found = torch.autograd.grad(loss, list(training.params.values()))
            training.descend(dict(zip(training.params, found)))
            return {"method": self.name, "step": step, "loss": loss.item()}

        student.train(training, self, take, store, key, validation, folder)


class FrozenBackbone(Settings):
    """The pool's transformer as it is, with no adapter: what any meta-LoRA has to beat.

    Cost: nothing is trained.
    """

    paper: ClassVar[str] = "honest baseline"
    needs: ClassVar[Access] = "adapters of one backbone"
    version: ClassVar[int] = 1

    name: Literal["frozen-backbone"] = "frozen-backbone"
    """Which method this is."""
    learner: ProtoNet = ProtoNet(normalise=True, temperature=0.15)
    """How the transformer answers an episode."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> None:
        """Nothing to make."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """Takes the adapters off.

        Args:
            pool: adapters of one transformer.
            store: not used.
            seed: of adapters that add nothing.
            validation: not used.

        Returns:
            The transformer.
        """
        student = MetaLoRA(pool, self.learner, 2, seed)
        return student.model(student.initial())
