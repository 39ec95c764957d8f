"""How good is the few-shot learner after so many seconds on a CPU, from an empty store?

    python benchmarks/accuracy_over_time.py                  # writes the JSON file and docs/accuracy-over-time.svg
    python benchmarks/accuracy_over_time.py --figure-only    # draws the figure anew

The main recipe's TGR on its pool. The stages before training (recover with its common generator, probe, embed, group,
views) run once, into an empty store that is thrown away. Then the method is trained for 10, 30, 90, 180 and the
recipe's own number of steps: each time from the start, since the learning rate falls to its end within whatever number
of steps there is. A point's seconds are those of the stages before training and of its own training, for whoever wants
this point alone pays both.

All seconds are wall-clock. Stages that go through the pool model by model have as many worker processes as
``metapool run`` takes, by default one for each core; each works on one thread, and so do the other stages and training,
however many cores there are (``workers`` in the result). Workers start within the first stage, and count there. Not
counted: start of Python, opening the pool, and scoring.

Meta-validation classes are not used: a checkpoint is not chosen, the last weights are kept. Every point is scored on
the recipe's episodes of meta-test classes, at all its numbers of shots, with 95 % intervals over episodes.

The reference marks of the figure are not ours to compare digit by digit: released code, and MAML on real images, on
the same icons, but with 30 Conv4 models, 2 threads, and their own transductive evaluation instead of our episodes
(``shared/DESIGN.md``, section 10). None of them had converged.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from joblib.externals.loky import get_reusable_executor
from units import machine

from metapool.base.store import Store
from metapool.embed import ProbeSettings
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.interface.figures import PALETTE
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, plain_log_ticks, round_ticks, standalone
from metapool.interface.figures.labels import Box, Label, write_labels
from metapool.interface.recipe import Recipe, load_recipe, open_pool, scored_images, workers
from metapool.interface.run.files import replace_text
from metapool.methods.tgr import TGR
from metapool.recover import GeneratorRecovery
from metapool.views import ViewSettings

RESULTS, FIGURE = Path("benchmarks/results/accuracy_over_time.json"), Path("docs/accuracy-over-time.svg")
STEPS = (10, 30, 90, 180)
SIDE_BY_SIDE = ("recover", "embed", "view")
"""Stages whose models are shared out among workers."""
REFERENCES = (
    {"name": "released TGR code", "minutes": 20, "shots": {"1": 38.9, "5": 51.5}},
    {"name": "released FREE code", "minutes": 15, "shots": {"1": 46.1, "5": 60.2}},
    {"name": "MAML on real images", "minutes": 8, "shots": {"1": 58.2, "5": 75.2}},
)
"""Percent. See the head of this file for what they are."""
CAPTION = (
    "Circles: metapool, our episodes of meta-test classes, with 95 % intervals; time of scoring is not counted.",
    "Squares: references on the same icons; 30 Conv4 models, 2 threads and their own transductive MAML evaluation,",
    "not our episodes; far from converged, so what that code reaches in that time and not what the methods are worth.",
)


def small(recipe: Recipe, method: TGR) -> tuple[Recipe, TGR]:
    """The recipe with so little to do that a few seconds are enough.

    Args:
        recipe: the recipe.
        method: its method.

    Returns:
        Both, changed.
    """
    changes = {
        "recovery": GeneratorRecovery(per_class=4, steps=1, code=8, width=4, warm_steps=1),
        "probe": ProbeSettings(width=4, steps=1, batch=8),
        "views": ViewSettings(copies=1, blends=0),
        "width": 8,
        "batch": 16,
        "replay_updates": 1,
        "replay_batch": 16,
    }
    evaluation = recipe.evaluation.model_copy(update={"episodes": 10})
    recipe = recipe.model_copy(update={"limit": 3, "evaluation": evaluation})
    return recipe, method.model_copy(update=changes)


def measure(recipe: Recipe, method: TGR, budgets: list[int], seed: int, result: dict[str, Any], out: Path) -> None:
    """Runs the stages before training once and then every training, each with its scores.

    Args:
        recipe: whose pool and episodes are used.
        method: whose steps are replaced.
        budgets: numbers of training steps, each once.
        seed: of the clustering and of training.
        result: gets stages and points.
        out: the result file, written anew after every point.
    """
    pool = open_pool(recipe.pool)[: recipe.limit]
    settings = recipe.evaluation
    images = scored_images(settings, pool.input)
    episodes = {
        shot: sample_episodes(images, settings.way, shot, settings.query, settings.episodes, settings.seed)
        for shot in settings.shots
    }
    result["settings"]["models"] = len(pool)
    result["settings"]["episode_hashes"] = {str(shot): drawn.digest() for shot, drawn in episodes.items()}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), jobs=result["settings"]["jobs"])
        started = time.perf_counter()
        method.prepare(pool, store, seed)
        shared = time.perf_counter() - started
        result["stages"] = stages(store, shared, len(pool))
        result["shared_seconds"] = round(shared, 3)
        # They would only wait, but training is to be alone.
        get_reusable_executor().shutdown()
        for budget in budgets:
            before = store.seconds.get("meta-model", 0.0)
            # The store's clock: fit() looks at the stages before training once more, and finds them done.
            fitted = method.model_copy(update={"steps": budget}).fit(pool, store, seed, validation=None)
            training = store.seconds["meta-model"] - before
            intervals = {shot: score.interval for shot, score in evaluate(fitted, images, episodes).items()}
            point = {
                "steps": budget,
                "training_seconds": round(training, 3),
                "seconds": round(shared + training, 3),
                "shots": {
                    str(shot): {"mean": round(interval.mean, 3), "ci95": round(interval.ci95, 3)}
                    for shot, interval in intervals.items()
                },
            }
            result["points"].append(point)
            replace_text(out, json.dumps(result, indent=1) + "\n")
            print(f"{budget} steps: {training:.4g} s of training", file=sys.stderr, flush=True)


def stages(store: Store, shared: float, models: int) -> dict[str, dict[str, float]]:
    """Seconds and workers of every stage before training.

    Args:
        store: in which nothing but these stages was made.
        shared: seconds of all of them together.
        models: of the pool.

    Returns:
        By the store's name of the stage; ``group`` is all the rest: the clustering, and reading what was stored.
    """
    found: dict[str, dict[str, float]] = {}
    for kind, seconds in {**store.seconds, "group": shared - sum(store.seconds.values())}.items():
        workers = min(store.jobs, models) if kind in SIDE_BY_SIDE else 1
        found[kind] = {"seconds": round(seconds, 3), "workers": workers}
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown tables.

    Args:
        result: content of the result file.

    Returns:
        Markdown.
    """
    lines = ["| before training | seconds | workers |", "|---|---|---|"]
    for name, stage in result["stages"].items():
        lines.append(f"| {name} | {stage['seconds']:.1f} | {stage['workers']} |")
    lines += [f"| all | {result['shared_seconds']:.1f} | |", ""]
    shots = list(result["points"][0]["shots"])
    lines += ["| steps | training, s | from an empty store, s | " + " | ".join(f"{s}-shot" for s in shots) + " |"]
    lines += ["|---" * (3 + len(shots)) + "|"]
    for point in result["points"]:
        scores = " | ".join(f"{score['mean']:.2f} ± {score['ci95']:.2f}" for score in point["shots"].values())
        lines.append(f"| {point['steps']} | {point['training_seconds']:.1f} | {point['seconds']:.1f} | {scores} |")
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> str:
    """Accuracy against seconds from an empty store, one line for every number of shots, beside the references.

    Args:
        result: content of the result file.

    Returns:
        An SVG of its own.
    """
    points = sorted(result["points"], key=lambda point: float(point["seconds"]))
    shots = sorted(points[0]["shots"], key=int)
    colours = {shot: (PALETTE[0], ACCENT, *PALETTE[1:])[place] for place, shot in enumerate(shots)}
    times = [float(point["seconds"]) for point in points]
    low = min(times) / 1.5
    high = max(60 * 20, *times) * 1.35
    means = [score["mean"] for point in points for score in point["shots"].values()]
    with panel(880, 500, "Accuracy against time from an empty store") as (drawn, draw):
        axes = drawn.add_axes((0.05, 0.225, 0.93, 0.7))
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(min(35, *means) - 3, max(80, *means) + 6)
        bare(axes, "")
        heading = f"Accuracy, percent ({result['settings']['evaluation']['way']} classes)"
        drawn.text(0.018, 0.955, heading, fontsize=12.5, fontweight="bold", color=INK)
        plain_log_ticks(axes.xaxis, torch.tensor(high / low).log10().item())
        round_ticks(axes.yaxis)
        axes.set_xlabel("seconds from an empty store (logarithmic)", labelpad=5)

        def pixels(x: float, y: float) -> tuple[float, float]:
            across, up = axes.transData.transform((x, y))
            return float(across), float(up)

        obstacles: list[Box] = []
        labels: list[Label] = []
        for shot in shots:
            scores = [point["shots"][shot] for point in points]
            values, halves = [score["mean"] for score in scores], [score["ci95"] for score in scores]
            axes.errorbar(
                times, values, yerr=halves, color=colours[shot], marker="o", markersize=4.5, linewidth=1.7,
                elinewidth=1.2, capsize=3, capthick=1.2,
            )  # fmt: skip
            places = [pixels(x, y) for x, y in zip(times, values)]
            obstacles += along(places)
            labels.append(Label(f"metapool, {shot}-shot", *places[-1], colours[shot], bold=True))
            if shot == shots[-1]:
                # The first and the last say what the numbers are, which takes room on their outer sides.
                sides = {points[-1]["steps"]: "left", points[0]["steps"]: "right"}
                for point, (x, y) in zip(points, places):
                    steps = point["steps"]
                    text = f"{steps} steps" if point in (points[0], points[-1]) else str(steps)
                    axes.annotate(
                        text, (point["seconds"], point["shots"][shot]["mean"]), (0, 9), textcoords="offset points",
                        fontsize=9.5, color=INK, ha=sides.get(point["steps"], "center"),
                    )  # fmt: skip
                    obstacles.append((x - 26, y + 6, x + 26, y + 22))
        for reference in result["references"]:
            marks = {shot: value for shot, value in reference["shots"].items() if shot in colours}
            seconds = 60 * reference["minutes"]
            if not marks:
                continue
            axes.plot([seconds] * len(marks), list(marks.values()), color="#b9c0c9", linewidth=1.2, zorder=1)
            for shot, value in marks.items():
                axes.plot(
                    seconds, value, marker="s", markersize=6.5, markerfacecolor="white",
                    markeredgecolor=colours[shot], markeredgewidth=1.5,
                )  # fmt: skip
            places = [pixels(seconds, value) for value in marks.values()]
            obstacles += along(places)
            numbers = " and ".join(f"{value:g}" for value in marks.values())
            text = f"{reference['name']}, {reference['minutes']} minutes: {numbers}"
            labels.append(Label(text, *min(places, key=lambda place: place[1]), MUTED))
        write_labels(axes, labels, obstacles)
        for line, text in enumerate(CAPTION):
            drawn.text(0.018, 0.093 - 0.036 * line, text, fontsize=10.5, color=MUTED, va="baseline")
        svg = draw()
    return standalone(svg)


