"""What a plan says: stages, the folders of the store that each makes, minutes and bytes."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNITS = ("recover", "embed", "view")
"""Kinds of one part per model, which workers make side by side."""
METHODS = ("meta-model", "fit", "scores")
"""Kinds of one part per method; workers take a method each, all kinds of it."""


@dataclass
class Part:
    """A folder of the store that a run makes or reads.

    Attributes:
        stage: which makes it.
        name: model or method that it belongs to.
        about: a noun for what it is, if that needs saying, and its size.
        folder: where it is or will be; none where only the embeddings will tell.
        needed: whether a run asks for it; what only a finished model was made of, it does not.
        seconds: to make it.
        remaining: the same from the last checkpoint on.
        size: bytes on disk.
    """

    stage: str
    name: str
    about: tuple[str, str]
    folder: Path | None
    needed: bool
    seconds: float
    remaining: float
    size: float

    @property
    def stored(self) -> bool:
        """Whether it is there, or not needed and not known."""
        return not self.needed if self.folder is None else self.folder.exists()

    @property
    def missing(self) -> bool:
        """Whether a run would make it."""
        return self.needed and not self.stored


@dataclass(frozen=True)
class Stage:
    """Parts of one kind; of meta-training, those of one method.

    Attributes:
        name: of the stage.
        parts: what it makes.
        jobs: workers.
    """

    name: str
    parts: list[Part]
    jobs: int

    @property
    def what(self) -> str:
        """What it makes, in words."""
        counts = Counter(part.about for part in self.parts)
        named = (
            (f"{count} {noun}{'s' if count > 1 else ''}" if noun else "", size)
            for (noun, size), count in counts.items()
        )
        return "; ".join(", ".join(filter(None, pair)) for pair in named)

    @property
    def minutes(self) -> float:
        """Minutes of what is missing."""
        return self._minutes([part.remaining for part in self.parts if part.missing])

    @property
    def minutes_whole(self) -> float:
        """Minutes that all of it takes where there is nothing yet."""
        return self._minutes([part.seconds for part in self.parts])

    @property
    def gigabytes(self) -> float:
        """On disk, all of it."""
        return sum(part.size for part in self.parts) / 1e9

    @property
    def stored(self) -> int:
        """Number of parts that are there."""
        return sum(part.stored for part in self.parts)

    def _minutes(self, seconds: list[float]) -> float:
        kind = self.parts[0].stage
        workers = self.jobs if kind in METHODS else min(self.jobs, len(seconds)) if kind in UNITS else 1
        return sum(seconds) / max(1, workers) / 60


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        name: of the run.
        stages: in the order of the pipeline.
        memory: bytes that meta-training holds at its peak, roughly; 0 when there is none.
    """

    name: str
    stages: list[Stage]
    memory: float

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON: numbers are not rounded.

        Returns:
            Plain values: totals, stages, and of every stage its parts.
        """
        stages = [
            {
                "stage": stage.name,
                "what": stage.what,
                "minutes": stage.minutes,
                "minutes_whole": stage.minutes_whole,
                "disk_gigabytes": stage.gigabytes,
                "stored": stage.stored,
                "total": len(stage.parts),
                "parts": [
                    {
                        "name": part.name,
                        "artifact": None if part.folder is None else f"{part.folder.parent.name}/{part.folder.name}",
                        "stored": part.stored,
                        "needed": part.needed,
                        "seconds": part.remaining if part.missing else 0.0,
                        "seconds_whole": part.seconds,
                    }
                    for part in stage.parts
                ],
            }
            for stage in self.stages
        ]
        return {
            "name": self.name,
            "minutes": sum(stage.minutes for stage in self.stages),
            "minutes_whole": sum(stage.minutes_whole for stage in self.stages),
            "disk_gigabytes": sum(stage.gigabytes for stage in self.stages),
            "memory_gigabytes": self.memory / 1e9,
            "stages": stages,
        }


def plan_summary(plan: Plan) -> str:
    """A plan as a table for a terminal.

    Args:
        plan: the plan.

    Returns:
        A line per stage, a total, and a line about memory.
    """
    width = max(len("what"), *(len(stage.what) for stage in plan.stages))
    name = max(len(stage.name) for stage in plan.stages)
    lines = [f"{'stage':<{name}}  {'what':<{width}}  {'minutes':>7}  {'of':>6}  {'disk GB':>7}  in the store"]
    for stage in plan.stages:
        numbers = f"{stage.minutes:>7.1f}  {stage.minutes_whole:>6.1f}  {stage.gigabytes:>7.2f}"
        lines.append(f"{stage.name:<{name}}  {stage.what:<{width}}  {numbers}  {stage.stored} of {len(stage.parts)}")
    told = plan.as_dict()
    numbers = f"{told['minutes']:>7.1f}  {told['minutes_whole']:>6.1f}  {told['disk_gigabytes']:>7.2f}"
    lines.append(f"{'total still to do':<{name + 2 + width}}  {numbers}")
    if plan.memory:
        lines.append(f"meta-training holds about {plan.memory / 1e9:.1f} GB of memory")
    return "\n".join(lines)
