r"""PURER: data-free meta-learning whose training images grow out of the pool while the meta-model learns.

Hu, Shen, Wang, Liu, Yuan, Tao: "Architecture, Dataset and Model-Scale Agnostic Data-free Meta-Learning", CVPR 2023,
arXiv 2303.11183. Read with its published code; the paper's own text was not at hand.

==========  ============================================================  ===================================
symbol      meaning                                                       name here
==========  ============================================================  ===================================
M_i         model of the pool                                             ``models[i]``
D_i         learnable images of model i ("dynamic dataset")               ``pixels[id].sigmoid()``
L_inv       inversion loss of a model on its images                       ``inversion_loss``
T           pseudo episode drawn from D                                   ``Curriculum.episode``
L_out       query loss of an episode after the learner's inner loop       ``Curriculum.outer``
θ           parameters of the meta-model                                  ``params``
s ∈ {0, 1}  whether episodes are made harder ("gradient switch")          ``Switch.on``
β           weight of the adversarial term                                ``adversarial``
S, Ŝ        support, and images inverted out of the network adapted to S  ``support``, ``pseudo``
==========  ============================================================  ===================================

Episode curriculum inversion (ECI): every step descends, first in D and then in θ,

.. math:: \sum_i L_{inv}(M_i, D_i) - s\, \beta\, L_{out}(\theta; T(D))
    \qquad\text{and}\qquad \tfrac1E \sum_e L_{out}(\theta; T_e(D)).

Inversion calibration (ICFIL, ``calibrate``): before a new episode is answered, Ŝ is inverted out of the adapted
network, and the encoder takes steps that bring features of S and Ŝ together by class. *Our reconstruction*: the
published code has a flag for it and nothing behind it, so neither loss nor constants are the authors'.

Deviations, each for a reason. A step moves the images of some models, drawn anew, not of all (cost); the adversarial
episode is made of these, so that no image is made harder without its model's say. Inversion losses are added once: the
code adds a running sum, which counts the first of N models N times and the last once. Total variation and l2 are means,
and the weights those of our pixel recovery, so that they mean the same at every size; images pass through a sigmoid,
where the code leaves them unbounded in normalised space. Classes of one name in several models are one class (those of
the code share none). The meta-model starts at random: the code starts from the average of the pool's weights, which
needs a pool of one architecture, the meta-model's own. D has a long way to go from noise, so the curriculum starts at
half of our few steps, not after a fifteenth. The best step is chosen on validation classes, not on test classes; batch
norm is inductive.

Cost of a step: a forward and backward pass of ``teachers`` models over all their images, and of the meta-model over
``episodes`` episodes, one more when the switch is on. All models of the pool stay in memory meanwhile.
"""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params, half_precision
from metapool.base.functional import call as call
from metapool.base.functional import params_of as params_of
from metapool.base.images import LabelledImages, shift, to_bytes
from metapool.base.images import to_float as to_float
from metapool.base.store import Key, Store, generator_for
from metapool.base.store import Settings as Settings
from metapool.episodes import draw_classes
from metapool.learners import FewShotModel, ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.purer.calibration import Calibrated, Calibration
from metapool.pool import Access, ModelPool
from metapool.pool import PretrainedModel as PretrainedModel
from metapool.recover import LossWeights, inversion_loss
from metapool.recover import PixelRecovery as PixelRecovery
from metapool.student import MetaTraining, Student
from metapool.training import Training, training_key


class Switch(NamedTuple):
    """The gradient switch, and what it has seen."""

    best: float = 0.0
    waited: int = 0
    on: bool = False


def turn(switch: Switch, step: int, accuracy: float, start: int, patience: int) -> Switch:
    """The switch of the next step: on at ``start``, later for one step whenever accuracy no longer rises.

    Args:
        switch: that of this step.
        step: number of this step.
        accuracy: of the meta-model on this step's pseudo queries.
        start: number of the first step that makes episodes harder.
        patience: steps without a new best after which it goes on; best and count are then forgotten.

    Returns:
        The switch of step ``step + 1``.
    """
    if step + 1 <= start:
        return Switch(on=step + 1 == start)
    if accuracy > switch.best:
        return Switch(accuracy)
    return Switch(switch.best, switch.waited + 1) if switch.waited + 1 < patience else Switch(on=True)


