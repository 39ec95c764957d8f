"""Takes finished studies into the repository and writes docs/studies.md: answers and figures come from committed JSON.

    python tools/update_studies.py [runs/study-gradients ...]

Each folder is what ``metapool study NAME`` wrote: table and JSON go to ``benchmarks/results/studies``, figures to
``docs/studies``. Without folders only the page is written anew.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from metapool.interface.studies import STUDIES

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
    machine = f"{result['machine']['cpu']}, torch {result['machine']['torch']}"
    figures = [
        f"![{result['title']}](studies/{path.name})"
        for path in sorted(FIGURES.glob(f"{name}*.svg"))
        if path.stem == name or path.stem.startswith(f"{name}-")
    ]
    made = f"Made by `{result['command']}` on {machine}; all settings and {len(result['rows'])} rows are in"
    files = f"`benchmarks/results/studies/{name}.json` and `.csv`."
    return "\n\n".join(
        [f"## {result['title']}", f"After {result['source']}.", result["answer"], *figures, f"{made} {files}", ""]
    )


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
    for place, kinds in ((RESULTS, ("json", "csv")), (FIGURES, ("svg",))):
        place.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            for path in sorted(folder.glob(f"{name}*.{kind}")):
                shutil.copyfile(path, place / path.name)


def main() -> None:
    """Takes the folders of the command line, then writes the page."""
    for folder in sys.argv[1:]:
        take(Path(folder))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
