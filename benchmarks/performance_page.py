"""Writes docs/performance.md from the committed results, so that its numbers are theirs.

    python benchmarks/performance_page.py            # writes the page
    python benchmarks/performance_page.py --check    # fails when the page is not what this would write

Nothing is measured here. A section whose JSON file is not there says so in one sentence.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import growth
import machine
import recovery

from metapool.interface.run.files import replace_text

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/performance.md")
JOB_GOAL = 300
HUNDRED_GOAL = 20.0  # minutes
"""Seconds of the whole main job."""
EMBEDDING_GOAL = 3
"""Plain training steps that a Fisher embedding may cost."""
UNITS = {
    "recovery-step": "step of recovery",
    "teacher-outputs": "outputs of one model for an image",
    "fisher": "Fisher embedding of a model",
    "batch-gradient": "training step of the probe",
    "tgr-step": "step of TGR (`classify`)",
    "maml-step": "step of MAML",
    "evaluation-protonet": "evaluation of an episode, ProtoNet",
    "evaluation-maml": "evaluation of an episode, MAML",
}
STAGES = {
    "recover": "recover images out of every model",
    "probe": "train the probe network",
    "embed": "Fisher embeddings",
    "view-images": "draw the images that all models look at",
    "view": "what every model says of them",
    "meta-model": "meta-train",
    "methods": "train and score all methods, side by side",
    "scores": "score",
    "cost": "time the answers of every method",
    "realdata": "train references on real images",
}
"""Words for what ``scores.json`` has; others stand there by name."""
Result = dict[str, Any]


def missed(reached: float, goal: float) -> str:
    """Whether a ratio meets its goal.

    Args:
        reached: how many times faster.
        goal: how many times faster it should be.

    Returns:
        ``met``, or by which factor it is missed.
    """
    return "met" if reached >= goal else f"**missed by {by(goal / reached)}**"


def by(factor: float) -> str:
    """A factor above 1, never rounded to 1."""
    return f"{factor:.2g}×" if factor >= 1.1 else f"{max(factor, 1.001):.3f}×"


def made_by(result: Result, name: str) -> str:
    """Which command made the numbers, on what.

    Args:
        result: content of a result file.
        name: of the file.

    Returns:
        A sentence.
    """
    about = result.get("machine", {})
    where = []
    if "cpu" in about:
        half = about.get("half_precision")
        native = "" if half is None else ", bfloat16 in hardware" if half else ", no bfloat16 in hardware"
        where = [f"{about['cpu']}, {about.get('cores', '?')} cores, {about.get('capability', '?')}{native}"]
    where += [f"torch {about['torch']}"] if "torch" in about else []
    command = result.get("command")
    made = f"`{command}`" if command else "a command that the file does not name"
    return f"Made by {made} (`{RESULTS / name}`)" + (f" on: {'; '.join(where)}." if where else ".")


def units(result: Result) -> list[str]:
    """Ratios of units against their goals.

    Args:
        result: content of ``units.json``.

    Returns:
        Lines.
    """
    rows: dict[str, Any] = result["units"]
    lines = [
        "Straightforward code (`benchmarks/reference.py`) and the product do the same mathematics at the same sizes, "
        f"in two processes that take turns, on {machine.number(result['machine']['threads'], 'thread')} each. "
        "Medians, and the quartiles of the ratio.",
        "",
        "| unit | straightforward, ms | product, ms | ratio | goal | |",
        "|---|---|---|---|---|---|",
    ]
    misses: list[str] = []
    judged = 0
    for name, row in rows.items():
        label, goal = UNITS.get(name, name), row.get("goal")
        low, high = row["ratio_quartiles"]
        verdict = missed(row["ratio"], goal) if goal else ""
        cells = [label, growth.short(row["reference_ms"]), growth.short(row["product_ms"])]
        cells += [f"{row['ratio']:.2f}× ({low:.2f}–{high:.2f})", f"{goal:g}×" if goal else "", verdict]
        lines.append("| " + " | ".join(cells) + " |")
        judged += bool(goal)
        if goal and row["ratio"] < goal:
            misses.append(f"{label}: {row['ratio']:.2f}× of {goal:g}×, {by(goal / row['ratio'])} short")
    lines.append("")
    if {"fisher", "batch-gradient"} <= rows.keys():
        cost = rows["fisher"]["product_ms"] / rows["batch-gradient"]["reference_ms"]
        judged += 1
        lines += [
            f"A Fisher embedding costs as much as {cost:.2f} plain float32 training steps on the same images; the "
            f"goal is at most {EMBEDDING_GOAL}: {missed(1 / cost, 1 / EMBEDDING_GOAL)}.",
            "",
        ]
        if cost > EMBEDDING_GOAL:
            costs = f"{cost:.2f} plain training steps instead of {EMBEDDING_GOAL}"
            misses.append(f"Fisher embedding: {costs}, {by(cost / EMBEDDING_GOAL)} too many")
    return [*lines, *_verdict(misses, judged)]


def _verdict(misses: list[str], judged: int) -> list[str]:
    if not misses:
        return [f"All {judged} goals are met."]
    return [f"{len(misses)} of {judged} goals are missed:", "", *[f"- {one}" for one in misses]]


def job(result: Result) -> list[str]:
    """Seconds of the whole main job by stage.

    Args:
        result: content of ``scores.json``.

    Returns:
        Lines.
    """
    seconds: dict[str, float] = result["seconds"]
    whole = sum(seconds.values())
    lines = ["| stage | seconds | share |", "|---|---|---|"]
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        label = f"{STAGES[name]} (`{name}`)" if name in STAGES else f"`{name}`"
        lines.append(f"| {label} | {spent:.1f} | {100 * spent / whole:.0f} % |")
    lines += [f"| **all** | **{whole:.1f}** | |", ""]
    verdict = "met" if whole <= JOB_GOAL else f"**missed by {by(whole / JOB_GOAL)}**"
    return [
        *lines,
        f"The goal of the whole job is {JOB_GOAL} seconds: {verdict}. That holds for a run from an empty store, as on "
        "a fresh checkout: a stage that the store has already takes next to nothing.",
    ]


def quality(result: Result) -> list[str]:
    """What a recovery costs and what its images are worth.

    Args:
        result: content of ``recovery.json``.

    Returns:
        Lines.
    """
    head = [
        "What the names mean: `paper` has the paper's settings, `main` those of the main recipe; the head of "
        "`benchmarks/recovery.py` says how images are judged.",
        "",
    ]
    return [*head, *recovery.table(result).rstrip("\n").split("\n")]


def over_time(result: Result) -> list[str]:
    """Accuracy against the seconds that it took.

    Args:
        result: content of ``accuracy_over_time.json``.

    Returns:
        Lines.
    """
    points = sorted(result.get("points", []), key=lambda point: float(point["seconds"]))
    if not points:
        return ["The result file has no points."]
    shots = list(points[0].get("shots", {}))
    lines = [
        "| seconds | steps of training | " + " | ".join(f"{shot}-shot, %" for shot in shots) + " |",
        "|---" * (2 + len(shots)) + "|",
    ]
    for point in points:
        found = [point.get("shots", {}).get(shot, {}) for shot in shots]
        cells = [f"{point['seconds']:.1f}", str(point.get("steps", ""))]
        cells += [f"{one['mean']:.1f} ± {one.get('ci95', float('nan')):.1f}" if "mean" in one else "" for one in found]
        lines.append("| " + " | ".join(cells) + " |")
    spent = {name: _seconds_of(stage) for name, stage in result.get("stages", {}).items()}
    known = [f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds is not None]
    lines += ["", f"Seconds before training, once for all points: {', '.join(known)}."] if known else []
    return lines


def _seconds_of(stage: Any) -> float | None:
    """Seconds of a stage, whether it has more to say or not."""
    found = stage.get("seconds") if isinstance(stage, dict) else stage
    return float(found) if isinstance(found, int | float) else None


def growing(result: Result) -> list[str]:
    """Time and memory against the number of models.

    Args:
        result: content of ``growth.json``.

    Returns:
        Lines.
    """
    settings, pools = result["settings"], result["pools"]
    first, last = pools[0], pools[-1]
    lines = [
        f"Every size in a fresh process with an empty store, {settings['recovery_steps_per_model']} steps of recovery "
        f"a model and {settings['training_steps']} of training, so these are not the times of the main job; how they "
        f"grow is. Models beyond the shipped pool are copies with noise in their weights. {settings['jobs']} workers. "
        "A power p: from this size to the next, time grows as the number of models to the power p.",
        "",
        *growth.table(result).rstrip("\n").split("\n"),
        "",
    ]
    if last["models"] > first["models"]:
        times = [last["models"] / first["models"], last["seconds"] / first["seconds"]]
        times.append(last["peak"]["resident_mb"] / first["peak"]["resident_mb"])
        lines.append(
            f"From {first['models']} to {last['models']} models, {times[0]:.3g} times as many: "
            f"{times[1]:.3g} times the seconds, {times[2]:.3g} times the peak of memory."
        )
    return lines


def hundred(result: Result) -> list[str]:
    """A whole run of a large pool, with the main recipe's steps.

    Args:
        result: of ``growth.py`` with these steps and one number of models.

    Returns:
        Lines.
    """
    (pool,) = result["pools"]
    minutes = pool["seconds"] / 60
    return [
        f"{pool['models']} models with the main recipe's steps, from recovery to evaluation, from an empty store: "
        f"{minutes:.1f} minutes with {result['settings']['jobs']} workers on {result['machine']['cpu']}, "
        f"{pool['peak']['resident_mb'] / 1000:.1f} GB at the peak. "
        f"Goal: {HUNDRED_GOAL} minutes, {missed(1 / minutes, 1 / HUNDRED_GOAL)}.",
        "",
        *growth.table(result).rstrip("\n").split("\n"),
    ]


def limit(result: Result) -> list[str]:
    """How near layers and steps come to what the machine can do, and where a step's time goes.

    Args:
        result: content of ``machine.json``.

    Returns:
        Lines.
    """
    roof = machine.Roof.of(result)
    lines = [
        "No layer does more operations a second than large matrix products of its type (the peak), nor more than "
        "bandwidth times its operations for each byte that has to move (with the peak, the roof). A layer's bytes are "
        "its input, weights and output, each once; a step's are those of its operations, each by itself. Bandwidth of "
        f"the roof: {roof.gigabytes:.1f} GB/s, the best that was measured. Steps mix types, and are held against the "
        "one that their convolutions have. Shares of a step's time are those that torch's profiler sees, by name of "
        "operation.",
        "",
        *machine.table(result).rstrip("\n").split("\n"),
        "",
    ]
    for row in result["steps"]:
        peak, top = roof.peak[row["type"]], roof.gflops(row["type"], row["intensity"])
        kind, share = max(row["kinds"].items(), key=lambda item: float(item[1]))
        bound = "bandwidth" if top < peak else "the matrix peak"
        lines.append(
            f"- {row['step']}: {row['gflops']:.0f} GFLOP/s, {100 * row['gflops'] / peak:.0f} % of the "
            f"{row['type']} peak and {100 * row['gflops'] / top:.0f} % of its roof, which is {bound}; "
            f"the largest share of its time ({100 * share:.0f} %): {kind}."
        )
    return lines


SECTIONS: dict[str, tuple[str, str, Callable[[Result], list[str]], str]] = {
    "Units against goals": ("units.json", "units.py", units, ""),
    "The whole job": ("main/scores.json", "", job, ""),
    "The whole job, earlier code on a processor with AMX": ("main-amx/scores.json", "", job, ""),
    "Recovery: quality against cost": ("recovery.json", "recovery.py", quality, "recovery.svg"),
    "Accuracy over time": ("accuracy_over_time.json", "accuracy_over_time.py", over_time, "accuracy-over-time.svg"),
    "Growth with the number of models": ("growth.json", "growth.py", growing, "growth.svg"),
    "A hundred models": ("hundred.json", "growth.py --models 100 --recovery-steps 60 --steps 240", hundred, ""),
    "Distance to the machine's limit": ("machine.json", "machine.py", limit, "roofline.svg"),
}
"""By title: result file, script, what is said of it, and a figure beside the page."""


def page(results: Path, figures: Path) -> str:
    """The whole page.

    Args:
        results: folder of the result files.
        figures: folder of the page and its figures.

    Returns:
        Markdown.
    """
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/performance_page.py` from the JSON files in `benchmarks/results`: change those, "
        "not this page. Goals are those of the issue \"Fast\"; a miss is said to be one. Machines differ, and each "
        "section names its own: compare ratios, not milliseconds, with another one.",
    ]  # fmt: skip
    for title, (name, script, say, drawn) in SECTIONS.items():
        command = f"python benchmarks/{script}" if script else "make run"
        lines += ["", f"## {title}", ""]
        if not (results / name).is_file():
            lines.append(f"Not measured yet: there is no `{RESULTS / name}`, which `{command}` makes.")
            continue
        result = json.loads((results / name).read_text())
        if name.endswith("/scores.json"):
            result = {**_run(results / name), **result}
        lines += [made_by(result, name), "", *say(result)]
        if drawn and (figures / drawn).is_file():
            lines += ["", f"![{title}]({drawn})"]
    return "\n".join(lines) + "\n"


def _run(scores: Path) -> dict[str, Any]:
    """Command and machine of a run, which stand beside its scores."""
    about = scores.parent / "run.json"
    found = json.loads(about.read_text()).get("machine", {}) if about.is_file() else {}
    known = {name: found[name] for name in ("cores", "torch") if name in found}
    if "cpu" in found:
        # Runs of earlier versions say which instructions the processor has, and not its name.
        known |= {"cpu": found.get("processor", "a processor"), "capability": found["cpu"]}
    return {"command": "make run", "machine": known}


def main(arguments: list[str] | None = None) -> None:
    """Writes or checks the page.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file; figures are looked for beside it")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page would change")
    options = parser.parse_args(arguments)
    wanted = page(options.results, options.page.parent)
    if options.check:
        found = options.page.read_text() if options.page.is_file() else ""
        if found != wanted:
            command = "python benchmarks/performance_page.py"
            raise SystemExit(f"{options.page} is not what its results say: run {command}")
        return
    replace_text(options.page, wanted)


if __name__ == "__main__":
    main()
