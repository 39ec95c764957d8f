"""Puts the numbers of the study of the theorems into docs/theorems.md, after update_studies.py took the study's files.

python tools/update_theorems.py
"""

import json
from pathlib import Path
from typing import Any

from pages import filled

from metapool.interface.studies.theorems import lines

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "studies" / "theorems.json"
PAGE = ROOT / "docs" / "theorems.md"


def remainders_table(result: dict[str, Any]) -> list[str]:
    """Theorem 4.1 in numbers, every second halving.

    Args:
        result: content of the JSON file.

    Returns:
        Lines of Markdown.
    """
    powers = result["summary"]["power"]
    cases = {case: lines(result["rows"], "4.1", case) for case in powers}
    out = [
        "| α | " + " | ".join(f"{case} | by halving" for case in cases) + " |",
        "|---|" + "---|---|" * len(cases),
    ]
    for alpha in list(next(iter(cases.values()))["ratio"])[::2]:
        cells = [
            f"{found['detached'][alpha][0]:.1e} | {_between(found['ratio'][alpha], '.2f')}" for found in cases.values()
        ]
        out.append(f"| {alpha:.1e} | " + " | ".join(cells) + " |")
    for quantity in ("detached", "attached to α", "attached to 2α"):
        ends = (powers[case][quantity] for case in cases)
        cells = [f"{_between((end['mean'], end['low'], end['high']), '.2f')} |" for end in ends]
        out.append(f"| power, {quantity} | " + " | ".join(cells) + " |")
    return out


def tasks_table(result: dict[str, Any]) -> list[str]:
    """Theorem 3.2 in numbers.

    Args:
        result: content of the JSON file.

    Returns:
        Lines of Markdown.
    """
    out = [
        "| auxiliary images | distance | accuracy gain | risk alone | risk together | variance | bias | bound (B) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in result["settings"]["auxiliary"]:
        found = lines(result["rows"], "3.2", f"{size} images")
        for at in list(found["gain"])[::2]:
            parts = ("risk alone", "risk together", "variance", "bias")
            risks = [f"{found[part][at][0]:.4f}" for part in parts] + [f"{found['bound together'][at][0]:.2f}"]
            out.append(f"| {size} | {at:g} | {_between(found['gain'][at], '+.2f')} | " + " | ".join(risks) + " |")
    return out


def block(result: dict[str, Any]) -> str:
    """All between the markers.

    Args:
        result: content of the JSON file.

    Returns:
        Markdown.
    """
    settings, summary = result["settings"], result["summary"]
    remainder, risk = summary["bound_of_remainder"], summary["bound_of_risk"]
    basic, checked = settings["basic"], risk["checked"]
    above = ", ".join(f"{count} ({name})" for name, count in risk["above"].items())
    kinked = lines(result["rows"], "4.1", "conv4")
    larger = sum(kinked["detached"][alpha][0] > kinked["regularizer"][alpha][0] for alpha in kinked["detached"])
    loose = {name: f"{least:.0f} to {most:.0f}" for name, (least, _, most) in risk["looseness"].items()}
    return "\n".join(
        [
            result["answer"],
            "",
            f"**Theorem 4.1.** Remainder of the detached step in units of ‖ḡ‖, mean over {settings['seeds']} random "
            "problems of each kind, and what a further halving of α divides it by; 95 % intervals by bootstrap over "
            "the problems. Powers are slopes of straight lines through the logarithms of all means.",
            "",
            *remainders_table(result),
            "",
            f"Of {remainder['checked']} remainders of logistic regression {remainder['above']} are above α²ρR; the "
            f"largest is {remainder['largest_share']:.3f} of it. In the Conv4 the mean remainder exceeds the mean "
            f"regularizer at {larger} of {len(kinked['detached'])} displacements.",
            "",
            f"**Theorem 3.2.** A basic task of {basic} images, mean over {settings['draws']} draws; risks in nats, "
            "accuracy in points with 95 % intervals.",
            "",
            *tasks_table(result),
            "",
            f"Of {checked} draws each, above their bounds: {above}. The bound is {loose['variance']} times the "
            f"measured variance and {loose['bias']} times the measured bias.",
            "",
            f"Made by `{result['command']}`; `{RESULT.relative_to(ROOT)}` has the rest.",
        ]
    )


def page() -> str:
    """The page with the numbers of its results.

    Returns:
        Markdown.
    """
    return filled(PAGE, "theorems", block(json.loads(RESULT.read_text())))


def _between(values: Any, form: str) -> str:
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    PAGE.write_text(page())
