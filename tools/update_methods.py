"""Puts comparisons into the pages that show them: tables come from committed JSON, never by hand.

    python tools/update_methods.py

``benchmarks/results/methods.json`` (of ``metapool compare``) goes into docs/methods.md, and ``differences.json`` (of
``metapool compare differences``) into docs/differences.md.
"""

import json
from pathlib import Path

from pages import filled

from metapool.interface.compare import table_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"methods": ROOT / "docs" / "methods.md", "differences": ROOT / "docs" / "differences.md"}


def page(name: str) -> str:
    """A page with the table of its results.

    Args:
        name: of the page and of its JSON file.

    Returns:
        Markdown; unchanged when there are no results.
    """
    results = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not results.is_file():
        return PAGES[name].read_text()
    result = json.loads(results.read_text())
    source = f"Made by `{result['command']}`; `{results.relative_to(ROOT)}` has the rest."
    return filled(PAGES[name], name, f"{table_of(result)}\n{source}")


def main() -> None:
    """Rewrites both pages."""
    for name, path in PAGES.items():
        path.write_text(page(name))


if __name__ == "__main__":
    main()
