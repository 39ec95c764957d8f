"""How fast could this machine be, and how near to that do we come? Peaks, single layers, whole steps.

    python benchmarks/machine.py                  # writes benchmarks/results/machine.json and docs/roofline.svg
    python benchmarks/machine.py --figure-only    # draws the figure anew

First the machine: the rate of large matrix products in float32 and bfloat16, and the bandwidth of sums of tensors that
are far larger than the cache ("memory") or as large as the first map of a meta-model ("map"; a large cache holds it).

Then layers and steps, against the roof over them: no more operations a second than the matrix peak of their type, and
no more than bandwidth times **arithmetic intensity**, the floating-point operations for each byte that has to move. For
a layer these bytes are its input, weights and output, each once; backward, the gradient of the output, the input and
the weights are read and the gradients that are asked for are written. For a step they are what its operations read and
write, each operation by itself, as they run: with all of them merged into one, fewer would have to move. A product and
a sum are two operations. Operations of a step are those of convolutions and matrix products; what else is computed is
cheap to compute and dear to move.

Layers and steps run on as many threads as a worker of the product has (``--threads``, 1); ``kinds`` is where the time
of a step goes, from torch's profiler, which slows the step itself: shares, not seconds, are to be read there.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from units import machine

from metapool.base.functional import call, half_precision, widen
from metapool.base.images import InputSpec, to_bytes, to_float
from metapool.base.store import generator_for, keep_memory
from metapool.gradients import task_gradients
from metapool.interface.figures import PALETTE
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, plain_log_ticks, standalone
from metapool.interface.figures.labels import Box, Label, write_labels
from metapool.interface.recipe import load_recipe, open_pool, workers
from metapool.interface.run.files import replace_text
from metapool.methods.tgr import TGR
from metapool.pool import PretrainedModel
from metapool.recover import GeneratorRecovery, Inversion
from metapool.student import Student
from metapool.task_losses import relational_loss
from metapool.training import Training

RESULTS, FIGURE = Path("benchmarks/results/machine.json"), Path("docs/roofline.svg")
SEED = 0
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    matrix: int = 3072
    """Rows and columns of the square matrices of a product."""
    memory: int = 1 << 30
    """Bytes of each of three tensors that no cache holds; less where the machine has little memory."""
    batch: int = 128
    """Images of a layer."""
    width: int = 64
    """Channels of every block but the image's."""
    side: int = 32
    """Of an image."""
    least: int = 5
    """Times of everything that is timed, after two that do not count."""
    seconds: float = 0.25
    """Timing goes on for so long."""
    recovery_width: int | None = None
    """Instead of the main recipe's."""
    per_class: int | None = None
    """Recovered images of a class, instead of the main recipe's."""


SMALL = Sizes(
    matrix=64, memory=1 << 20, batch=8, width=8, side=16, least=1, seconds=0, recovery_width=4, per_class=2
)  # fmt: skip


def time_of(run: Callable[[], object], sizes: Sizes) -> float:
    """Median time, warm.

    Args:
        run: what is timed.
        sizes: how often.

    Returns:
        Seconds.
    """
    for _ in range(2):
        run()
    times: list[float] = []
    until = time.perf_counter() + sizes.seconds
    while len(times) < sizes.least or (time.perf_counter() < until and len(times) < 200):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# The machine.


def peaks(sizes: Sizes) -> dict[str, float]:
    """Rate of large matrix products on the threads that torch has now.

    Args:
        sizes: of the matrices.

    Returns:
        GFLOP/s by type.
    """
    found: dict[str, float] = {}
    count = sizes.matrix
    for name, type in TYPES.items():
        one, other = (torch.randn(count, count, dtype=type) for _ in range(2))
        out = torch.empty(count, count, dtype=type)
        found[name] = 2 * count**3 / time_of(partial(torch.mm, one, other, out=out), sizes) / 1e9
    return found


