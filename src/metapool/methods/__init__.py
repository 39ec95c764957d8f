"""Methods by name. A method is a frozen settings object with ``fit``; it imports no other method."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import pydantic

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages
from metapool.base.store import Store
from metapool.ensemble import Ensemble
from metapool.learners import MAML, FewShotModel, ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.baselines import Average, BestSingle, EnsembleAll, MeanSingle, Untrained
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool

__all__ = ["METHODS", "NAMED", "AnyMethod", "Method", "load_model"]


class Method(Protocol):
    """One paper, or one honest baseline: the only boss of a run."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Makes a few-shot learner of a pool, without its data."""


METHODS = {
    "tgr": TGR,
    "ensemble": EnsembleAll,
    "best-single": BestSingle,
    "mean-single": MeanSingle,
    "average": Average,
    "untrained": Untrained,
}

AnyMethod = Annotated[
    TGR | EnsembleAll | BestSingle | MeanSingle | Average | Untrained, pydantic.Field(discriminator="name")
]

NAMED: dict[str, AnyMethod] = {
    **{name: method() for name, method in METHODS.items()},
    "ensemble-whitened": EnsembleAll(whiten=0.25),
    "tgr-maml": TGR(
        task_loss="classify",
        learner=MAML(),
        replay="episodes",
        replay_updates=5,
        steps=16,
        width=32,
        batch=50,
        learning_rate=1e-3,
    ),
    "tgr-protonet": TGR(
        task_loss="classify",
        learner=ProtoNet(),
        replay="episodes",
        replay_updates=4,
        steps=100,
        batch=50,
        learning_rate=1e-3,
    ),
}
"""Methods at their defaults, the strongest rival known, and the paper's own TGR (its task loss, with the learners that
it names; MAML with the 32 filters that its own paper uses)."""


def load_model(folder: Path) -> FewShotModel:
    """Reads a saved model of any kind.

    Args:
        folder: what a model's ``save`` filled.

    Returns:
        The model.

    Raises:
        MetapoolError: when there is none, or its kind is not known.
    """
    try:
        kind = json.loads((folder / "model.json").read_text())["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MetapoolError(f"{folder} holds no saved model: a model.json with a kind was expected") from error
    kinds: dict[str, Callable[[Path], FewShotModel]] = {MetaModel.KIND: MetaModel.load, Ensemble.KIND: Ensemble.load}
    if kind not in kinds:
        raise MetapoolError(f"{folder}/model.json: kind {kind!r} is not one of {', '.join(kinds)}")
    return kinds[kind](folder)
