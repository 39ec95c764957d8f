"""The tasks of a TGR step: images of a group's models, and what the meta-model is to do on them."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.functional import Params, call, half_precision, widen
from metapool.base.images import to_float
from metapool.episodes import draw_classes, draw_episodes
from metapool.gradients import Batch, TaskLoss, mean_gradient, task_gradients
from metapool.learners import episode_loss
from metapool.student import Student
from metapool.task_losses import classify_loss, relational_loss, released_classify_loss
from metapool.training import Training
from metapool.views import Views

if TYPE_CHECKING:
    from metapool.methods.tgr import TGR


class Tasks:
    """Draws the tasks of a step and says what their loss is.

    Args:
        method: its settings.
        student: the network in training, and its input.
        bank: recovered tasks.
        groups: model ids of every group.
        views: what all models say of the bank's images, for ``relational``.
    """

    def __init__(
        self,
        method: "TGR",
        student: Student,
        bank: TaskBank,
        groups: list[list[str]],
        views: Views | None,
    ) -> None:
        self.method = method
        self.together = self._relational_together if method.task_loss == "relational" else None
        self.student = student
        self.network = student.network
        self.input = student.input
        self.start = 0  # blocks of the network that are frozen, whose maps of all views are then kept
        self.maps: Tensor | None = None
        self.groups = groups
        self.bank = dict(bank) if method.task_loss != "relational" else {}
        self.named = bank.labelled("by-name", student.input) if method.replay == "episodes" else None
        if views is None:
            return
        self.images = views.images
        parts = {id: F.normalize(features.float(), dim=1).half() for id, features in views.features.items()}
        ends = torch.tensor([part.shape[1] for part in parts.values()]).cumsum(0).tolist()
        self.columns = {id: slice(end - part.shape[1], end) for (id, part), end in zip(parts.items(), ends)}
        # Side by side: one product gives the sum of all models' cosines.
        self.directions = torch.cat(list(parts.values()), 1)
        self.concepts = _concepts(views, bank)
        places = {id: place for place, id in enumerate(views.features)}
        owners = [torch.tensor([places[id] for id in group]) for group in groups]
        self.rows = [torch.where(torch.isin(views.owner, owner))[0] for owner in owners]

    def freeze(self, training: Training, blocks: int) -> None:
        """Ends the training of the first blocks; what they make of the views is kept, and not made again.

        Args:
            training: where the parameters are.
            blocks: how many, in all.
        """
        for block in range(self.start, blocks):
            training.freeze(f"encoder.{block}.")
        self.maps = None  # before the next ones are made: they are large
        self.maps = self.student.maps(training.kept(), self.images, blocks)
        self.start = blocks

    def draw(self, group: int, generator: torch.Generator) -> tuple[Batch, TaskLoss]:
        """Batches of n models of a group, and the loss of one of them.

        Args:
            group: which.
            generator: of the draw.

        Returns:
            Tensors whose leading axis is the task, and the task loss.
        """
        members = self.groups[group]
        order = torch.randperm(len(members), generator=generator)[: self.method.teachers]
        teachers = [members[int(index)] for index in order]
        if self.method.task_loss == "relational":
            return self._draw_relational(group, teachers, generator), self._relational
        if self.method.task_loss == "classify":
            return self._draw_classify(teachers, generator), self._classify
        return self._draw_recovered(teachers, self.method.shot + self.method.query, generator), self._episodic

    def _draw_relational(self, group: int, teachers: list[str], generator: torch.Generator) -> Batch:
        """Images that the group's models gave, and what each teacher thinks of how alike they are."""
        rows = self.rows[group]
        drawn = rows[torch.randint(len(rows), (self.method.batch,), generator=generator)]
        directions = [self.directions[drawn, self.columns[id]].float() for id in teachers]
        images = self._seen(drawn)
        return images.expand(len(teachers), *images.shape), torch.stack([d @ d.T for d in directions])

    def _relational(self, params: Params, batch: Batch) -> Tensor:
        images, cosines = batch
        return relational_loss(self._features(params, images), cosines, self.method.temperature)

    def _relational_together(self, params: Params, batches: Batch) -> list[Tensor]:
        """All teachers judge the same images, which pass through the meta-model once."""
        features = self._features(params, batches[0][0])
        return [relational_loss(features, cosines, self.method.temperature) for cosines in batches[1]]

    def _features(self, params: Params, images: Tensor) -> Tensor:
        with half_precision():
            return widen(call(self.network, params, images, method="features", start=self.start))

    def _seen(self, rows: Tensor) -> Tensor:
        """Views as the learning part of the network takes them."""
        return self.input.prepare(to_float(self.images[rows])) if self.maps is None else self.maps[rows]

    def _draw_classify(self, teachers: list[str], generator: torch.Generator) -> Batch:
        return self._draw_recovered(teachers, self.method.batch // self.method.way, generator)

    def _classify(self, params: Params, batch: Batch) -> Tensor:
        images, labels, teacher = batch
        with half_precision():
            logits = call(self.network, params, images)
        loss = released_classify_loss if self.method.variant == "released" else classify_loss
        return loss(widen(logits)[:, : teacher.shape[1]], labels, teacher)

    def _draw_recovered(self, teachers: list[str], per_class: int, generator: torch.Generator) -> Batch:
        """Images of ``way`` classes of each teacher, class-major, their new labels, its logits over these classes."""
        tasks = [self.bank[id] for id in teachers]
        way = min(self.method.way, *(len(task.classes) for task in tasks))
        images: list[Tensor] = []
        logits: list[Tensor] = []
        for task in tasks:
            rows, chosen = draw_classes(task.labels, len(task.classes), way, per_class, generator)
            images.append(self.input.prepare(to_float(task.images[rows])))
            logits.append(task.logits[rows][:, chosen])
        labels = torch.arange(way).repeat_interleave(per_class)
        return torch.stack(images), labels.expand(len(teachers), -1), torch.stack(logits)

    def _episodic(self, params: Params, batch: Batch) -> Tensor:
        return episode_loss(self.method.learner, self.network, params, batch[0], batch[1], self.method.shot)

    def replay(self, params: Params, generator: torch.Generator) -> tuple[float, Params]:
        """One replay on the whole bank.

        Args:
            params: the meta-model's.
            generator: of the draw.

        Returns:
            The mean loss and its gradient.
        """
        relational = self.method.replay == "relational"
        batches = self._replay_images(generator) if relational else self._replay_episodes(generator)
        gradients, losses = task_gradients(self._relational if relational else self._episodic, params, batches)
        return sum(losses) / len(losses), mean_gradient(gradients)

    def _replay_images(self, generator: torch.Generator) -> Batch:
        """Images of all models and blends of them, and how alike all models and the class names say they are."""
        drawn = torch.randint(len(self.images), (self.method.replay_batch,), generator=generator)
        directions, concepts = self.directions[drawn].float(), self.concepts[drawn]
        cosines = directions @ directions.T / len(self.columns)
        cosines[(concepts == concepts.unsqueeze(1)) & (concepts >= 0)] += self.method.names
        return self._seen(drawn).unsqueeze(0), cosines.unsqueeze(0)

    def _replay_episodes(self, generator: torch.Generator) -> Batch:
        """Episodes whose classes mix models; one name is one class."""
        assert self.named is not None
        method = self.method
        per_class = method.shot + method.query
        return draw_episodes(self.named, self.input, method.way, per_class, method.replay_tasks, generator)


def _concepts(views: Views, bank: TaskBank) -> Tensor:
    """A number for the class name of each view, the same in all models; -1 for blends."""
    names = sorted({name for id in views.features for name in bank[id].classes})
    concepts = torch.full_like(views.labels, -1)
    for place, id in enumerate(views.features):
        numbers = torch.tensor([names.index(name) for name in bank[id].classes])
        rows = (views.owner == place) & (views.labels >= 0)
        concepts[rows] = numbers[views.labels[rows]]
    return concepts