def bandwidth(size: int, sizes: Sizes) -> dict[str, float]:
    """Bytes that are read and written in a second, on the threads that torch has now.

    Args:
        size: bytes of a tensor.
        sizes: how often.

    Returns:
        GB/s of a copy (two tensors) and of a triad a = b + 3 c (three). What the processor fetches of a line before it
        writes it is not counted, here and everywhere.
    """
    one, other, out = (torch.ones(size // 4) for _ in range(3))
    return {
        "copy": 2 * size / time_of(lambda: out.copy_(one), sizes) / 1e9,
        "triad": 3 * size / time_of(lambda: torch.add(one, other, alpha=3, out=out), sizes) / 1e9,
    }


def memory_size(sizes: Sizes) -> int:
    """Bytes of a tensor that no cache holds, three of which take less than half of the free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(sizes.memory, free // 8)


def map_size(sizes: Sizes) -> int:
    """Bytes of the first convolution's output in float32."""
    return 4 * sizes.batch * sizes.width * sizes.side**2


@dataclass(frozen=True)
class Roof:
    """What one number of threads can do at best.

    Attributes:
        peak: GFLOP/s by type.
        gigabytes: GB/s, the best of what was measured: of cache, where maps fit into it.
    """

    peak: dict[str, float]
    gigabytes: float

    @staticmethod
    def of(result: Record) -> "Roof":
        """The roof over layers and steps.

        Args:
            result: content of the result file.

        Returns:
            The roof.
        """
        threads = str(result["settings"]["threads"])
        measured = result["bandwidth"][threads]
        return Roof(result["peak"][threads], max(max(rates.values()) for rates in measured.values()))

    def gflops(self, type: str, intensity: float) -> float:
        """The most that can be reached.

        Args:
            type: of the numbers.
            intensity: operations for each byte.

        Returns:
            GFLOP/s.
        """
        return min(self.peak[type], self.gigabytes * intensity)


# Layers.


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold, those that are expanded once."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def both_ways(
    forward: Callable[..., Tensor], images: Tensor, weights: Sequence[Tensor], sizes: Sizes
) -> dict[str, tuple[float, int]]:
    """Times a layer forward and backward.

    Args:
        forward: of the images and the weights.
        images: as the layer finds them, with or without a wish for their gradient.
        weights: leaves.
        sizes: how often.

    Returns:
        Seconds and bytes that have to move, by direction.
    """
    with torch.no_grad():
        out = forward(images, *weights)
        ahead = time_of(lambda: forward(images, *weights), sizes)
    made = forward(images, *weights)
    wanted = [one for one in (images, *weights) if one.requires_grad]
    gradient = torch.ones_like(out)
    back = time_of(lambda: torch.autograd.grad(made, wanted, gradient, retain_graph=True), sizes)
    return {
        "forward": (ahead, bytes_of([images, *weights, out])),
        "backward": (back, bytes_of([gradient, images, *weights, *wanted])),
    }


def leaf(shape: tuple[int, ...], type: torch.dtype, *, learns: bool = True) -> Tensor:
    """A random leaf, channels last where it is an image or a kernel."""
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.randn(shape).to(type).contiguous(memory_format=order).requires_grad_(learns)


def convolutions(sizes: Sizes) -> list[Record]:
    """The 3x3 convolutions of a Conv4, each by itself.

    Args:
        sizes: of images and network.

    Returns:
        One record for each layer, type and direction.
    """
    found: list[Record] = []
    for block in range(4):
        inputs, side = (1 if block == 0 else sizes.width), sizes.side >> block
        for name, type in TYPES.items():
            # Nobody wants the gradient of an image.
            images = leaf((sizes.batch, inputs, side, side), type, learns=block > 0)
            weights = [leaf((sizes.width, inputs, 3, 3), type), leaf((sizes.width,), type)]
            once = 2 * sizes.batch * side**2 * sizes.width * inputs * 9
            timed = both_ways(lambda i, w, b: F.conv2d(i, w, b, padding=1), images, weights, sizes)
            for way, (seconds, moved) in timed.items():
                operations = once * (2 if way == "backward" and block > 0 else 1)
                found.append(
                    {
                        "layer": f"{inputs}→{sizes.width} at {side}×{side}",
                        "side": side,
                        "type": name,
                        "direction": way,
                        **rates(seconds, operations, moved),
                    }
                )
    return found


def rates(seconds: float, operations: float, moved: float) -> Record:
    """What one time says.

    Args:
        seconds: that it took.
        operations: floating-point.
        moved: bytes that have to move.

    Returns:
        For a record.
    """
    return {
        "ms": 1000 * seconds,
        "gflop": operations / 1e9,
        "mb": moved / 1e6,
        "intensity": operations / moved,
        "gflops": operations / seconds / 1e9,
        "gb_per_s": moved / seconds / 1e9,
    }


def passes(sizes: Sizes) -> list[Record]:
    """What the first block does beside its convolution, each by itself: little to compute, much to move.

    Args:
        sizes: of images and network.

    Returns:
        One record for each operation, type and direction. Places of the largest, which pooling keeps for its way
        back, are not counted: they do not have to move.
    """
    found: list[Record] = []
    for name, type in TYPES.items():
        full = (sizes.batch, sizes.width, sizes.side, sizes.side)
        half = (*full[:2], sizes.side // 2, sizes.side // 2)
        scales = [leaf((sizes.width,), torch.float32) for _ in range(2)]
        normalise = lambda i, w, b: F.batch_norm(i, None, None, w, b, training=True)  # noqa: E731
        timed = {
            "batch norm": both_ways(normalise, leaf(full, type), scales, sizes),
            "max-pool": both_ways(lambda i: F.max_pool2d(i, 2), leaf(full, type), [], sizes),
            "ReLU, after it": both_ways(F.relu, leaf(half, type), [], sizes),
        }
        # The way back of pooling needs no image, only places.
        seconds, moved = timed["max-pool"]["backward"]
        timed["max-pool"]["backward"] = seconds, moved - bytes_of([leaf(full, type)])
        for operation, ways in timed.items():
            for way, (seconds, moved) in ways.items():
                record = {"ms": 1000 * seconds, "mb": moved / 1e6, "gb_per_s": moved / seconds / 1e9}
                found.append({"operation": operation, "type": name, "direction": way, **record})
    return found


# Steps.


class Moved(TorchDispatchMode):
    """Adds up what operations read and write, each by itself; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts."""
        out = func(*args, **(kwargs or {}))
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        if not view and "empty" not in str(func) and "_unsafe_view" not in str(func):
            tensors = tree_leaves((args, kwargs, out))
            self.bytes += bytes_of(one for one in tensors if isinstance(one, Tensor))
        return out


KINDS = {
    "convolution": ("conv",),
    "batch norm": ("batch_norm", "batchnorm", "normaliseandmeasure", "var_mean"),
    "pooling": ("pool",),
    "optimiser": ("optimizer.", "_fused_adam"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "mmbackward"),
    "elementwise": (
        "relu", "threshold", "aten::add", "aten::mul", "aten::sub", "aten::div", "aten::copy", "aten::_to_copy",
        "aten::clone", "aten::sigmoid", "aten::neg", "aten::exp", "aten::pow", "aten::square", "aten::lerp",
        "aten::rsqrt", "aten::sqrt", "aten::clamp", "aten::where", "aten::fill", "aten::zero", "aten::cat",
        "aten::roll", "accumulategrad",
    ),
}  # fmt: skip
"""Beginnings or parts of the names of operations, in lower case. The rest is "other"."""
WHOLE = ("convolution", "batch norm", "pooling", "optimiser")
"""Kinds that own what they call, such as the copies that put a convolution's images in order."""


def kind_of(name: str) -> str:
    """Kind of an operation.

    Args:
        name: as the profiler has it.

    Returns:
        One of ``KINDS``, or ``other``.
    """
    small = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in small for part in parts)), "other")