def along(places: list[tuple[float, float]]) -> list[Box]:
    """Boxes that names keep clear of: marks, and the lines between them.

    Args:
        places: of the marks, in pixels.

    Returns:
        The boxes.
    """
    found = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for (x0, y0), (x1, y1) in pairwise(places):
        pieces = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / 8))
        for piece in range(pieces):
            x, y = x0 + (piece + 0.5) / pieces * (x1 - x0), y0 + (piece + 0.5) / pieces * (y1 - y0)
            found.append((x - 4, y - 4, x + 4, y + 4))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures every point, writes one JSON file and one figure.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps_help = "numbers of training steps, in this order; default: 10 30 90 180 and then the recipe's"
    parser.add_argument("--steps", type=int, nargs="+", help=steps_help)
    parser.add_argument("--seed", type=int, default=0, help="of the clustering and of training")
    parser.add_argument("--small", action="store_true", help="tiny settings, to see that it works; needs --out")
    parser.add_argument("--figure-only", action="store_true", help="draw the figure of an earlier result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--figure", type=Path, help="SVG file; beside --out when that is given")
    options = parser.parse_args(arguments)
    if options.small and options.out == RESULTS:
        parser.error("--small needs --out: its numbers mean nothing, and must not replace a result")
    if any(steps < 1 for steps in options.steps or ()):
        parser.error("--steps: at least 1")
    where = options.figure or (FIGURE if options.out == RESULTS else options.out.with_suffix(".svg"))
    if not options.figure_only:
        recipe = load_recipe(None)
        method = recipe.method
        assert isinstance(method, TGR)
        budgets = options.steps or [*STEPS, method.steps]
        if options.small:
            recipe, method = small(recipe, method)
            budgets = options.steps or [1, 2]
        given = sys.argv[1:] if arguments is None else arguments
        jobs = workers(recipe.jobs)
        torch.set_num_threads(1)  # as the store has it; scoring too, as in a run
        result: dict[str, Any] = {
            "command": " ".join(["python benchmarks/accuracy_over_time.py", *given]),
            "machine": machine(torch.get_num_threads()),
            "settings": {
                "seed": options.seed,
                "jobs": jobs,
                "pool": recipe.pool,
                "method": method.model_dump(mode="json", exclude={"steps"}),
                "evaluation": recipe.evaluation.model_dump(mode="json"),
            },
            "references": REFERENCES,
            "stages": {},
            "shared_seconds": 0.0,
            "points": [],
        }
        # A training of as many steps would be found in the store.
        measure(recipe, method, list(dict.fromkeys(budgets)), options.seed, result, options.out)
    result = json.loads(options.out.read_text())
    replace_text(where, figure(result))
    print(table(result))


if __name__ == "__main__":
    main()
