"""Pages and figures that are made of committed results."""

import json
import runpy
from pathlib import Path
from typing import Any

import pages
import pytest

from metapool.interface.studies import STUDIES

ROOT = Path(__file__).parent.parent
COMMITTED = [name for name in STUDIES if (ROOT / "benchmarks" / "results" / "studies" / f"{name}.json").is_file()]


@pytest.fixture(scope="module")
def studies() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "update_studies.py"))


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before <!-- a:begin -->\nold\n<!-- a:end --> after <!-- b:begin -->kept<!-- b:end -->")
    new = "before <!-- a:begin -->\n\\1 new\n<!-- a:end --> after <!-- b:begin -->kept<!-- b:end -->"
    assert pages.filled(page, "a", "\\1 new") == new
    with pytest.raises(SystemExit, match="c:begin"):
        pages.filled(page, "c", "new")


def test_the_page_of_studies_shows_the_committed_results(studies: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "studies.md").read_text()
    assert studies["page"]() == page
    assert COMMITTED
    for name in COMMITTED:
        answer = json.loads((ROOT / "benchmarks" / "results" / "studies" / f"{name}.json").read_text())["answer"]
        assert answer in page


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_figures_are_those_of_the_committed_numbers(name: str, studies: dict[str, Any]) -> None:
    drawn = studies["figures"](name)
    assert drawn
    for file, svg in drawn.items():
        assert (ROOT / "docs" / "studies" / file).read_text() == svg


def test_a_folder_without_a_study_is_refused(studies: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="metapool study theorems"):
        studies["take"](tmp_path / "study-theorems")
