"""What services tell: recovered tasks with their answers, and the student's logits once it is adapted to them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.bank import Memory, fit_bytes
from metapool.base.functional import Params, call, half_precision, widen
from metapool.base.networks import Network
from metapool.blackbox import FLOOR
from metapool.learners import AnyLearner, ProtoNet
from metapool.student import Student


def boundary_term(answers: Tensor, student: Tensor, agree: Tensor) -> Tensor:
    """Minus the L1 distance of the log-probabilities of a service and the adapted meta-model, where they agree.

    Args:
        answers: the service's probabilities, float [N, K].
        student: the meta-model's probabilities at the unperturbed images, float [N, K].
        agree: bool [N], whether both name the wanted class there.

    Returns:
        float [N].
    """
    apart = (answers.clamp(min=FLOOR).log() - student.clamp(min=FLOOR).log()).abs().sum(1)
    return -apart * agree.to(apart.dtype)


def among(answers: Tensor, chosen: Tensor) -> Tensor:
    """Probabilities given that it is one of some classes.

    Args:
        answers: float [N, K].
        chosen: int64 [way], the classes.

    Returns:
        float [N, way], rows that sum to 1.
    """
    part = answers[:, chosen].clamp(min=FLOOR)
    return part / part.sum(1, keepdim=True)


def adapted_logits(
    learner: AnyLearner, network: Network, params: Params, support: Tensor, targets: Tensor, query: Tensor
) -> Tensor:
    r"""Inner distillation: the student's logits of queries, once it is adapted to a service's answers to a support set.

    ProtoNet: class k's prototype is :math:`\sum_i p_{ik} f(x_i) / \sum_i p_{ik}`. MAML and ANIL: steps on the
    cross-entropy with p as targets. With one-hot p it is ``learner.query_logits`` with labels.

    Args:
        learner: how the network adapts.
        network: encoder and head.
        params: its parameters.
        support: float [S, C, H, W], normalised.
        targets: the service's probabilities p, float [S, K], K at most the outputs of the head.
        query: float [Q, C, H, W], normalised.

    Returns:
        float [Q, K], differentiable in ``params``.
    """
    classes = targets.shape[1]
    if not isinstance(learner, ProtoNet):
        padded = F.pad(targets, (0, len(params["head.bias"]) - classes))
        return learner.query_logits(network, params, support, padded, query)[:, :classes]
    with half_precision():
        features = widen(call(network, params, torch.cat([support, query]), method="features"))
    known, asked = features[: len(support)], features[len(support) :]
    if learner.normalise:
        known = F.normalize(known, dim=1)
    prototypes = targets.T @ known / targets.sum(0).unsqueeze(1)
    return learner.classify(network, params, prototypes, torch.arange(classes), asked)


class Task(NamedTuple):
    """What one visit brought: uint8 images [N, C, H, W], class-major, and the answers to them, float [N, way]."""

    support: Tensor
    support_answers: Tensor
    query: Tensor
    query_answers: Tensor
    classes: tuple[str, ...]

    def labels(self) -> Tensor:
        """The classes that the images of either set were to show, int64 [N]."""
        return torch.arange(len(self.classes)).repeat_interleave(len(self.query) // len(self.classes))

    def agreement(self) -> float:
        """Percent of the query images that the service takes for what they were to show."""
        return 100 * (self.query_answers.argmax(1) == self.labels()).double().mean().item()


class Found:
    """All that services have told so far, newest last; the next step depends on it.

    Args:
        student: is calibrated on the memory.
        per_class: images that the memory keeps of a class.
    """

    def __init__(self, student: Student, per_class: int) -> None:
        self.student = student
        self.tasks: dict[str, Task] = {}
        self.memory = Memory(per_class)
        self.queries = 0

    def add(self, id: str, task: Task, queries: int) -> None:
        """Takes in what a visit to a model brought and cost; it replaces what the last one brought."""
        self.tasks.pop(id, None)
        self.tasks[id] = task
        for images in (task.support, task.query):
            self.memory.add(fit_bytes(images, self.student.input), task.labels(), task.classes)
        self.queries += queries
        self.student.calibrate_on(self.memory.labelled().images)

    def draw(self, count: int, fresh: bool, generator: torch.Generator) -> list[Task]:
        """Some tasks, the newest among them if it is fresh: its query set is aimed at the meta-model of this step."""
        tasks = list(self.tasks.values())
        newest = tasks[len(tasks) - fresh :]
        order = torch.randperm(len(tasks) - len(newest), generator=generator)[: count - len(newest)]
        return [*newest, *(tasks[int(place)] for place in order)]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        tasks = {id: tuple(task) for id, task in self.tasks.items()}
        return {"tasks": tasks, "memory": self.memory.state_dict(), "queries": self.queries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` left off."""
        self.tasks = {id: Task(*task) for id, task in state["tasks"].items()}
        self.memory.load_state_dict(state["memory"])
        self.queries = state["queries"]
        self.student.calibrate_on(self.memory.labelled().images)
