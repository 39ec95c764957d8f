"""Methods by name. A method is a frozen settings object with ``fit``; it imports no other method."""

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import pydantic

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages
from metapool.base.store import Store
from metapool.embed import ProbeSettings
from metapool.ensemble import Ensemble
from metapool.learners import ANIL, MAML, FewShotModel, ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods.baselines import Average, BestSingle, EnsembleAll, MeanSingle, Untrained
from metapool.methods.bidf_mkd import BiDfMKD
from metapool.methods.dro import DRO
from metapool.methods.free import FREE
from metapool.methods.lora_recycle import FrozenBackbone, LoRARecycle
from metapool.methods.ota import OTA
from metapool.methods.purer import PURER
from metapool.methods.purer.calibration import Calibrated
from metapool.methods.teapot import Teapot
from metapool.methods.tgr import TGR
from metapool.pool import Access, ModelPool
from metapool.recover import AnyRecovery

__all__ = ["METHODS", "NAMED", "AnyMethod", "Method", "describe", "load_model", "recovery_of", "suits"]


class Method(Protocol):
    """One paper, or one honest baseline: the only boss of a run."""

    paper: ClassVar[str]
    """Authors, venue and number of the paper."""
    needs: ClassVar[Access]
    """What it must have of the pool's models."""
    version: ClassVar[int]
    """Raised when its mathematics changes."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> object:
        """Makes what workers of the store make, or other methods share, before :meth:`fit` uses it."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Makes a few-shot learner of a pool, without its data."""


METHODS = {
    "tgr": TGR,
    "free": FREE,
    "purer": PURER,
    "bidf-mkd": BiDfMKD,
    "teapot": Teapot,
    "ota": OTA,
    "dro": DRO,
    "lora-recycle": LoRARecycle,
    "frozen-backbone": FrozenBackbone,
    "ensemble": EnsembleAll,
    "best-single": BestSingle,
    "mean-single": MeanSingle,
    "average": Average,
    "untrained": Untrained,
}

AnyMethod = Annotated[
    TGR
    | FREE
    | PURER
    | BiDfMKD
    | Teapot
    | OTA
    | DRO
    | LoRARecycle
    | FrozenBackbone
    | EnsembleAll
    | BestSingle
    | MeanSingle
    | Average
    | Untrained,
    pydantic.Field(discriminator="name"),
]

_PAPER: dict[str, Any] = {"task_loss": "classify", "replay": "episodes", "batch": 50, "learning_rate": 1e-3}
NAMED: dict[str, AnyMethod] = {
    **{name: method() for name, method in METHODS.items()},
    "ensemble-whitened": EnsembleAll(whiten=0.25),
    "tgr-maml": TGR(**_PAPER, learner=MAML(), replay_updates=5, steps=16, width=32),
    "tgr-anil": TGR(**_PAPER, learner=ANIL(), replay_updates=5, steps=30),
    "tgr-released": TGR(
        **_PAPER,
        variant="released",
        probe=ProbeSettings(per_sample=False),
        learner=MAML(transductive=True),
        replay_updates=5,
        steps=16,
        width=32,
    ),
    "tgr-protonet": TGR(**_PAPER, learner=ProtoNet(), replay_updates=4, steps=100),
}
"""Methods at their defaults, the strongest rival known, and the paper's own TGR: its task loss with the learners that
it names (MAML with the 32 filters that its own paper uses), and what its released code does."""


def recovery_of(method: AnyMethod) -> AnyRecovery | None:
    """How a method recovers a bank, from which its rivals then start too.

    Args:
        method: any.

    Returns:
        Its recovery; none where it makes its images while it trains, or needs no images.
    """
    recovery: AnyRecovery | None = getattr(method, "recovery", None)
    return recovery


def suits(method: Method, pool: ModelPool) -> bool:
    """Whether a pool is of the kind that a method is made for: networks, or adapters of one backbone.

    Args:
        method: any.
        pool: the models.

    Returns:
        Whether to try; a method itself says what it misses.
    """
    adapters = all(entry.backbone is not None for entry in pool.manifest.models)
    return adapters == (method.needs == "adapters of one backbone")


def describe(method: Method) -> dict[str, Any]:
    """What a reader wants to know of a method before running it.

    Args:
        method: any.

    Returns:
        ``paper``, ``needs`` (what it must have of the pool's models), ``cost`` (the paragraph of its docstring, or of
        its file's, that starts so) and ``about`` (the first sentence of its docstring).
    """
    kind = type(method)
    texts = [inspect.cleandoc(text or "") for text in (kind.__doc__, sys.modules[kind.__module__].__doc__)]
    found = (re.search(r"^Cost[^:\n]*: (.+?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE) for text in texts)
    cost = next((match[1] for match in found if match), "")
    about = texts[0].split("\n\n")[0]
    return {"paper": kind.paper, "needs": kind.needs, "cost": " ".join(cost.split()), "about": " ".join(about.split())}


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
    kinds: dict[str, Callable[[Path], FewShotModel]] = {
        MetaModel.KIND: MetaModel.load,
        Ensemble.KIND: Ensemble.load,
        Calibrated.KIND: Calibrated.load,
    }
    if kind not in kinds:
        raise MetapoolError(f"{folder}/model.json: kind {kind!r} is not one of {', '.join(kinds)}")
    return kinds[kind](folder)
