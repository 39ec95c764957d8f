"""The episodes of a LoRA Recycle step, and the transformer with the meta-LoRA that answers them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.bank import RecoveredTask, TaskBank
from metapool.base.errors import MetapoolError
from metapool.base.functional import Params, call, half_precision, in_chunks, widen
from metapool.base.images import to_float
from metapool.base.networks import build
from metapool.base.store import generator_for
from metapool.base.transformer import class_attention, only_patches, own_and_shared
from metapool.episodes import draw_classes
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.pool import ModelPool, PretrainedModel
from metapool.student import Trainee
from metapool.task_losses import distillation_loss


@dataclass(frozen=True)
class Episode:
    """Images of some classes, class-major, as many of each.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        kept: int64 [N, k], the patches that are seen; all when there are none.
        teacher: float [N, K], the logits of the images' own model over these classes; none where there are several.
    """

    images: Tensor
    labels: Tensor
    kept: Tensor | None
    teacher: Tensor | None


class Draws:
    """Draws the episodes of a step.

    Args:
        pool: the teachers; opened one at a time, and only to ask which patches count.
        bank: recovered tasks.
        way: classes of an episode, all where there are fewer.
        per_class: images of each.
        interpolate: probability that an episode mixes classes of several models.
        keep_tokens: share of the patches that are seen.
    """

    def __init__(
        self, pool: ModelPool, bank: TaskBank, way: int, per_class: int, interpolate: float, keep_tokens: float
    ) -> None:
        self.way, self.per_class, self.interpolate = way, per_class, interpolate
        self.named = bank.labelled("by-name", pool.input)
        self.tasks = list(bank.values())
        self.kept: Tensor | None = None
        if keep_tokens < 1:
            self.kept = torch.cat([important_patches(pool.get(id), task, keep_tokens) for id, task in bank.items()])

    def draw(self, generator: torch.Generator) -> Episode:
        """One episode, of one model or across models.

        Args:
            generator: of the draw.

        Returns:
            The episode.
        """
        teacher: Tensor | None = None
        if torch.rand((), generator=generator) < self.interpolate:
            classes = len(self.named.classes)
            rows, chosen = draw_classes(self.named.labels, classes, self.way, self.per_class, generator)
        else:
            number = int(torch.randint(len(self.tasks), (), generator=generator))
            task = self.tasks[number]
            rows, chosen = draw_classes(task.labels, len(task.classes), self.way, self.per_class, generator)
            teacher = task.logits[rows][:, chosen]
            rows = rows + sum(len(other.labels) for other in self.tasks[:number])  # all models' images lie in a row
        labels = torch.arange(len(chosen)).repeat_interleave(self.per_class)
        kept = None if self.kept is None else self.kept[rows]
        return Episode(self.named.images[rows], labels, kept, teacher)


class MetaLoRA(Trainee):
    """The pool's transformer with an adapter of its own, the only thing about it that learns.

    Args:
        pool: adapters of one transformer, each with that transformer in it; none of these is touched.
        learner: how it answers an episode.
        way: outputs of the head, which ProtoNet leaves alone.
        seed: of the initial weights.
    """

    def __init__(self, pool: ModelPool, learner: ProtoNet, way: int, seed: int) -> None:
        check_backbone(pool)
        first = pool.manifest.models[0]
        self.learner, self.seed, self.input = learner, seed, first.input
        self.spec = first.network.model_copy(update={"classes": way})
        self.network = build(self.spec, generator_for(seed, "lora-recycle", "initialise"))
        _, backbone = own_and_shared(pool[0].network.state_dict())
        self.network.load_state_dict(backbone, strict=False)
        self.network.requires_grad_(False)
        self._start = {n: w.detach().clone() for n, w in self.network.state_dict().items() if "lora_" in n}

    def initial(self) -> Params:
        """The meta-LoRA at first: it adds nothing.

        Returns:
            Leaves that require gradients.
        """
        return {name: value.clone().requires_grad_() for name, value in self._start.items()}

    def model(self, params: Params, history: Sequence[Mapping[str, Any]] = ()) -> MetaModel:
        """A few-shot model with these adapters.

        Args:
            params: detached parameters.
            history: the training record to keep with it.

        Returns:
            The model; it shares the network, so the next call changes it.
        """
        self.network.load_state_dict(params, strict=False)
        return MetaModel(self.network, self.spec, self.learner, self.input, history)

    def losses(self, params: Params, episodes: Sequence[Episode], shot: int) -> list[Tensor]:
        """Equation 3 or 4 of every episode; no image's features depend on another, so that all pass together.

        Args:
            params: the meta-LoRA.
            episodes: of any sizes.
            shot: the first so many images of a class are its support.

        Returns:
            A scalar each.
        """
        images = self.input.prepare(to_float(torch.cat([episode.images for episode in episodes])))
        kept = None if episodes[0].kept is None else torch.cat([e.kept for e in episodes if e.kept is not None])
        with half_precision(), only_patches(kept):
            features = widen(call(self.network, params, images, method="features"))
        losses: list[Tensor] = []
        for episode, own in zip(episodes, features.split([len(episode.labels) for episode in episodes])):
            in_support = torch.arange(len(own)) % (len(own) // (int(episode.labels[-1]) + 1)) < shot
            labels, query = episode.labels, ~in_support
            logits = self.learner.classify(self.network, params, own[in_support], labels[in_support], own[query])
            if episode.teacher is None:
                losses.append(F.cross_entropy(logits, labels[query]))
            else:
                losses.append(distillation_loss(logits, episode.teacher[query]))
        return losses


def important_patches(model: PretrainedModel, task: RecoveredTask, share: float) -> Tensor:
    """The patches of its images that a teacher looks at most (equations 5 and 6).

    Args:
        model: the teacher.
        task: what was recovered from it.
        share: of the patches to keep; at least one.

    Returns:
        int64 [N, k], in ascending order.
    """

    def look(images: Tensor) -> Tensor:
        network: Any = model.network
        importance = class_attention(network.encoder[0], model.input.prepare(to_float(images)))
        return importance.topk(max(1, round(share * importance.shape[1]))).indices.sort().values

    return in_chunks(look, task.images)


def check_backbone(pool: ModelPool) -> None:
    """Refuses pools whose models are not adapters of one transformer.

    Args:
        pool: any.

    Raises:
        MetapoolError: when a model brings a network of its own, or there is none.
    """
    alone = [entry for entry in pool.manifest.models if entry.backbone is None]
    if alone or not len(pool):
        found = f"{alone[0].id!r} is a {alone[0].network.architecture} of its own" if alone else "it is empty"
        raise MetapoolError(
            f"{pool.path}: a pool of adapters on one shared backbone was expected, but {found} "
            "(metapool pool build --architectures vit-lora:48 makes one)"
        )
