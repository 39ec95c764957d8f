"""How do time and memory grow with the number of models of the pool, stage by stage?

    python benchmarks/growth.py                  # writes benchmarks/results/growth.json and docs/growth.svg
    python benchmarks/growth.py --figure-only    # draws the figure anew

Three hundred models are not trained for this: what a model costs hangs on its architecture and not on its weights. The
pool is the shipped ``icons-30`` and, beyond its 30 models, copies of them whose weights are multiplied by 1 + 0.05
noise, so that every size has the three architectures in the shipped proportion. Its *accuracies* would mean nothing and
are not recorded.

Settings are those of the main recipe with fewer steps, the same for every size (``--recovery-steps``, ``--steps``).
Steps of recovery are work per model; training takes as many steps whatever the number of models, in the main job too.
The times are thus not those of the main job; how they grow is.

Every size runs in a fresh process with an empty store, stage after stage as ``metapool run`` has them; this process
looks on and adds up the memory of that process and of its workers, ten times a second. Workers start within the first
stage, and take some seconds of it. A process keeps memory that it freed (``keep_memory``) and workers outlive their
stage, so a stage's peak holds what earlier stages left.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from joblib.externals.loky import get_reusable_executor

from metapool.base.store import Store, generator_for
from metapool.embed import ProbeSettings, embed_bank
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.interface.figures import PALETTE
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, plain_log_ticks, round_ticks, standalone
from metapool.interface.recipe import Evaluation, load_recipe, open_pool, scored_images, validation_images, workers
from metapool.interface.run.files import replace_text
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import GeneratorRecovery, recover_pool
from metapool.views import ViewSettings, view_bank

RESULTS, FIGURE = Path("benchmarks/results/growth.json"), Path("docs/growth.svg")
SHIPPED = "icons-30"
NOISE = 0.05
INTERVAL = 0.1
STAGES = {
    "recover": "recover",
    "embed": "probe and embed",
    "group": "group",
    "views": "views",
    "train": "meta-train",
    "evaluate": "evaluate",
}
"""Names in the result and in the figure."""


@dataclass(frozen=True)
class Work:
    """What is done to a pool of whatever size."""

    method: TGR
    evaluation: Evaluation
    jobs: int
    seed: int


def grown_pool(folder: Path, models: int, seed: int) -> ModelPool:
    """The shipped pool, cut off or filled up with perturbed copies.

    Args:
        folder: of the pool; must not hold one.
        models: number of models.
        seed: of the perturbations.

    Returns:
        The pool.
    """
    shipped = open_pool(SHIPPED)
    pool = ModelPool.create(folder, f"{SHIPPED}-to-{models}")
    for index in range(models):
        model = shipped[index % len(shipped)]
        if index >= len(shipped):
            model = perturbed(model, f"{model.id}-copy-{index // len(shipped)}", seed)
        pool.add(model, torch.float16)
    return pool


def perturbed(model: PretrainedModel, id: str, seed: int) -> PretrainedModel:
    """A model whose every weight and statistic is multiplied by 1 + ``NOISE`` times a normal number.

    Args:
        model: is changed.
        id: name of the result.
        seed: of the noise.

    Returns:
        The model under its new name.
    """
    generator = generator_for(seed, "growth", id)
    state: dict[str, torch.Tensor] = {}
    for name, value in model.network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        state[name] = value * (1 + NOISE * noise) if value.is_floating_point() else value
    model.network.load_state_dict(state)
    made_of = f"benchmarks/growth.py: {model.id} with {NOISE:g} noise"
    return PretrainedModel(
        id, model.network, model.input, model.classes, spec=model.spec, licence=model.licence, provenance=made_of
    )


def serve(work: Work, path: Path, models: int, store: Path, connection: "Connection[Any, Any]") -> None:
    """The process that is measured.

    Args:
        work: what to do.
        path: of a pool.
        models: how many of its models to take.
        store: folder of an empty store.
        connection: gets ``("begin", stage, 0)`` and ``("end", stage, seconds)``, and ``("stop", "", 0)`` at the end.
    """
    try:
        run_stages(work, ModelPool.open(path)[:models], Store(store, jobs=work.jobs), connection)
        connection.send(("stop", "", 0.0))
    finally:
        # Workers wait five minutes for more to do, and a process that was spawned waits for its workers.
        get_reusable_executor().shutdown()


def run_stages(work: Work, pool: ModelPool, store: Store, connection: "Connection[Any, Any]") -> None:
    """All stages on one pool, each announced.

    Args:
        work: what to do.
        pool: the models.
        store: empty.
        connection: as in :func:`serve`.
    """

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        connection.send(("begin", name, 0.0))
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        # By the store's clock: fit() looks at the stages before training once more, and finds them done.
        connection.send(("end", name, store.seconds["meta-model"] if name == "train" else seconds))

    method, settings = work.method, work.evaluation
    input = pool.manifest.models[0].input
    images = scored_images(settings, input)
    validation = validation_images(settings, input)
    with stage("recover"):
        bank = recover_pool(pool, method.recovery, store)
    with stage("embed"):
        embed_bank(bank, input, method.probe, store)
    with stage("group"):
        method.grouped(pool, bank, store, work.seed)
    with stage("views"):
        view_bank(pool, bank, [pool.ids], input, method.views, store)
    with stage("train"):
        fitted = method.fit(pool, store, work.seed, validation)
    with stage("evaluate"):
        for shot in settings.shots:
            count, seed = settings.episodes, settings.seed
            evaluate(fitted, images, sample_episodes(images, settings.way, shot, settings.query, count, seed))


@dataclass
class Memory:
    """Megabytes of some processes together.

    Attributes:
        resident: in memory; pages of a file, such as torch's code, count once for every process.
        own: of these, what no file holds: tensors above all.
    """

    resident: float = 0.0
    own: float = 0.0

    def raise_to(self, other: "Memory") -> None:
        """Keeps the larger numbers.

        Args:
            other: a later look.
        """
        self.resident, self.own = max(self.resident, other.resident), max(self.own, other.own)

    def rounded(self) -> dict[str, float]:
        """For the result.

        Returns:
            Megabytes by name.
        """
        return {f"{name}_mb": round(value, 1) for name, value in asdict(self).items()}


def memory_of(pid: int) -> Memory:
    """What a process and all its descendants hold.

    Args:
        pid: the process.

    Returns:
        Their sum; nothing of those that end meanwhile.
    """
    total = Memory()
    family = [pid]
    for member in family:  # grows as children are found
        try:
            for thread in Path(f"/proc/{member}/task").iterdir():
                family += [int(child) for child in (thread / "children").read_text().split()]
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Rss"))}
        kilobytes = {name: int(sizes.get(name, 0)) for name in ("VmRSS", "RssAnon", "RssShmem")}
        total.resident += kilobytes["VmRSS"] / 1000
        total.own += (kilobytes["RssAnon"] + kilobytes["RssShmem"]) / 1000
    return total


@dataclass
class Measured:
    """What was seen of one size."""

    start: Memory = field(default_factory=Memory)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)


def measure(work: Work, path: Path, models: int) -> dict[str, Any]:
    """Runs one size in a fresh process and looks on.

    Args:
        work: what to do.
        path: of a pool.
        models: how many of its models to take.

    Returns:
        The record of the result file.

    Raises:
        RuntimeError: the process ended early; its own error is on the terminal.
    """
    context = multiprocessing.get_context("spawn")
    found = Measured()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        # No daemon: those may not have workers.
        process = context.Process(target=serve, args=(work, path, models, Path(folder), theirs))
        process.start()
        theirs.close()
        assert process.pid is not None
        memory, stage = found.start, ""
        try:
            while stage != "stop":
                arrived = ours.poll(INTERVAL)
                memory.raise_to(memory_of(process.pid))  # before the message is read: it belongs to the stage so far
                if arrived:
                    stage, name, seconds = ours.recv()
                    if stage == "begin":
                        memory = found.memory[name] = Memory()
                    elif stage == "end":
                        found.seconds[name] = seconds
        except EOFError as error:
            raise RuntimeError(f"the process that ran {models} models ended early") from error
        finally:
            process.join()
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    peak = Memory()
    for memory in found.memory.values():
        peak.raise_to(memory)
    entries = ModelPool.open(path).manifest.models[:models]
    return {
        "models": models,
        "architectures": dict(Counter(entry.network.architecture for entry in entries)),
        "stages": {name: {"seconds": round(found.seconds[name], 3), **found.memory[name].rounded()} for name in STAGES},
        "seconds": round(sum(found.seconds.values()), 3),
        "start": found.start.rounded(),
        "peak": peak.rounded(),
        "store_mb": round(stored / 1e6, 1),
    }


def powers(pools: list[dict[str, Any]]) -> dict[str, list[float]]:
    """How each stage's time grows from one size to the next: p where it is as the number of models to the power p.

    Args:
        pools: records by rising size.

    Returns:
        Powers by stage, one for each step from size to size; 0 is no growth, 1 is proportional.
    """
    found: dict[str, list[float]] = {}
    for name in STAGES:
        rises = [
            math.log(other["stages"][name]["seconds"] / one["stages"][name]["seconds"])
            / math.log(other["models"] / one["models"])
            for one, other in pairwise(pools)
            if one["stages"][name]["seconds"] and other["stages"][name]["seconds"]
        ]
        found[name] = [round(rise, 2) for rise in rises]
    return found


def short(value: float) -> str:
    """Three digits, and all of a large number's."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table.

    Args:
        result: content of the result file.

    Returns:
        Markdown.
    """
    pools = result["pools"]
    lines = [
        "| seconds | " + " | ".join(f"{pool['models']} models" for pool in pools) + " | powers |",
        "|---" * (len(pools) + 2) + "|",
    ]
    for name, label in STAGES.items():
        seconds = [short(pool["stages"][name]["seconds"]) for pool in pools]
        lines.append(f"| {label} | " + " | ".join(seconds) + f" | {', '.join(map(str, result['powers'][name]))} |")
    lines.append("| all | " + " | ".join(short(pool["seconds"]) for pool in pools) + " | |")
    for key, label in (("resident_mb", "peak memory, MB"), ("own_mb", "of that not of files, MB")):
        lines.append(f"| {label} | " + " | ".join(f"{pool['peak'][key]:.0f}" for pool in pools) + " | |")
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> str:
    """Seconds of every stage and the peak of memory against the number of models.

    Args:
        result: content of the result file.

    Returns:
        An SVG of its own.
    """
    pools = result["pools"]
    sizes = [pool["models"] for pool in pools]
    with panel(880, 400, "Time and memory against the number of models") as (drawn, draw):
        left, right = drawn.add_axes((0.05, 0.12, 0.43, 0.78)), drawn.add_axes((0.56, 0.12, 0.42, 0.78))
        left.set_yscale("log")
        colours = {name: ACCENT if name == "train" else PALETTE[place] for place, name in enumerate(STAGES)}
        for name, label in STAGES.items():
            seconds = [max(pool["stages"][name]["seconds"], 1e-3) for pool in pools]
            left.plot(sizes, seconds, color=colours[name], marker="o", markersize=4, linewidth=1.6, label=label)
        begin = 2 * max(stage["seconds"] for stage in pools[0]["stages"].values())
        guide = [begin * size / sizes[0] for size in sizes]
        left.plot(sizes, guide, color=MUTED, linestyle=(0, (1, 3)), linewidth=1.2, label="as the number of models")
        bare(left, "Seconds")
        plain_log_ticks(left.yaxis, 3)
        for key, label, colour in (
            ("resident_mb", "resident, all processes", INK),
            ("own_mb", "without pages of files", PALETTE[0]),
        ):
            gigabytes = [pool["peak"][key] / 1000 for pool in pools]
            right.plot(sizes, gigabytes, color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        right.set_ylim(0, 1.25 * max(pool["peak"]["resident_mb"] for pool in pools) / 1000)
        bare(right, "Peak memory, GB")
        round_ticks(right.yaxis)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("models in the pool")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.legend(
                loc="upper left", ncols=2, fontsize=9.5, labelcolor=INK, handlelength=1.6,
                facecolor="white", edgecolor="none", framealpha=1,
            )  # fmt: skip
        left.set_ylim(top=20 * left.get_ylim()[1])  # room for the legend
        text = draw()
    return standalone(text)


def work_of(options: argparse.Namespace) -> Work:
    """The main recipe's method and episodes with the steps that were asked for.

    Args:
        options: of the command line.

    Returns:
        What to do with every pool.
    """
    recipe = load_recipe("main")
    method, evaluation = recipe.method, recipe.evaluation
    assert isinstance(method, TGR)
    changes: dict[str, Any] = {"steps": options.steps}
    recovery = method.recovery.model_copy(update={"steps": options.recovery_steps})
    if options.small:
        recovery = GeneratorRecovery(per_class=4, steps=1, code=8, width=4)
        probe, views = ProbeSettings(width=4, steps=1, batch=8), ViewSettings(copies=1, blends=0)
        changes |= {"steps": 2, "width": 8, "batch": 16, "replay_updates": 1, "replay_batch": 16}
        changes |= {"probe": probe, "views": views}
        evaluation = evaluation.model_copy(update={"episodes": 20})
    method = method.model_copy(update={**changes, "recovery": recovery})
    return Work(method, evaluation, options.jobs, options.seed)


def main(arguments: list[str] | None = None) -> None:
    """Measures every size, writes one JSON file and one figure.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, nargs="+", default=[10, 30, 100, 300], help="sizes of the pool")
    parser.add_argument("--recovery-steps", type=int, default=6, help="of each model; 60 in the main recipe")
    parser.add_argument("--steps", type=int, default=10, help="of meta-training; 240 in the main recipe")
    parser.add_argument("--jobs", type=int, default=workers(), help="worker processes")
    parser.add_argument("--seed", type=int, default=0, help="of training and of the copies' noise")
    parser.add_argument("--small", action="store_true", help="tiny settings, to see that it works; needs --out")
    parser.add_argument("--figure-only", action="store_true", help="draw the figure of an earlier result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--figure", type=Path, help="SVG file; beside --out when that is given")
    options = parser.parse_args(arguments)
    if options.small and options.out == RESULTS:
        parser.error("--small needs --out: its numbers mean nothing, and must not replace a result")
    where = options.figure or (FIGURE if options.out == RESULTS else options.out.with_suffix(".svg"))
    if not options.figure_only:
        if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").is_file():
            parser.error("memory is read from Linux's /proc/PID/task/TID/children, which is not there")
        from units import machine  # not at the top: the processes that are measured import this file too

        given = sys.argv[1:] if arguments is None else arguments
        work, sizes = work_of(options), sorted(set(options.models))
        result: dict[str, Any] = {"command": " ".join(["python benchmarks/growth.py", *given])}
        result["machine"] = machine(torch.get_num_threads())
        result["settings"] = {
            "seed": work.seed,
            "jobs": work.jobs,
            "pool": SHIPPED,
            "noise": NOISE,
            "recovery_steps_per_model": work.method.recovery.steps,
            "training_steps": work.method.steps,
            "method": work.method.model_dump(mode="json"),
            "evaluation": work.evaluation.model_dump(mode="json"),
        }
        result["pools"] = []
        with tempfile.TemporaryDirectory() as folder:
            grown_pool(Path(folder), sizes[-1], work.seed)
            for size in sizes:
                result["pools"].append(measure(work, Path(folder), size))
                result["powers"] = powers(result["pools"])
                replace_text(options.out, json.dumps(result, indent=1) + "\n")
                print(f"{size} models: {result['pools'][-1]['seconds']:.4g} s", file=sys.stderr, flush=True)
    result = json.loads(options.out.read_text())
    replace_text(where, figure(result))
    print(table(result))


if __name__ == "__main__":
    main()
