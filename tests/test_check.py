"""``check_method``: every method keeps every promise, and a method that breaks one is told which."""

import random
import runpy
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import toys

from metapool.base.images import LabelledImages
from metapool.base.store import Settings, Store
from metapool.check import CHECKS, BrokenPromise, World, check_method, make_world
from metapool.methods import METHODS
from metapool.methods.baselines import MeanSingle, Untrained
from metapool.methods.tgr import TGR
from metapool.pool import Access, ModelPool
from metapool.realdata import datasets
from metapool.recover import AnyRecovery


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if "adapters" not in kind.needs])
def test_every_method_keeps_its_promises(name: str, world: World) -> None:
    kind = METHODS[name]
    recovery = {"recovery": toys.RECOVERY} if "recovery" in kind.model_fields else {}
    check_method(kind(**toys.SMALL[kind], **recovery), world)


def test_the_example_of_a_method_runs_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parent.parent / "examples" / "add_a_method.py"
    runpy.run_path(str(example), run_name="__main__")
    out = capsys.readouterr().out
    assert "it keeps every promise of a method" in out
    assert "5-way 1-shot" in out


class Honest(MeanSingle):
    """Each model alone, under another name."""

    name: Literal["honest"] = "honest"  # type: ignore[assignment]
    """Which method this is."""
    recovery: AnyRecovery = toys.HASTY
    """How the bank is made."""


class Nameless(Honest):
    """Says nothing of a setting."""

    mystery: int = 3


class Uncited(Honest):
    """Names no paper."""

    paper: ClassVar[str] = "somebody's idea"


class Moody(Honest):
    """Gives what the day brings."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> Any:
        model = super().fit(pool, store, seed, validation)
        with torch.no_grad():
            next(iter(model.models))  # type: ignore[attr-defined]
            model.models[0].network.head.bias += random.random()  # type: ignore[attr-defined]
        return model


class Blind(Untrained):
    """Looks at black images."""

    name: Literal["blind"] = "blind"  # type: ignore[assignment]
    """Which method this is."""
    recovery: AnyRecovery = toys.HASTY
    """How the bank is made."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> Any:
        model = super().fit(pool, store, seed, validation)
        for parameter in model.network.parameters():  # type: ignore[attr-defined]
            parameter.data.zero_()
        return model


class Cheat(Honest):
    """Reads real images."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> Any:
        datasets.load("icons", "train")
        return super().fit(pool, store, seed, validation)


class Unpriced(Settings):
    """Says nothing of money."""

    paper: ClassVar[str] = "Nobody, NeurIPS 2020"
    needs: ClassVar[Access] = "nothing"
    version: ClassVar[int] = 1
    name: Literal["unpriced"] = "unpriced"
    """Which method this is."""


BROKEN: dict[str, tuple[Any, str]] = {
    "settings go through YAML and back": (Nameless(), "mystery"),
    "cites its paper and says what it costs": (Uncited(), "names no year"),
    "same seed, same bits": (Moody(), "other bits"),
    "beats chance on a pool that can be solved": (Blind(width=4), "chance is 25.0"),
    "reads no real data": (Cheat(), "icons-train.npz"),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_a_broken_promise_is_named(promise: str, world: World) -> None:
    method, said = BROKEN[promise]
    with pytest.raises(BrokenPromise, match=said):
        CHECKS[promise](method, World(world.root / type(method).__name__, world.pool, world.images, world.episodes))


def test_the_first_broken_promise_ends_the_check(world: World) -> None:
    with pytest.raises(BrokenPromise, match=r"Unpriced cites its paper.*starts with 'Cost'"):
        check_method(Unpriced(), world)  # type: ignore[arg-type]


def test_a_loop_that_forgets_where_it_was_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    method = TGR(**toys.SMALL_TGR, recovery=toys.HASTY)
    check = CHECKS["stopped and started again ends with the same bits"]
    check(method, World(world.root / "sound", world.pool, world.images, world.episodes))
    monkeypatch.setattr("metapool.training.Training.load_state_dict", lambda *_: None)
    with pytest.raises(BrokenPromise, match="stopped in"):
        check(method, World(world.root / "forgetful", world.pool, world.images, world.episodes))
