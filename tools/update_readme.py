"""Puts a finished run's table and first figure into the README: results come from committed JSON, never by hand.

    python tools/update_readme.py benchmarks/results/main

The folder holds ``scores.json`` and ``run.json`` of a run (copied there from ``runs/main``).
"""

import json
import sys
from pathlib import Path
from typing import Any

from pages import filled

from metapool.interface.figures import accuracy_against_cost, standalone
from metapool.interface.report.files import Scores
from metapool.interface.report.wording import points_of

ROOT = Path(__file__).resolve().parent.parent


def table(run: dict[str, Any], scores: dict[str, Any]) -> str:
    """The results table in Markdown, best first, with seed and episodes below.

    Args:
        run: content of ``run.json``.
        scores: content of ``scores.json``.

    Returns:
        Markdown.
    """
    shots = list(next(iter(scores["methods"].values()))["shots"])
    head = ["method", *(f"{shot}-shot" for shot in shots), "networks", "parameters", "ms / image"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    by_accuracy = sorted(scores["methods"].items(), key=lambda item: -sum(s["mean"] for s in item[1]["shots"].values()))
    for name, row in by_accuracy:
        label = f"**{name}**" if name == run["headline"] else name if row["data_free"] else f"*{name}* (real images)"
        cells = [f"{row['shots'][shot]['mean']:.1f} ± {row['shots'][shot]['ci95']:.1f}" for shot in shots]
        cost = [str(row["models_at_inference"]), f"{row['parameters'] / 1e6:.2f} M", f"{row['ms_per_image']:.2f}"]
        lines.append("| " + " | ".join([label, *cells, *cost]) + " |")
    episodes = scores["episodes"]
    lines += [
        "",
        f"{episodes['n']} {episodes['way']}-way episodes of unseen classes, {episodes['query']} queries a class; "
        f"percent with 95 % intervals; seed {run['seed']}, {len(run['pool']['models'])} models; times on one thread. "
        "From `benchmarks/results/main/scores.json`, made by `make run`.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrites README.md between its markers."""
    folder = Path(sys.argv[1])
    run, scores = (json.loads((folder / name).read_text()) for name in ("run.json", "scores.json"))
    readme = ROOT / "README.md"
    readme.write_text(filled(readme, "results", table(run, scores)))
    shot = max(int(shot) for row in scores["methods"].values() for shot in row["shots"])
    points = points_of(Scores.model_validate(scores), shot, run["headline"])
    figure = accuracy_against_cost(points, f"{shot}-shot accuracy, {scores['episodes']['way']}-way (%)")
    (ROOT / "docs" / "accuracy-against-cost.svg").write_text(standalone(figure))


if __name__ == "__main__":
    main()
