"""How far the store is with what a command asked it for."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """A bar per stage on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console = Console(stderr=True)
        self.bars = Bars(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, kind: str, done: int, total: int) -> None:
        """Moves the bar of a stage on; it appears at its first call.

        Args:
            kind: the stage.
            done: how many of its pieces are there.
            total: of so many.
        """
        if kind not in self.tasks:
            self.tasks[kind] = self.bars.add_task(kind, total=total)
        self.bars.update(self.tasks[kind], completed=done, total=total)
