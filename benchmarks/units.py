"""How long does each costly unit take, in straightforward code and in the product? Same sizes, same mathematics.

    python benchmarks/units.py --out benchmarks/results/units.json

Two worker processes, one for ``benchmarks/reference.py`` and one for the functions of ``metapool`` as the product calls
them, take turns (A B A B …), one busy at a time: each has its own memory settings, and a slow minute of the machine
hits both. Before a unit is timed, both sides answer once from the same weights, inputs and random numbers, and the
difference of the answers is reported; then they warm up. Where product and reference could be fed unequally, the
reference is favoured: its images are prepared before the clock starts, the product draws and prepares its own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from metapool.bank import RecoveredTask, TaskBank
from metapool.base import store as product_store
from metapool.base.functional import half_precision, in_chunks, params_of, running_statistics
from metapool.base.images import InputSpec, LabelledImages, to_bytes, to_float
from metapool.base.networks import Network, NetworkSpec, build
from metapool.base.store import generator_for
from metapool.embed import ProbeSettings, fisher_diagonal, probe_loss
from metapool.episodes import Episodes, draw_classes, sample_episodes
from metapool.evaluate import evaluate
from metapool.gradients import implicit_step
from metapool.interface.machine import processor
from metapool.learners import MAML, AnyLearner, ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.tgr import TGR
from metapool.methods.tgr.tasks import Tasks
from metapool.pool import PretrainedModel
from metapool.recover import Generator, GeneratorRecovery, Inversion
from metapool.student import Student
from metapool.training import Training
from metapool.views import look

SEED = 0
Outputs = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of all units; the defaults are those of the paper, as far as it has them."""

    channels: int = 3
    side: int = 32
    width: int = 32
    """Of every Conv4: teachers, probe, meta-model."""
    way: int = 5
    """Classes of a model, and of an episode."""
    per_class: int = 30
    """Recovered images of a class."""
    code: int = 256
    ngf: int = 64
    pixels: int = 2
    """Largest shift in recovery."""
    teachers: int = 4
    alpha: float = 1e-3
    episodes: int = 16
    """Of a MAML step."""
    shot: int = 1
    query: int = 15
    inner_steps: int = 5
    test_steps: int = 10
    bank_images: int = 1024
    """That a teacher looks at."""
    test_classes: int = 20
    test_per_class: int = 100
    protonet_episodes: tuple[int, int] = (20, 600)
    """That the reference and that the product evaluate. The product's cost per episode falls with their number, since
    it encodes every image once: 600 is what a run evaluates. The reference's does not."""
    maml_episodes: tuple[int, int] = (10, 60)
    """The same of MAML."""


