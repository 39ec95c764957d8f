"""Puts comparisons into the pages that show them: tables come from committed JSON, never by hand.

    python tools/update_methods.py

``benchmarks/results/methods.json`` (of ``metapool compare``) goes into docs/methods.md, and ``differences.json`` (of
``metapool compare differences``) into docs/differences.md.
"""

import json
import re
from pathlib import Path

from metapool.interface.compare import table_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"methods": ROOT / "docs" / "methods.md", "differences": ROOT / "docs" / "differences.md"}


def filled(name: str) -> str:
    """A page with the table of its results.

    Args:
        name: of the page and of its JSON file.

    Returns:
        Markdown; unchanged when there are no results.

    Raises:
        SystemExit: when the page has no markers.
    """
    text, results = PAGES[name].read_text(), ROOT / "benchmarks" / "results" / f"{name}.json"
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"{PAGES[name]} needs the lines {begin} and {end}")
    if not results.is_file():
        return text
    result = json.loads(results.read_text())
    source = f"Made by `{result['command']}`; `{results.relative_to(ROOT)}` has the rest."
    table = f"{begin}\n{table_of(result)}\n{source}\n{end}"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrites both pages."""
    for name, page in PAGES.items():
        page.write_text(filled(name))


if __name__ == "__main__":
    main()