class PURER(MetaTraining):
    """The method; its fields are its settings."""

    paper: ClassVar[str] = "Hu et al., CVPR 2023, arXiv 2303.11183"
    needs: ClassVar[Access] = "weights"
    version: ClassVar[int] = 1

    name: Literal["purer"] = "purer"
    """Which method this is."""
    per_class: int = pydantic.Field(default=10, ge=2)
    """Learnable images of every class of every model."""
    teachers: int = pydantic.Field(default=4, ge=1)
    """Models whose images a step moves; the paper takes all."""
    pixel_rate: float = pydantic.Field(default=0.25, gt=0)
    """Learning rate of Adam on the pixels, before their sigmoid."""
    shift: int = pydantic.Field(default=2, ge=0)
    """Largest random shift of the images before their model sees them, in pixels."""
    weights: LossWeights = LossWeights(total_variation=0.1)
    """Of the inversion loss."""
    adversarial: float = pydantic.Field(default=10.0, ge=0)
    """Weight of the outer loss that the images ascend when the switch is on; 0 leaves the curriculum out."""
    curriculum_start: int = pydantic.Field(default=1100, ge=0)
    """Number of the first step that makes episodes harder."""
    patience: int = pydantic.Field(default=6, ge=1)
    """Steps without a new best accuracy on pseudo queries after which episodes are made harder again."""
    episodes: int = pydantic.Field(default=4, ge=1)
    """Pseudo episodes of a step of the meta-model."""
    steps: int = pydantic.Field(default=2200, ge=1)
    """Steps, each of images and meta-model."""
    check_every: int = pydantic.Field(default=220, ge=1)
    """Steps between checkpoints, each a candidate on validation classes."""
    calibrate: bool = False
    """Calibrate the encoder anew for every episode that is answered (ICFIL); each then takes about a second."""
    calibration: Calibration = Calibration()
    """How it is calibrated."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> None:
        """Nothing: the images are made while the meta-model trains."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Episode curriculum inversion.

        Args:
            pool: the models; of any sizes and architectures.
            store: keeps checkpoints and the meta-model.
            seed: of everything random.
            validation: images of meta-validation classes; the best checkpoint on them is kept, else the last.

        Returns:
            The meta-model, or one that calibrates it for every episode.

        Raises:
            MetapoolError: when no episode can be drawn, or the learner cannot be calibrated.
        """
        if len({name for entry in pool.manifest.models for name in entry.classes}) < 2:
            raise MetapoolError(f"{pool.path}: an episode needs classes of two names or more; the pool has fewer")
        if self.per_class < self.shot + self.query:
            wanted = self.shot + self.query
            raise MetapoolError(f"per_class is {self.per_class}, but an episode needs shot + query = {wanted} images")
        if self.calibrate and not isinstance(self.learner, ProtoNet):
            raise MetapoolError(f"calibrate needs a learner with prototypes (protonet), not {self.learner.name}")
        key = training_key(self, seed, validation, {"calibrate", "calibration"}, pool=pool.digest())
        build = partial(self._train, pool, store, seed, validation, key)
        model = MetaModel.load(store.artifact("meta-model", key, build))
        return Calibrated(model, self.calibration) if self.calibrate else model

    def _train(
        self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None, key: Key, folder: Path
    ) -> None:
        curriculum = Curriculum(self, pool, seed)
        student = curriculum.student
        training = Training(student.initial(), self.steps, self.learning_rate, self.average)
        everyone = torch.arange(len(pool))

        def take(step: int) -> dict[str, Any]:
            generator = generator_for(seed, "purer", "step", str(step))
            harder, params = curriculum.switch.on, training.params
            drawn = torch.randperm(len(pool), generator=generator)[: self.teachers]
            inversion = curriculum.move(drawn, params, generator)
            answers = [curriculum.outer(everyone, params, generator) for _ in range(self.episodes)]
            loss, accuracy = (torch.stack(parts).mean() for parts in zip(*answers))
            found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            training.descend(dict(zip(params, found)))
            curriculum.switch = turn(curriculum.switch, step, accuracy.item(), self.curriculum_start, self.patience)
            if (step + 1) % self.check_every == 0 or step + 1 == self.steps:
                student.calibrate_on(curriculum.images())
            seen = {"inversion": inversion, "harder": harder, "loss": loss.item(), "accuracy": accuracy.item()}
            return {"method": self.name, "step": step, **seen}

        student.train(training, self, take, store, key, validation, folder, curriculum=curriculum)


class Curriculum:
    """The dynamic dataset under Adam, episodes that are drawn from it, the switch, and the student that it is for."""

    def __init__(self, method: PURER, pool: ModelPool, seed: int) -> None:
        self.method = method
        self.models = list(pool)
        sizes = [(len(model.classes) * method.per_class, *model.input.shape) for model in self.models]
        generators = [generator_for(seed, "purer", "noise", id) for id in pool.ids]
        self.pixels = [torch.randn(n, generator=g).requires_grad_() for n, g in zip(sizes, generators)]
        # One Adam: pixels without a gradient keep their moments, and their count of steps, as they are.
        self.optimizer = torch.optim.Adam(self.pixels, method.pixel_rate, betas=(0.5, 0.999), fused=True)
        self.switch = Switch(on=method.curriculum_start == 0)
        self.targets = [torch.arange(len(m.classes)).repeat_interleave(method.per_class) for m in self.models]
        self.owner = torch.cat([torch.full_like(part, i) for i, part in enumerate(self.targets)])
        self.place = torch.cat([torch.arange(len(part)) for part in self.targets])
        names = list(dict.fromkeys(name for model in self.models for name in model.classes))
        named = [names.index(m.classes[label]) for m, part in zip(self.models, self.targets) for label in part.tolist()]
        self.labels = torch.tensor(named)
        self.input = pool.input
        self.student = Student(method.width, method.way, method.learner, self.input, self.images(), seed)

    def images(self) -> Tensor:
        """The whole dataset as it is now, uint8 [N, C, H, W] at the student's size."""
        return torch.cat([to_bytes(self.input.fit(part.detach().sigmoid())) for part in self.pixels])

    def move(self, drawn: Tensor, params: Params, generator: torch.Generator) -> float:
        """A step of Adam on the images of the drawn models; gives their mean inversion loss before it."""
        gradients, loss = self.gradients(drawn, params, generator)
        for owner, gradient in zip(drawn.tolist(), gradients):
            self.pixels[owner].grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, drawn: Tensor, params: Params, generator: torch.Generator) -> tuple[list[Tensor], float]:
        """Of the inversion losses, minus β that of the outer loss when the switch is on; and the mean of the former."""
        gradients, losses = [], []
        for owner in drawn.tolist():
            with half_precision():
                images = shift(self.pixels[owner].sigmoid(), self.method.shift, generator)
                loss = inversion_loss(self.models[owner], images, self.targets[owner], self.method.weights)
            gradients += torch.autograd.grad(loss, self.pixels[owner])
            losses.append(loss.item())
        if self.switch.on:
            outer, _ = self.outer(drawn, params, generator)
            moved = [self.pixels[owner] for owner in drawn.tolist()]
            harder = torch.autograd.grad(outer, moved, materialize_grads=True)
            gradients = [one - self.method.adversarial * other for one, other in zip(gradients, harder)]
        return gradients, sum(losses) / len(losses)

    def outer(self, drawn: Tensor, params: Params, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """L_out on an episode of the drawn models, and the percentage of its queries that are answered rightly."""
        images, labels = self.episode(drawn, generator)
        known = torch.arange(len(images)) % (self.method.shot + self.method.query) < self.method.shot
        with half_precision():
            logits = self.method.learner.query_logits(
                self.student.network, params, images[known], labels[known], images[~known]
            )
            loss = F.cross_entropy(logits, labels[~known])
        return loss, 100 * (logits.argmax(1) == labels[~known]).double().mean()

    def episode(self, drawn: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images whose classes mix the drawn models, normalised, differentiable, class-major; and their labels."""
        rows = torch.where(torch.isin(self.owner, drawn))[0]
        names, labels = self.labels[rows].unique(return_inverse=True)
        way, count = min(self.method.way, len(names)), self.method.shot + self.method.query
        rows = rows[draw_classes(labels, len(names), way, count, generator)[0]]
        # Model by model, since their images differ in size; then back into the order of the draw.
        order = [torch.where(self.owner[rows] == owner)[0] for owner in drawn]
        parts = [self.pixels[owner][self.place[rows[here]]] for owner, here in zip(drawn.tolist(), order)]
        images = torch.cat([self.input.prepare(part.sigmoid()) for part in parts if len(part)])
        return images[torch.cat(order).argsort()], torch.arange(way).repeat_interleave(count)

    def state_dict(self) -> dict[str, Any]:
        """Pixels, moments of Adam, and the switch."""
        pixels = [part.detach() for part in self.pixels]
        return {"pixels": pixels, "optimizer": self.optimizer.state_dict(), "switch": self.switch._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts them back; the student's statistics follow, lest those of a finished run be of noise."""
        with torch.no_grad():
            for part, value in zip(self.pixels, state["pixels"]):
                part.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.switch = Switch(**state["switch"])
        self.student.calibrate_on(self.images())
