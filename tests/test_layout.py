"""Rules of the tree that no linter knows: names that say something, files short enough, comparisons that count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "src" / "metapool").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SAYS_NOTHING = {"utils", "util", "misc", "common", "helpers", "tools"}


def of_root(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_tree_is_found() -> None:
    assert ROOT / "src" / "metapool" / "bank.py" in PACKAGE
    assert Path(__file__) in TESTS


@pytest.mark.parametrize("path", PACKAGE + TESTS, ids=of_root)
def test_no_module_or_folder_has_a_name_that_says_nothing(path: Path) -> None:
    parts = {part.strip("_") for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not parts & SAYS_NOTHING


@pytest.mark.parametrize("path", PACKAGE, ids=of_root)
def test_a_file_has_at_most_400_lines_and_a_method_250(path: Path) -> None:
    limit = 250 if path.parent.name == "methods" else 400
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{lines} lines: make it a folder of the same name with smaller pieces"


@pytest.mark.parametrize("path", TESTS, ids=of_root)
def test_no_comparison_is_thrown_away(path: Path) -> None:
    """``torch.allclose(a, b)`` alone on a line can't fail; ``assert_close`` can."""
    lost = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr)
        and (
            isinstance(node.value, ast.Compare)
            or (
                isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Attribute)
                and node.value.func.attr in {"allclose", "isclose", "equal", "array_equal"}
            )
        )
    ]
    assert lost == []
