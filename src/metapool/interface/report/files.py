"""The files of a run's folder, checked when read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from metapool.base.errors import MetapoolError

Kind = TypeVar("Kind", bound=pydantic.BaseModel)
Curves = dict[str, dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]
"""Steps and values by measure and method."""


class Accuracy(pydantic.BaseModel):
    """Mean over the episodes and half width of its 95 % interval, in percent."""

    mean: float
    ci95: float


class MethodScore(pydantic.BaseModel):
    """What one method reached, and what it costs to use."""

    data_free: bool
    parameters: int
    models_at_inference: int
    ms_per_image: float
    shots: dict[int, Accuracy]
    domains: dict[str, dict[int, Accuracy]] = {}
    transductive: bool = False
    note: str = ""


class Paired(pydantic.BaseModel):
    """Difference ``a`` minus ``b`` on the same episodes, with its 95 % interval, in points."""

    a: str
    b: str
    shot: int
    mean: float
    low: float
    high: float


class Episodes(pydantic.BaseModel):
    """The stored episodes that all methods were tested on."""

    hash: str
    way: int
    query: int
    n: int


class Scores(pydantic.BaseModel):
    """``scores.json``."""

    episodes: Episodes
    methods: dict[str, MethodScore] = pydantic.Field(min_length=1)
    paired: list[Paired] = []
    seconds: dict[str, float] = {}


class PoolModel(pydantic.BaseModel):
    """What ``run.json`` says of one model of the pool."""

    id: str
    architecture: str
    classes: list[str]
    width: int | None = None
    accuracy: float | None = None
    parameters: int | None = None
    licence: str | None = None


class Pool(pydantic.BaseModel):
    """The pool of a run."""

    name: str = ""
    models: list[PoolModel] = []


class Run(pydantic.BaseModel):
    """``run.json``."""

    name: str
    command: str
    headline: str
    version: str = ""
    seed: int = 0
    quick: bool = False
    recipe: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    started: str = ""
    pool: Pool = Pool()
    selected: dict[str, str | None] = {}
    resumed: bool = False


class Grouping(pydantic.BaseModel):
    """``grouping.json``."""

    models: list[str]
    dissimilarity: list[list[float]]
    groups: list[list[int]]


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Read one of a run's JSON files.

    Args:
        path: the file.
        kind: what it must hold; fields that it holds besides are ignored.

    Returns:
        Its content.

    Raises:
        MetapoolError: when the file is missing or holds something else.
    """
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise MetapoolError(f"{path} is missing: a report is made from the folder of a finished run") from error
    except (ValueError, OSError) as error:  # the errors of json and pydantic are ValueErrors
        raise MetapoolError(f"{path} does not hold what a run writes there: {error}") from error


def read_curves(path: Path, measures: Mapping[str, str]) -> Curves:
    """Read the records of training steps.

    A line cut short by a kill is skipped, and a step that a resumed run recorded again counts once.

    Args:
        path: ``steps.jsonl``; it may be missing.
        measures: the fields to read, with their titles.

    Returns:
        The measures that were recorded, in the order given.
    """
    steps: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            values = {name: float(record[name]) for name in measures if record.get(name) is not None}
            steps.setdefault(str(record["method"]), {})[int(record["step"])] = values
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    curves: Curves = {}
    for measure in measures:
        for method, records in steps.items():
            points = [(step, values[measure]) for step, values in sorted(records.items()) if measure in values]
            if points:
                known = np.array(points, dtype=np.float64)
                curves.setdefault(measure, {})[method] = (known[:, 0], known[:, 1])
    return curves
