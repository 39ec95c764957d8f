"""Writes docs/results.md, a table for every scenario: from committed runs, never by hand.

    python tools/update_results.py [runs/multi_domain ...]

Each folder is what ``metapool run NAME`` wrote: its ``run.json`` and ``scores.json`` go to
``benchmarks/results/scenarios``, under the recipe's name. Then the page is written; without folders that alone.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from metapool.interface.report.files import Accuracy, MethodScore, Run, Scores, read_json
from metapool.interface.report.wording import common_shots, paired_gap, ranked

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
SCENARIOS = {
    "main": "Icons, three architectures",
    "emoji": "Emoji, three architectures",
    "logos": "Logos, three architectures",
    "multi_architecture": "Icons, five architectures",
    "multi_domain": "Icons, emoji and logos in one pool",
    "adapters": "Adapters of one transformer",
}
"""Titles, in the order of the page."""
FILES = ("run.json", "scores.json")
HEAD = """# Results

One table for each scenario: its recipe's method, printed bold, against its rivals on the same episodes of classes that
no model of the pool knows. [scenarios.md](scenarios.md) says what each scenario is and how to run it,
[methods.md](methods.md) compares the methods of the field, [studies.md](studies.md) asks what each part does. This page
is written by `python tools/update_results.py` from `benchmarks/results`: change those, not this page.

Accuracy is in percent, with the half width of its 95 % interval over episodes. Behind it stands, in points with a 95 %
interval of the paired difference, what the bold method has more. Networks are those that an answer needs; milliseconds
are of an answer to one image on one thread.
"""


def folders(results: Path) -> dict[str, Path]:
    """Committed runs.

    Args:
        results: where they lie; the main job's apart from those of the scenarios.

    Returns:
        Folder by name of the recipe, those of :data:`SCENARIOS` first.
    """
    found = {path.parent.name: path.parent for path in sorted((results / "scenarios").glob("*/run.json"))}
    if (results / "main" / "run.json").is_file():
        found["main"] = results / "main"
    order = [*SCENARIOS, *found]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def page(results: Path) -> str:
    """The whole page.

    Args:
        results: where committed runs lie.

    Returns:
        Markdown.
    """
    found = folders(results)
    read = {
        name: (read_json(path / "run.json", Run), read_json(path / "scores.json", Scores))
        for name, path in found.items()
    }
    parts = [section(SCENARIOS.get(name, name), run, scores) for name, (run, scores) in read.items()]
    missing = [f"`{name}`" for name in SCENARIOS if name not in found]
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.\n")
    return "\n".join([HEAD, *parts])


def section(title: str, run: Run, scores: Scores) -> str:
    """One scenario.

    Args:
        title: of the scenario.
        run: what ran on what.
        scores: what came out.

    Returns:
        Markdown: a table, best method first, and for pools of several domains one of these.
    """
    shots = common_shots(scores)

    def cells(name: str, row: MethodScore) -> list[str]:
        found = []
        for shot in shots:
            gap = paired_gap(scores, run.headline, name, shot)
            found += [_accuracy(row.shots, shot), f"{gap.mean:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})" if gap else ""]
        return [*found, str(row.models_at_inference), f"{row.ms_per_image:.2f}"]

    heads = [part for shot in shots for part in (f"{shot}-shot", "difference")]
    lines = _table(["method", *heads, "networks", "ms / image"], run, scores, cells)
    domains = list(scores.methods[run.headline].domains)
    if domains:
        pairs = [(domain, shot) for domain in domains for shot in shots]

        def by_domain(_: str, row: MethodScore) -> list[str]:
            return [_accuracy(row.domains[domain], shot) for domain, shot in pairs]

        heads = [f"{domain}, {shot}-shot" for domain, shot in pairs]
        alone = _table(["method", *heads], run, scores, by_domain)
        lines = [*lines, "", "The table above has means over domains; each alone:", "", *alone]
    about, kinds = scores.episodes, sorted({model.architecture for model in run.pool.models})
    accuracies = [model.accuracy for model in run.pool.models if model.accuracy is not None]
    own = f", right in {sum(accuracies) / len(accuracies):.1f} % of held-out images of their own classes" * bool(
        accuracies
    )
    pool = f"{len(run.pool.models)} models ({', '.join(kinds)}){own}."
    drawn = f"{about.n} {about.way}-way episodes{' of each domain' * bool(domains)}, {about.query} queries a class."
    machine = f"{run.machine.get('processor', run.machine.get('cpu', ''))}, torch {run.machine.get('torch', '')}"
    made = f"Made by `metapool run {run.name}`, seed {run.seed}, on {machine}."
    return "\n".join([f"## {title}: `{run.name}`", "", f"{pool} {drawn}", "", *lines, "", made, ""])


def _table(heads: Sequence[str], run: Run, scores: Scores, cells: Callable[[str, MethodScore], list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in ranked(scores):
        row = scores.methods[name]
        label = f"**{name}**" if name == run.headline else name if row.data_free else f"*{name}* (real images)"
        lines.append("| " + " | ".join([label, *cells(name, row)]) + " |")
    return lines


def _accuracy(scores: Mapping[int, Accuracy], shot: int) -> str:
    return f"{scores[shot].mean:.1f} ± {scores[shot].ci95:.1f}" if shot in scores else "–"


def take(folder: Path, results: Path) -> None:
    """Copies a finished run's files to their place.

    Args:
        folder: ``runs/NAME``.
        results: where committed runs lie.

    Raises:
        MetapoolError: when there is no finished run in it.
    """
    name = read_json(folder / "run.json", Run).name
    read_json(folder / "scores.json", Scores)
    place = results / "scenarios" / name.replace("/", "-")
    place.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(folder / file, place / file)


def main() -> None:
    """Takes the folders of the command line, then writes the page."""
    for folder in sys.argv[1:]:
        take(Path(folder), RESULTS)
    PAGE.write_text(page(RESULTS))


if __name__ == "__main__":
    main()