def kinds(run: Callable[[], object]) -> dict[str, float]:
    """Where the time of something goes.

    Args:
        run: is run three times.

    Returns:
        Shares by kind of operation, most first. What Python does between operations is in none of them.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            run()
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in found.events() or ():
        line = [event]
        while line[-1].cpu_parent is not None:
            line.append(line[-1].cpu_parent)
        own = kind_of(event.name)
        outer = (kind for kind in (kind_of(one.name) for one in reversed(line)) if kind in WHOLE)
        spent[next(outer, own)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: time / whole for kind, time in sorted(spent.items(), key=lambda item: -item[1])}


def step_record(run: Callable[[], object], sizes: Sizes) -> Record:
    """Times a step and counts what it does.

    Args:
        run: one step.
        sizes: how often.

    Returns:
        For a record.
    """
    seconds = time_of(run, sizes)
    with FlopCounterMode(display=False) as operations:
        run()
    with Moved() as moved:
        run()
    return {**rates(seconds, operations.get_total_flops(), moved.bytes), "kinds": kinds(run)}


def steps(sizes: Sizes) -> list[Record]:
    """Whole steps of the main job: the student's with 0, 1 and 2 frozen blocks, and recovery's by architecture.

    Args:
        sizes: of images and networks.

    Returns:
        One record for each.
    """
    method = load_recipe("main").method
    assert isinstance(method, TGR)
    with half_precision():
        type = "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"
    pool = open_pool("icons-30")
    found: list[Record] = []
    for frozen in range(3):
        run = training_step(method, frozen, pool[0].input, sizes)
        name = f"training, {number(frozen, 'block')} frozen"
        found.append({"step": name, "images": sizes.batch, "type": type, **step_record(run, sizes)})
    recovery = method.recovery
    assert isinstance(recovery, GeneratorRecovery)
    small = {"width": sizes.recovery_width, "per_class": sizes.per_class}
    recovery = recovery.model_copy(update={key: value for key, value in small.items() if value is not None})
    first: dict[str, PretrainedModel] = {}
    for entry in pool.manifest.models:
        if entry.network.architecture not in first:
            first[entry.network.architecture] = pool.get(entry.id)
    for architecture, model in first.items():
        inversion = Inversion(recovery, model, generator_for(SEED, "machine", architecture))
        record = {"step": f"recovery of a {architecture}", "images": len(inversion.labels), "type": type}
        found.append({**record, **step_record(inversion.step, sizes)})
    return found


def training_step(method: TGR, frozen: int, input: InputSpec, sizes: Sizes) -> Callable[[], object]:
    """A step of the main job's training, as its replay has it.

    Args:
        method: temperature, learning rate and the like.
        frozen: blocks that no longer learn, whose maps are kept.
        input: of the student.
        sizes: of images and student.

    Returns:
        One step.
    """
    generator = generator_for(SEED, "machine", "training")
    input = input.model_copy(update={"height": sizes.side, "width": sizes.side})
    images = to_bytes(torch.rand(sizes.batch, *input.shape, generator=generator))
    directions = F.normalize(torch.randn(sizes.batch, 32, generator=generator), dim=1)
    cosines = (directions @ directions.T).unsqueeze(0)
    student = Student(sizes.width, method.way, method.learner, input, images, SEED)
    training = Training(student.initial(), 100_000, method.learning_rate, method.average)
    for block in range(frozen):
        training.freeze(f"encoder.{block}.")
    maps = student.maps(training.kept(), images, frozen) if frozen else None

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        with half_precision():
            features = widen(call(student.network, params, batch[0], method="features", start=frozen))
        return relational_loss(features, batch[1], method.temperature)

    def run() -> None:
        seen = input.prepare(to_float(images)) if maps is None else maps
        gradients, _ = task_gradients(loss, training.params, (seen.unsqueeze(0), cosines))
        training.descend(gradients[0])

    return run


# What is shown.


def table(result: Record) -> str:
    """The result in Markdown.

    Args:
        result: content of the result file.

    Returns:
        Tables and sentences.
    """
    settings, roof = result["settings"], Roof.of(result)
    lines = [
        "| threads | float32 GFLOP/s | bfloat16 GFLOP/s | memory, copy GB/s | triad | a map, copy GB/s | triad |",
        "|---|---|---|---|---|---|---|",
    ]
    for threads, peak in result["peak"].items():
        measured = result["bandwidth"][threads]
        cells = [f"{peak[type]:.0f}" for type in TYPES]
        cells += [f"{measured[place][kind]:.1f}" for place in ("memory", "map") for kind in ("copy", "triad")]
        lines.append(f"| {threads} | " + " | ".join(cells) + " |")
    head = ["ms", "FLOP/byte", "GFLOP/s", "of the matrix peak", "of the roof"]
    lines += [
        "",
        f"Matrices of {settings['matrix']} rows; tensors in memory of {settings['memory_mb']:.0f} MB, a map of "
        f"{settings['map_mb']:.1f} MB. All below on {number(settings['threads'], 'thread')}.",
        "",
        f"| 3×3 convolution, {settings['batch']} images | type | direction | " + " | ".join(head) + " |",
        "|---" * (3 + len(head)) + "|",
    ]
    for row in result["convolutions"]:
        lines.append(f"| {row['layer']} | {row['type']} | {row['direction']} | " + " | ".join(shares(row, roof)) + " |")
    lines += ["", "| first block | type | direction | ms | GB/s | of the bandwidth |", "|---" * 6 + "|"]
    for row in result["passes"]:
        cells = [row["operation"], row["type"], row["direction"], f"{row['ms']:.2f}", f"{row['gb_per_s']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{100 * row['gb_per_s'] / roof.gigabytes:.0f} %"]) + " |")
    lines += ["", "| step | images | " + " | ".join(head) + " |", "|---" * (2 + len(head)) + "|"]
    for row in result["steps"]:
        lines.append(f"| {row['step']} | {row['images']} | " + " | ".join(shares(row, roof)) + " |")
    names = [*KINDS, "other"]
    lines += ["", "| share of a step's time, % | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for row in result["steps"]:
        lines.append(f"| {row['step']} | " + " | ".join(f"{100 * row['kinds'][kind]:.0f}" for kind in names) + " |")
    return "\n".join(lines) + "\n"


def shares(row: Record, roof: Roof) -> list[str]:
    """Cells of a row: what was reached, and how much of what can be."""
    reached, peak = row["gflops"], roof.peak[row["type"]]
    limit = roof.gflops(row["type"], row["intensity"])
    return [
        f"{row['ms']:.2f}",
        f"{row['intensity']:.1f}",
        f"{reached:.0f}",
        f"{100 * reached / peak:.0f} %",
        f"{100 * reached / limit:.0f} %",
    ]


def number(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


COLOURS = {"float32": PALETTE[0], "bfloat16": PALETTE[1]}
WIDTH, HEIGHT = 900, 640


def figure(result: Record) -> str:
    """Arithmetic intensity against operations a second, under the roofs.

    Args:
        result: content of the result file.

    Returns:
        A whole SVG file.
    """
    threads = str(result["settings"]["threads"])
    peak, measured = result["peak"][threads], result["bandwidth"][threads]
    rows = [*result["convolutions"], *result["steps"]]
    xs, ys = [row["intensity"] for row in rows], [row["gflops"] for row in rows]
    left, right = min(xs) / 2, max(*xs, 1.5 * max(peak.values()) / min(measured["memory"].values())) * 2
    # Room at the right end for the names of the peaks.
    bottom, top = min(*ys, *peak.values()) / 2, 2 * max(*ys, *peak.values())
    title = f"Operations a second against arithmetic intensity, {number(int(threads), 'thread')}"
    with panel(WIDTH, HEIGHT, title) as (drawn, draw):
        axes = drawn.add_axes((0.085, 0.16, 0.9, 0.77))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        bare(axes, f"{title} (GFLOP/s, both logarithmic)")
        plain_log_ticks(axes.xaxis, float(np.log10(right / left)) - 1)
        plain_log_ticks(axes.yaxis, float(np.log10(top / bottom)) - 1)
        axes.set_xlabel("floating-point operations for each byte that has to move", labelpad=4)

        def pixels(x: float, y: float) -> tuple[float, float]:
            found = axes.transData.transform((x, y))
            return float(found[0]), float(found[1])

        obstacles: list[Box] = []
        for place, label, dashes in (("map", "cache: a map", (1, 0)), ("memory", "memory", (5, 3))):
            rate = max(measured[place].values())
            until = max(peak.values()) / rate
            axes.plot((left, until), (left * rate, max(peak.values())), color=MUTED, linewidth=1.4, dashes=dashes)
            for share in range(101):
                x = left * (until / left) ** (share / 100)
                px, py = pixels(x, x * rate)
                obstacles.append((px - 3, py - 3, px + 3, py + 3))
            start, end = pixels(left, left * rate), pixels(until, max(peak.values()))
            slope = (end[1] - start[1]) / (end[0] - start[0])
            low = max(left, bottom / rate)
            # Above the line of cache and below that of memory: between them there may be little room.
            px, py = pixels(low * 1.3, low * 1.3 * rate)
            x, y = axes.transData.inverted().transform((px, py + (7 if place == "map" else -7)))
            angle = {"rotation": float(np.degrees(np.arctan(slope))), "rotation_mode": "anchor"}
            side = "bottom" if place == "map" else "top"
            axes.text(x, y, f"{label} {rate:.0f} GB/s", color=MUTED, fontsize=10, ha="left", va=side, **angle)
        best = max(max(rates.values()) for rates in measured.values())
        for type, rate in peak.items():
            axes.plot((rate / best, right), (rate, rate), color=COLOURS[type], linewidth=1.6)
            y = pixels(1, rate)[1]
            obstacles.append((pixels(rate / best, rate)[0], y - 2, pixels(right, rate)[0], y + 2))
            axes.annotate(
                f"{type} matrix products {rate:.0f}", (right, rate), (-2, 4), textcoords="offset points", ha="right",
                va="bottom", fontsize=10.5, color=COLOURS[type],
            )  # fmt: skip
            obstacles.append((pixels(right, rate)[0] - 215, y, pixels(right, rate)[0], y + 18))
        labels: list[Label] = []
        for row in result["convolutions"]:
            filled = row["direction"] == "forward"
            colour = COLOURS[row["type"]]
            style = {"markerfacecolor": colour if filled else "white", "markeredgecolor": colour, "markersize": 7}
            axes.plot(row["intensity"], row["gflops"], "o", zorder=4, **style)
            x, y = pixels(row["intensity"], row["gflops"])
            labels.append(Label(f"{row['side']}²", x, y, colour))
        for row in result["steps"]:
            colour = ACCENT if row["step"].startswith("training") else INK
            axes.plot(row["intensity"], row["gflops"], "D", markersize=6.5, color=colour, zorder=5)
            x, y = pixels(row["intensity"], row["gflops"])
            name = row["step"].replace(" blocks", "").replace(" block", "").replace("recovery of a ", "recovery, ")
            labels.append(Label(name, x, y, colour))
        obstacles += [(label.x - 5, label.y - 5, label.x + 5, label.y + 5) for label in labels]
        for type, way in itertools.product(TYPES, ("forward", "backward")):
            face = COLOURS[type] if way == "forward" else "white"
            style = {"markerfacecolor": face, "markeredgecolor": COLOURS[type], "linestyle": "none"}
            axes.plot([], [], "o", label=f"3×3 convolution of S² maps, {type}, {way}", **style)
        axes.plot([], [], "D", color=ACCENT, label="step of training", linestyle="none")
        axes.plot([], [], "D", color=INK, label="step of recovery", linestyle="none")
        drawn.legend(
            *axes.get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=10, labelcolor=INK, frameon=False,
            handlelength=1,
        )  # fmt: skip
        write_labels(axes, labels, obstacles)
        text = draw()
    return standalone(text)


def rounded(value: Any) -> Any:
    """Numbers with five significant digits: more would be noise in a committed file."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def measure(sizes: Sizes, threads: int, most: int) -> Record:
    """Everything that is measured.

    Args:
        sizes: how much is done.
        threads: of layers and steps.
        most: threads of the machine.

    Returns:
        Content of the result file, but for the command.
    """
    keep_memory()
    torch.manual_seed(SEED)
    memory = memory_size(sizes)
    result: Record = {
        "machine": machine(threads),
        "settings": {
            **asdict(sizes),
            "threads": threads,
            "memory_mb": memory / 1e6,
            "map_mb": map_size(sizes) / 1e6,
            "memory_format": "channels_last",
        },
        "peak": {},
        "bandwidth": {},
    }
    for count in sorted({1, threads, most}):
        torch.set_num_threads(count)
        result["peak"][str(count)] = peaks(sizes)
        result["bandwidth"][str(count)] = {
            "memory": bandwidth(memory, sizes),
            "map": bandwidth(map_size(sizes), sizes),
        }
    torch.set_num_threads(threads)
    parts: dict[Literal["convolutions", "passes", "steps"], Callable[[Sizes], list[Record]]] = {
        "convolutions": convolutions,
        "passes": passes,
        "steps": steps,
    }
    for part, measured in parts.items():
        result[part] = measured(sizes)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measures the machine, writes one JSON file and one figure.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of layers and steps; a worker of the product has 1")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works; needs --out")
    parser.add_argument("--figure-only", action="store_true", help="draw the figure of an earlier result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--figure", type=Path, help="SVG file; beside --out when that is given")
    options = parser.parse_args(arguments)
    if options.small and options.out == RESULTS:
        parser.error("--small needs --out: its numbers mean nothing, and must not replace a result")
    where = options.figure or (FIGURE if options.out == RESULTS else options.out.with_suffix(".svg"))
    if not options.figure_only:
        given = sys.argv[1:] if arguments is None else arguments
        started = time.perf_counter()
        found = measure(SMALL if options.small else Sizes(), options.threads, 1 if options.small else workers())
        result = {"command": " ".join(["python benchmarks/machine.py", *given]), **found}
        replace_text(options.out, json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n")
        print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    result = json.loads(options.out.read_text())
    replace_text(where, figure(result))
    print(table(result))


if __name__ == "__main__":
    main()
