"""What a study is: a question about pools and methods that a table answers and a figure shows."""

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import metapool
from metapool.base.errors import MetapoolError
from metapool.base.store import Settings, Store
from metapool.interface.figures import standalone
from metapool.interface.machine import this_machine
from metapool.interface.recipe import Recipe, load_recipe
from metapool.interface.run.files import replace_text, write_json
from metapool.methods.tgr import TGR

Row = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Findings:
    """What a study measured.

    Attributes:
        rows: the table, one mapping of column to value for each row, all with the same columns.
        answer: the answer to the question in one or two plain sentences, made of the numbers; also when it is "no".
        summary: numbers that are about all rows: correlations, intervals, counts, hashes.
    """

    rows: Sequence[Row]
    answer: str
    summary: Mapping[str, Any] = field(default_factory=dict)


class Study(Settings):
    """A question with the settings of its answer. Subclasses are one file each and are named in ``STUDIES``."""

    title: ClassVar[str]
    """What is asked, in half a line."""
    source: ClassVar[str]
    """The figure or theorem of a paper that it is about."""
    named: ClassVar[tuple[str, ...]]
    """The columns that tell a row from all others."""

    def sample(self) -> Self:
        """The same study cut down, to check a result at little cost: every row of it is a row of the whole study too.

        Returns:
            A study of the same kind; the study itself where there is nothing to cut.
        """
        return self

    def measure(self, store: Store) -> Findings:
        """Answers. The costly parts are artifacts of the store, so that a killed study goes on where it was.

        Args:
            store: finished stages; its ``jobs`` workers and its ``progress`` are the study's too.

        Returns:
            Table and answer.
        """
        raise NotImplementedError

    def draw(self, findings: Findings) -> dict[str, str]:
        """Figures, from the findings alone.

        Args:
            findings: what :meth:`measure` gave.

        Returns:
            Inline SVG by name; the name is put behind the study's own in the file's name, and may be empty.
        """
        raise NotImplementedError


CLASSIFY: Mapping[str, Any] = {"task_loss": "classify", "batch": 50, "learning_rate": 1e-3}
"""What the paper's task loss needs in a recipe of ours: its ten images of each class, and a smaller rate."""


def tgr_recipe(name: str) -> tuple[Recipe, TGR]:
    """A recipe of TGR, which a study is about.

    Args:
        name: of a shipped recipe, or a file.

    Returns:
        The recipe and its method.

    Raises:
        MetapoolError: when the recipe's method is another one.
    """
    recipe = load_recipe(name)
    if not isinstance(recipe.method, TGR):
        raise MetapoolError(f"recipe {name}: a recipe of tgr was expected, not of {recipe.method.name}")
    return recipe, recipe.method


def write_study(name: str, study: Study, store: Store, out: Path) -> Path:
    """Runs a study and writes what it found.

    Args:
        name: of the study.
        study: with its settings.
        store: finished stages.
        out: folder of runs.

    Returns:
        ``<out>/study-<name>``, with ``<name>.json``, ``<name>.csv`` and a figure or several.
    """
    findings = study.measure(store)
    folder = out / f"study-{name}"
    changed = study.model_dump(mode="json", exclude_defaults=True)
    flags = [f"--{field.replace('_', '-')} {_flag(value)}" for field, value in changed.items()]
    write_json(
        folder / f"{name}.json",
        {
            "study": name,
            "title": study.title,
            "source": study.source,
            "command": " ".join([f"metapool study {name}", *flags]),
            "version": metapool.__version__,
            "machine": this_machine(),
            "settings": study.model_dump(mode="json"),
            "answer": findings.answer,
            "summary": dict(findings.summary),
            "rows": [dict(row) for row in findings.rows],
        },
    )
    replace_text(folder / f"{name}.csv", table_as_csv(findings.rows))
    for file, svg in figure_files(name, study, findings).items():
        replace_text(folder / file, svg)
    return folder


def figure_files(name: str, study: Study, findings: Findings) -> dict[str, str]:
    """The figures of a study as files.

    Args:
        name: of the study.
        study: with its settings.
        findings: what it found, also as its JSON file has them.

    Returns:
        Content of the ``.svg`` files by their names.
    """
    drawn = study.draw(findings).items()
    return {f"{'-'.join(filter(None, (name, part)))}.svg": standalone(svg) for part, svg in drawn}


def table_as_csv(rows: Sequence[Row]) -> str:
    """A table as CSV.

    Args:
        rows: at least one; all with the columns of the first.

    Returns:
        Text with a line of column names.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flag(value: object) -> str:
    return shlex.join(map(str, value if isinstance(value, list) else [value]))