SMALL = Sizes(
    side=16, width=4, per_class=16, code=8, ngf=4, teachers=2, episodes=2, query=3, inner_steps=2, test_steps=2,
    bank_images=40, test_classes=6, test_per_class=20, protonet_episodes=(2, 4), maml_episodes=(2, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One side of a unit, ready to run.

    Attributes:
        output: the answer from the initial state, by name, for comparison.
        run: what is timed; may move the state on, as training does.
        items: units that one run does.
    """

    output: Callable[[], dict[str, Tensor]]
    run: Callable[[], object]
    items: int = 1


class World:
    """Inputs of all units, the same bits in both workers: fixed seeds, equal numbers of threads.

    Args:
        sizes: of everything.
        folder: an empty folder, for a bank.
    """

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes = sizes
        self.folder = folder
        count = sizes.channels
        self.input = InputSpec(
            channels=count, height=sizes.side, width=sizes.side, mean=(0.5,) * count, std=(0.25,) * count
        )
        self.spec = NetworkSpec(
            architecture="conv4",
            width=sizes.width,
            classes=sizes.way,
            channels=count,
            height=sizes.side,
            image_width=sizes.side,
        )
        self.method = TGR(
            task_loss="classify",
            replay="episodes",
            learner=self.maml,
            teachers=sizes.teachers,
            alpha=sizes.alpha,
            groups=1,
            width=sizes.width,
            way=sizes.way,
            shot=sizes.shot,
            query=sizes.query,
            batch=sizes.way * sizes.per_class,
            replay_tasks=sizes.episodes,
            learning_rate=1e-3,
        )

    @property
    def maml(self) -> MAML:
        """Learner of training and of one of the two evaluations."""
        return MAML(inner_steps=self.sizes.inner_steps, test_steps=self.sizes.test_steps)

    @cached_property
    def labels(self) -> Tensor:
        """Of one model's images, int64 [N], class-major."""
        return torch.arange(self.sizes.way).repeat_interleave(self.sizes.per_class)

    def images(self, name: str, count: int) -> Tensor:
        """Blurred noise, uint8 [count, C, H, W]: its kind changes no cost."""
        coarse = torch.rand(count, self.sizes.channels, 6, 6, generator=generator_for(SEED, "bench", "images", name))
        return to_bytes(F.interpolate(coarse, (self.sizes.side,) * 2, mode="bilinear"))

    def network(self, name: str) -> Network:
        """An untrained Conv4 with running statistics of images."""
        network = build(self.spec, generator_for(SEED, "bench", "network", name))
        params = reference.leaves_of(network)
        prepared = self.input.prepare(to_float(self.images("statistics", 64)))
        network.load_state_dict({**network.state_dict(), **running_statistics(network, params, prepared)})
        return network.eval()

    def teacher(self, id: str) -> PretrainedModel:
        """A model of the pool, as metapool has it."""
        return PretrainedModel(id, self.network(id), self.input, [f"{id}-{k}" for k in range(self.sizes.way)])

    def plain(self, network: Network) -> reference.Conv4:
        """The reference's network with the same weights, contiguous."""
        sizes = self.sizes
        made = reference.Conv4(sizes.channels, sizes.width, sizes.way, (sizes.side, sizes.side))
        made.load_state_dict({name: value.contiguous() for name, value in network.state_dict().items()})
        return made.requires_grad_(False)

    def normalised(self, images: Tensor) -> Tensor:
        """What networks see of stored images, for the reference."""
        return reference.normalise(images.float() / 255, self.input.mean, self.input.std)

    @cached_property
    def ids(self) -> list[str]:
        """Of the teachers."""
        return [f"teacher-{number}" for number in range(self.sizes.teachers)]

    @cached_property
    def bank(self) -> TaskBank:
        """One recovered task of every teacher, with its answers."""
        for id in self.ids:
            model, images = self.teacher(id), self.images(id, len(self.labels))
            logits = in_chunks(model, to_float(images))
            (self.folder / id).mkdir()
            RecoveredTask(images, self.labels, logits, model.classes, {}).save(self.folder / id)
        return TaskBank({id: self.folder / id for id in self.ids})

    def student(self, learner: AnyLearner) -> Student:
        """The meta-model, untrained."""
        return Student(self.sizes.width, self.sizes.way, learner, self.input, self.images("student", 256), SEED)

    @cached_property
    def test(self) -> LabelledImages:
        """Images of classes to evaluate on."""
        classes, count = self.sizes.test_classes, self.sizes.test_per_class
        labels = torch.arange(classes).repeat_interleave(count)
        return LabelledImages(self.images("test", len(labels)), labels, tuple(f"test-{k}" for k in range(classes)))

    def test_episodes(self, count: int) -> Episodes:
        """The first ``count`` episodes."""
        return sample_episodes(self.test, self.sizes.way, self.sizes.shot, self.sizes.query, count, SEED)

    @property
    def draw(self) -> torch.Generator:
        """Of what a step draws."""
        return generator_for(SEED, "bench", "draw")


def _same(run: Callable[[], dict[str, Tensor]], items: int = 1) -> Piece:
    """A piece without a state: what is timed is what is compared."""
    return Piece(run, run, items)


def _grouped(group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are one vector when they are compared."""
    return {f"{group} {name}": value for name, value in tensors.items()}


# One recovery step: generator, shift, loss of the teacher, backward, Adam.


def recovery_reference(world: World) -> Piece:
    sizes = world.sizes
    painter, codes = _painter(world)
    plain = reference.Painter(sizes.code, sizes.ngf, sizes.channels, (sizes.side, sizes.side))
    plain.load_state_dict({name: value.contiguous() for name, value in painter.state_dict().items()})
    teacher = world.plain(world.network("teacher-0"))
    state = reference.Recovery(
        teacher, plain.train(), codes, world.labels, world.input.mean, world.input.std, sizes.pixels
    )
    generator = world.draw

    def output() -> dict[str, Tensor]:
        images, loss = state.gradient(world.draw)
        return _gradients(state.codes, plain) | {"images": images, "loss": torch.tensor(loss)}

    return Piece(output, lambda: state.step(generator))


def recovery_product(world: World) -> Piece:
    settings = _recovery(world)
    inversion = Inversion(settings, world.teacher("teacher-0"), generator_for(SEED, "bench", "painter"))
    names = [name for name, _ in _painter(world)[0].named_parameters()]

    def output() -> dict[str, Tensor]:
        inversion.generator = world.draw
        loss = inversion.gradient()  # the lowest so far, so its images are the best
        found = dict(zip([*names, "codes"], (value.grad for value in inversion.unknowns)))
        gradients = _grouped("gradient", {name: value for name, value in found.items() if value is not None})
        return gradients | {"images": inversion.best, "loss": torch.tensor(loss)}

    return Piece(output, inversion.step)


def _recovery(world: World) -> GeneratorRecovery:
    sizes = world.sizes
    return GeneratorRecovery(
        per_class=sizes.per_class, steps=200, learning_rate=1e-3, code=sizes.code, width=sizes.ngf, shift=sizes.pixels
    )


def _painter(world: World) -> tuple[Generator, Tensor]:
    """The generator and codes that the product's recovery starts from."""
    sizes, generator = world.sizes, generator_for(SEED, "bench", "painter")
    painter = Generator(sizes.code, sizes.ngf, world.input).initialise(generator)
    return painter, torch.randn(len(world.labels), sizes.code, generator=generator)


def _gradients(codes: Tensor, painter: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in [("codes", codes), *painter.named_parameters()]}
    return _grouped("gradient", {name: value for name, value in found.items() if value is not None})


# What one teacher says of many images.


def teacher_reference(world: World) -> Piece:
    teacher = world.plain(world.network("teacher-0"))
    images = world.normalised(world.images("views", world.sizes.bank_images))

    def run() -> dict[str, Tensor]:
        features, logits = reference.teacher_outputs(teacher, images)
        return {"features": features, "logits": logits}

    return _same(run, len(images))


def teacher_product(world: World) -> Piece:
    model = world.teacher("teacher-0")
    images = world.images("views", world.sizes.bank_images)

    def run() -> dict[str, Tensor]:
        features, logits = look(model, images)
        return {"features": features, "logits": logits}

    return _same(run, len(images))


# The task embedding of one model, and, as a yardstick, one training step of the same network on the same images.


def fisher_reference(world: World) -> Piece:
    network = world.plain(world.network("probe"))
    images = world.normalised(world.images("task", len(world.labels)))
    params = reference.leaves_of(network)
    return _same(lambda: _grouped("fisher", reference.fisher(network, params, images)))


def fisher_product(world: World) -> Piece:
    network = world.network("probe")
    images = world.input.prepare(to_float(world.images("task", len(world.labels))))
    params = {name: value.detach() for name, value in network.named_parameters()}
    return _same(lambda: _grouped("fisher", fisher_diagonal(network, params, images)))


def batch_gradient_reference(world: World) -> Piece:
    network = world.plain(world.network("probe"))
    images = world.normalised(world.images("task", len(world.labels)))
    params = reference.leaves_of(network)
    optimizer = torch.optim.Adam(params.values(), 3e-3)

    def run() -> None:
        for value, gradient in zip(
            params.values(), reference.batch_gradient(network, params, images, world.labels).values()
        ):
            value.grad = gradient
        optimizer.step()

    return Piece(lambda: _grouped("gradient", reference.batch_gradient(network, params, images, world.labels)), run)


def batch_gradient_product(world: World) -> Piece:
    network = world.network("probe").to(memory_format=torch.channels_last)
    images = world.input.prepare(to_float(world.images("task", len(world.labels))))
    params = params_of(network)
    optimizer = torch.optim.Adam(params.values(), 3e-3)

    def gradient() -> dict[str, Tensor]:
        optimizer.zero_grad()
        probe_loss(network, params, images, world.labels).backward()
        return {name: value.grad for name, value in params.items() if value.grad is not None}

    def run() -> None:
        gradient()
        optimizer.step()

    return Piece(lambda: _grouped("gradient", gradient()), run)


# One TGR step, and one step of its replay.


def tgr_reference(world: World) -> Piece:
    sizes, method = world.sizes, world.method
    initial = world.student(world.maml)
    network = world.plain(initial.network)
    params = {name: value.detach().contiguous().requires_grad_() for name, value in initial.initial().items()}
    optimizer = torch.optim.Adam(params.values(), method.learning_rate)
    teachers = {id: world.plain(world.network(id)) for id in world.ids}
    # The product's own draw (Tasks.draw), number for number: teachers, the order of their classes, images.
    generator = world.draw
    order = [world.ids[int(i)] for i in torch.randperm(len(world.ids), generator=generator)]
    drawn: list[tuple[reference.Conv4, Tensor, Tensor]] = []
    for id in order:
        task = world.bank[id]
        rows, chosen = draw_classes(task.labels, sizes.way, sizes.way, sizes.per_class, generator)
        drawn.append((teachers[id], world.normalised(task.images[rows]), chosen))

    def direction() -> dict[str, Tensor]:
        tasks: list[tuple[Tensor, Tensor, Tensor]] = []
        for teacher, images, chosen in drawn:
            tasks.append((images, world.labels, reference.teacher_outputs(teacher, images)[1][:, chosen]))
        return reference.implicit_direction(network, params, tasks, sizes.alpha)

    return Piece(lambda: _grouped("direction", direction()), lambda: _descend(optimizer, params, direction()))


def tgr_product(world: World) -> Piece:
    tasks, training = _meta_training(world)
    generator = world.draw

    def direction(generator: torch.Generator) -> dict[str, Tensor]:
        batches, task_loss = tasks.draw(0, generator)
        return implicit_step(task_loss, training.params, batches, world.method.alpha, tasks.together)[0]

    return Piece(lambda: _grouped("direction", direction(world.draw)), lambda: training.descend(direction(generator)))


def maml_reference(world: World) -> Piece:
    sizes, method, learner = world.sizes, world.method, world.maml
    initial = world.student(learner)
    network = world.plain(initial.network)
    params = {name: value.detach().contiguous().requires_grad_() for name, value in initial.initial().items()}
    optimizer = torch.optim.Adam(params.values(), method.learning_rate)
    named = world.bank.labelled("by-name", world.input)
    generator, per_class = world.draw, sizes.shot + sizes.query
    labels = torch.arange(sizes.way).repeat_interleave(per_class)
    in_support = torch.arange(len(labels)) % per_class < sizes.shot
    episodes: list[reference.Episode] = []
    for _ in range(sizes.episodes):
        rows, _chosen = draw_classes(named.labels, len(named.classes), sizes.way, per_class, generator)
        images = world.normalised(named.images[rows])
        episodes.append((images[in_support], labels[in_support], images[~in_support], labels[~in_support]))

    def gradient() -> tuple[dict[str, Tensor], float]:
        return reference.maml_gradient(network, params, episodes, learner.inner_steps, learner.inner_rate)

    def output() -> dict[str, Tensor]:
        found, loss = gradient()
        return _grouped("gradient", found) | {"loss": torch.tensor(loss)}

    return Piece(output, lambda: _descend(optimizer, params, gradient()[0]))


def maml_product(world: World) -> Piece:
    tasks, training = _meta_training(world)
    generator = world.draw

    def output() -> dict[str, Tensor]:
        loss, gradient = tasks.replay(training.params, world.draw)
        return _grouped("gradient", gradient) | {"loss": torch.tensor(loss)}

    return Piece(output, lambda: training.descend(tasks.replay(training.params, generator)[1]))


def _meta_training(world: World) -> tuple[Tasks, Training]:
    student = world.student(world.maml)
    tasks = Tasks(world.method, student, world.bank, [world.ids], None)
    return tasks, Training(student.initial(), 100_000, world.method.learning_rate, world.method.average)


def _descend(optimizer: torch.optim.Optimizer, params: dict[str, Tensor], direction: dict[str, Tensor]) -> None:
    for name, value in params.items():
        value.grad = direction[name]
    optimizer.step()


# Evaluation, per episode.


def protonet_reference(world: World) -> Piece:
    model = _meta_model(world, ProtoNet(normalise=True))
    network = world.plain(model.network)
    return _evaluation(world, world.sizes.protonet_episodes[0], lambda *e: reference.protonet_logits(network, *e))


def protonet_product(world: World) -> Piece:
    return _evaluation_of(world, ProtoNet(normalise=True), world.sizes.protonet_episodes)


def maml_evaluation_reference(world: World) -> Piece:
    learner = world.maml
    network = world.plain(_meta_model(world, learner).network)
    params = reference.leaves_of(network)

    def logits(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        steps, rate = learner.test_steps, learner.inner_rate
        return reference.maml_logits(network, params, support, labels, query, steps, rate)

    return _evaluation(world, world.sizes.maml_episodes[0], logits)


def maml_evaluation_product(world: World) -> Piece:
    return _evaluation_of(world, world.maml, world.sizes.maml_episodes)


def _meta_model(world: World, learner: AnyLearner) -> MetaModel:
    student = world.student(learner)
    return student.model({name: value.detach() for name, value in student.initial().items()})


def _evaluation(world: World, count: int, logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Piece:
    """The reference's loop: the images of each episode pass the network anew."""
    images, episodes = world.normalised(world.test.images), world.test_episodes(count)

    def run() -> dict[str, Tensor]:
        found, accuracies = [], []
        for support, query in zip(episodes.support, episodes.query):
            found.append(logits(images[support.flatten()], episodes.support_labels, images[query.flatten()]))
            accuracies.append((found[-1].argmax(1) == episodes.query_labels).double().mean())
        return {"logits": torch.stack(found), "accuracies": torch.stack(accuracies)}

    return _same(run, count)


def _evaluation_of(world: World, learner: AnyLearner, counts: tuple[int, int]) -> Piece:
    """``evaluate`` as a run calls it; compared are the episodes that the reference has."""
    model, few, many = _meta_model(world, learner), world.test_episodes(counts[0]), world.test_episodes(counts[1])

    def output() -> dict[str, Tensor]:
        images, labels = to_float(world.test.images), few.support_labels
        episodes = zip(few.support, few.query)
        found = [
            model.logits(images[support.flatten()], labels, images[query.flatten()]) for support, query in episodes
        ]
        return {
            "logits": torch.stack(found),
            "accuracies": torch.from_numpy(evaluate(model, world.test, few).accuracies),
        }

    return Piece(output, lambda: evaluate(model, world.test, many), counts[1])


@dataclass(frozen=True)
class Unit:
    """A unit of work: two ways to do it, and what is known of it."""

    reference: Callable[[World], Piece]
    product: Callable[[World], Piece]
    per: str
    """What one time is of."""
    compared: str
    """What ``max_abs_difference`` is of."""
    goal: float | None
    """Ratio that issue 9 asks for."""
    sizes: tuple[str, ...]
    """Fields of :class:`Sizes` that it depends on, beyond the network and its input."""
    remark: str = ""


UNITS: dict[str, Unit] = {
    "recovery-step": Unit(
        recovery_reference,
        recovery_product,
        "step",
        "first step: images, loss, gradients of codes and generator",
        5,
        ("way", "per_class", "code", "ngf", "pixels"),
    ),
    "teacher-outputs": Unit(
        teacher_reference,
        teacher_product,
        "image",
        "features and logits of all images (the product keeps float16)",
        10,
        ("bank_images",),
        "reference in batches of 512",
    ),
    "fisher": Unit(
        fisher_reference,
        fisher_product,
        "model",
        "Fisher diagonal of all parameters",
        3,
        ("way", "per_class"),
        f"probe: a Conv4 with a head for the task; the product trains one of width {ProbeSettings().width}",
    ),
    "batch-gradient": Unit(
        batch_gradient_reference,
        batch_gradient_product,
        "step",
        "gradient of the mean cross-entropy",
        None,
        ("way", "per_class"),
        "a training step of the probe, the yardstick of the unit fisher",
    ),
    "tgr-step": Unit(
        tgr_reference,
        tgr_product,
        "step",
        "direction of the first step",
        8,
        ("way", "per_class", "teachers", "alpha"),
        "task loss classify; the reference runs each teacher once in the step, the product has its logits in the bank",
    ),
    "maml-step": Unit(
        maml_reference,
        maml_product,
        "step",
        "gradient and loss of the first step",
        4,
        ("way", "shot", "query", "inner_steps", "episodes"),
        "second order",
    ),
    "evaluation-protonet": Unit(
        protonet_reference,
        protonet_product,
        "episode",
        "logits and accuracies of the reference's episodes",
        50,
        ("way", "shot", "query", "test_classes", "test_per_class", "protonet_episodes"),
        "the product encodes all images once, then answers 600 episodes; the reference's cost hangs on no number",
    ),
    "evaluation-maml": Unit(
        maml_evaluation_reference,
        maml_evaluation_product,
        "episode",
        "logits and accuracies of the reference's episodes",
        8,
        ("way", "shot", "query", "test_steps", "test_classes", "test_per_class", "maml_episodes"),
    ),
}


def serve(side: str, sizes: Sizes, threads: int, connection: "Connection[Any, Any]") -> None:
    """A worker: prepares units and times them, one message at a time.

    Args:
        side: ``"reference"`` or ``"product"``.
        sizes: of the units.
        threads: of torch.
        connection: takes ``("prepare", name)``, answered with outputs; ``("time", "")``, with milliseconds; ``("stop",
            "")``. An exception is answered as its text.
    """
    torch.set_num_threads(threads)
    if side == "product" and hasattr(product_store, "keep_memory"):
        product_store.keep_memory()
    piece: Piece | None = None
    while True:
        order, name = connection.recv()
        if order == "stop":
            return
        try:
            if order == "prepare":
                piece = None  # frees what the last unit held
                with tempfile.TemporaryDirectory() as folder:
                    piece = getattr(UNITS[name], side)(World(sizes, Path(folder)))
                    answers = {key: value.detach().double().numpy() for key, value in piece.output().items()}
                for _ in range(2):
                    piece.run()
                connection.send(answers)
            else:
                assert piece is not None
                started = time.perf_counter()
                piece.run()
                connection.send(1000 * (time.perf_counter() - started) / piece.items)
        except Exception:
            connection.send(traceback.format_exc())


class Worker:
    """A process that does one side of the units.

    Args:
        side: which.
        sizes: of the units.
        threads: of torch.
    """

    def __init__(self, side: str, sizes: Sizes, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.side = side
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(side, sizes, threads, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, order: str, name: str = "") -> Any:
        """Sends a message and waits for the answer.

        Args:
            order: as in :func:`serve`.
            name: of a unit.

        Returns:
            The answer.

        Raises:
            RuntimeError: the worker failed; with its traceback.
        """
        self.connection.send((order, name))
        answer = self.connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.side} {name}: {answer}")
        return answer

    def stop(self) -> None:
        """Ends the process."""
        self.connection.send(("stop", ""))
        self.process.join()


def compare(one: Outputs, other: Outputs) -> dict[str, Any]:
    """How far two answers are apart.

    Args:
        one: the reference's.
        other: the product's, of the same names and shapes.

    Returns:
        ``max_abs_difference`` and the largest value, over all; ``relative_difference``, in Euclidean norm, by group:
        all tensors whose names have the same first word. A tensor alone says little: a bias before a batch norm has a
        gradient of pure rounding.

    Raises:
        RuntimeError: other names or shapes.
    """
    if {key: value.shape for key, value in one.items()} != {key: value.shape for key, value in other.items()}:
        raise RuntimeError(f"the two sides answer different things: {sorted(one)} and {sorted(other)}")
    groups: dict[str, list[str]] = {}
    for key in one:
        groups.setdefault(key.split()[0], []).append(key)
    relative: dict[str, float] = {}
    for group, keys in groups.items():
        wanted, found = (np.concatenate([side[key].ravel() for key in keys]) for side in (one, other))
        relative[group] = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return {
        "max_abs_difference": max(float(np.abs(other[key] - value).max()) for key, value in one.items()),
        "max_abs_reference": max(float(np.abs(value).max()) for value in one.values()),
        "relative_difference": relative,
    }


def measure(name: str, workers: tuple[Worker, Worker], repeats: int, sizes: Sizes) -> dict[str, Any]:
    """Times one unit on both sides in turn.

    Args:
        name: of the unit.
        workers: reference and product.
        repeats: times per side.
        sizes: of the units.

    Returns:
        The record of the result file.
    """
    unit = UNITS[name]
    outputs = [worker.ask("prepare", name) for worker in workers]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for worker, found in zip(workers, times):
            time.sleep(0.02)  # until the other's idle threads have stopped spinning
            found.append(worker.ask("time"))
    record: dict[str, Any] = {}
    for side, found in zip(("reference", "product"), times):
        record[f"{side}_ms"] = statistics.median(found)
        record[f"{side}_quartiles_ms"] = [float(q) for q in np.quantile(found, (0.25, 0.75))]
    ratios = [one / other for one, other in zip(*times)]
    record["ratio"] = record["reference_ms"] / record["product_ms"]
    record["ratio_quartiles"] = [float(q) for q in np.quantile(ratios, (0.25, 0.75))]
    every = asdict(sizes)
    return record | compare(*outputs) | {
        "compared": unit.compared,
        "per": unit.per,
        "goal": unit.goal,
        "repeats": repeats,
        "sizes": {key: every[key] for key in ("channels", "side", "width", *unit.sizes)},
        "remark": unit.remark,
    }  # fmt: skip


def machine(threads: int) -> dict[str, Any]:
    """What the times were taken on.

    Args:
        threads: of torch.

    Returns:
        Processor, cores, versions, and the product's choices that hang on them.
    """
    return {
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "half_precision": _casts(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "keep_memory": hasattr(product_store, "keep_memory"),
    }


def _casts() -> bool:
    with half_precision():
        return torch.is_autocast_enabled("cpu")


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table.

    Args:
        result: content of the result file.

    Returns:
        Markdown.
    """
    lines = [
        "| unit | per | reference ms | product ms | ratio | goal | largest difference | relative |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["units"].items():
        times = [
            f"{row[f'{side}_ms']:.3g} ({row[f'{side}_quartiles_ms'][0]:.3g}–{row[f'{side}_quartiles_ms'][1]:.3g})"
            for side in ("reference", "product")
        ]
        goal = f"{row['goal']:g}×" if row["goal"] else ""
        differences = [f"{row['max_abs_difference']:.1e} of {row['max_abs_reference']:.2g}"]
        differences += [", ".join(f"{group} {value:.0e}" for group, value in row["relative_difference"].items())]
        lines.append("| " + " | ".join([name, row["per"], *times, f"{row['ratio']:.1f}×", goal, *differences]) + " |")
    if "product_to_batch_gradient" in (row := result["units"].get("fisher", {})):
        share = row["product_to_batch_gradient"]
        lines += ["", f"Fisher embedding against a training step of its probe, both the product's: {share:.2f} (≤ 3)."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Times the units and writes one JSON file.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="times per unit and side")
    parser.add_argument("--only", nargs="+", default=list(UNITS), choices=list(UNITS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each worker")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/units.json"))
    options = parser.parse_args(arguments)
    sizes = SMALL if options.small else Sizes()
    workers = (Worker("reference", sizes, options.threads), Worker("product", sizes, options.threads))
    units: dict[str, dict[str, Any]] = {}
    try:
        for name in options.only:
            units[name] = measure(name, workers, options.repeats, sizes)
            row = units[name]
            print(f"{name}: {row['reference_ms']:.3g} ms, {row['product_ms']:.3g} ms", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.stop()
    if {"fisher", "batch-gradient"} <= units.keys():
        share = units["fisher"]["product_ms"] / units["batch-gradient"]["product_ms"]
        units["fisher"]["product_to_batch_gradient"] = share
    given = sys.argv[1:] if arguments is None else arguments
    result = {
        "units": units,
        "machine": machine(options.threads),
        "command": " ".join(["python benchmarks/units.py", *given]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(options.out)
    print(table(result))


if __name__ == "__main__":
    main()
