"""Pages of the documentation whose tables come from committed JSON, never by hand: what stands between two markers."""

import re
from pathlib import Path


def filled(page: Path, name: str, content: str) -> str:
    """A page with other content between its markers, ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Args:
        page: the file; it is not changed.
        name: of the markers.
        content: Markdown.

    Returns:
        The whole page.

    Raises:
        SystemExit: when a marker is missing.
    """
    text, begin, end = page.read_text(), f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"{page} needs the lines {begin} and {end}")
    new = f"{begin}\n{content}\n{end}"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: new, text, flags=re.DOTALL)
