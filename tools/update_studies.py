"""Takes finished studies into the repository and writes docs/studies.md: answers and figures come from committed JSON.

    python tools/update_studies.py [runs/study-gradients ...]

Each folder is what ``metapool study NAME`` wrote: table and JSON go to ``benchmarks/results/studies``. The figures in
``docs/studies`` are drawn from all JSON files there, and the page is written; without folders these two alone.
"""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from metapool.interface.studies import STUDIES
from metapool.interface.studies.study import Findings, figure_files

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results" / "studies", ROOT / "docs" / "studies"
PAGE = ROOT / "docs" / "studies.md"
HEAD = """# Studies

Questions about pools and methods, each answered by `metapool study NAME`. This page is written by
`python tools/update_studies.py` from `benchmarks/results/studies`: change those, not this page. An answer is made of
the numbers by the study itself; the table behind it lies beside its JSON file as CSV.
"""


def page() -> str:
    """The page of all studies that have a committed result.

    Returns:
        Markdown.
    """
    found = {name: RESULTS / f"{name}.json" for name in STUDIES}
    parts = [section(name, json.loads(path.read_text())) for name, path in found.items() if path.is_file()]
    missing = [f"`{name}`" for name, path in found.items() if not path.is_file()]
    if missing:
        parts.append(f"Not run at full size yet: {', '.join(missing)}.\n")
    return "\n".join([HEAD, *parts])


def section(name: str, result: dict[str, Any]) -> str:
    """What the page says of one study.

    Args:
        name: of the study.
        result: content of its JSON file.

    Returns:
        Markdown.
    """
    about = result["machine"]
    machine = f"{about.get('processor', about['cpu'])}, torch {about['torch']}"
    shown = [f"![{result['title']}](studies/{file})" for file in figures(name)]
    made = f"Made by `{result['command']}` on {machine}; all settings and {len(result['rows'])} rows are in"
    files = f"`benchmarks/results/studies/{name}.json` and `.csv`."
    return "\n\n".join(
        [f"## {result['title']}", f"After {result['source']}.", result["answer"], *shown, f"{made} {files}", ""]
    )


@cache
def figures(name: str) -> dict[str, str]:
    """Figures of a study, drawn from its committed result.

    Args:
        name: of the study.

    Returns:
        SVG by the file's name, the study's main figure first.
    """
    result = json.loads((RESULTS / f"{name}.json").read_text())
    findings = Findings(result["rows"], result["answer"], result["summary"])
    return figure_files(name, STUDIES[name].model_validate(result["settings"]), findings)


def take(folder: Path) -> None:
    """Copies a finished study's files to their places.

    Args:
        folder: ``runs/study-NAME``.

    Raises:
        SystemExit: when there is no finished study in it.
    """
    name = folder.name.removeprefix("study-")
    if name not in STUDIES or not (folder / f"{name}.json").is_file():
        raise SystemExit(f"{folder}: no result of a study lies there; `metapool study {name}` makes one")
    for kind in ("json", "csv"):
        shutil.copyfile(folder / f"{name}.{kind}", RESULTS / f"{name}.{kind}")


def main() -> None:
    """Takes the folders of the command line, then draws the figures and writes the page."""
    for folder in sys.argv[1:]:
        take(Path(folder))
    for name in STUDIES:
        if (RESULTS / f"{name}.json").is_file():
            for file, svg in figures(name).items():
                (FIGURES / file).write_text(svg)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
