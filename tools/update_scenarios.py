"""Puts the results of scenarios into docs/scenarios.md: from committed JSON, never by hand.

    cp runs/multi_domain/scores.json benchmarks/results/scenarios/multi_domain.json
    python tools/update_scenarios.py

Every file of ``benchmarks/results/scenarios`` is the ``scores.json`` of the run of the recipe of its name; a slash in
the recipe's name is a hyphen in the file's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import filled

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scenarios.md"
RESULTS = ROOT / "benchmarks" / "results" / "scenarios"


def table(scenarios: Mapping[str, dict[str, Any]]) -> str:
    """All scenarios in one table in Markdown, methods best first, domains below their mean.

    Args:
        scenarios: content of ``scores.json`` by name of the recipe.

    Returns:
        Markdown.
    """
    if not scenarios:
        return "No results yet: see the commands above."
    methods = [row for scores in scenarios.values() for row in scores["methods"].values()]
    shots = sorted({int(shot) for row in methods for shot in row["shots"]})
    heads = ["scenario", "method", *(f"{shot}-shot" for shot in shots), "networks", "ms / image"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for scenario, scores in scenarios.items():
        order = sorted(scores["methods"].items(), key=lambda item: -sum(s["mean"] for s in item[1]["shots"].values()))
        for name, row in order:
            cost = [str(row["models_at_inference"]), f"{row['ms_per_image']:.2f}"]
            lines.append(_line(scenario, name, row["shots"], shots, cost))
        for domain in order[0][1].get("domains", ()):
            lines += [_line(f"{scenario}, {domain}", name, row["domains"][domain], shots, []) for name, row in order]
    drawn = [
        f"{name}: {about['n']} {about['way']}-way episodes{' of each domain' * several} with {about['query']} queries"
        for name, scores in scenarios.items()
        for about in [scores["episodes"]]
        for several in ["domains" in next(iter(scores["methods"].values()))]
    ]
    said = "Unseen classes; percent with 95 % intervals over episodes. " + "; ".join(drawn) + " a class."
    return "\n".join([*lines, "", said])


def _line(scenario: str, method: str, scores: dict[str, Any], shots: list[int], cost: list[str]) -> str:
    known = [scores.get(str(shot)) for shot in shots]
    cells = ["–" if score is None else f"{score['mean']:.1f} ± {score['ci95']:.1f}" for score in known]
    return "| " + " | ".join([scenario, method, *cells, *(cost or ["", ""])]) + " |"


def update(page: Path, results: Path) -> None:
    """Rewrites a page between its markers.

    Args:
        page: Markdown with both markers.
        results: folder of ``<recipe>.json``; it may be missing.
    """
    found = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    page.write_text(filled(page, "scenarios", table(found)))


if __name__ == "__main__":
    update(PAGE, RESULTS)
