"""Whether a method keeps the promises of a method, as scikit-learn's ``check_estimator`` asks of an estimator.

    from metapool.check import check_method
    check_method(MyMethod(steps=30, width=8, way=3))

The method is fitted on a toy pool (three small classifiers of striped images, made here in seconds) and scored on kinds
of stripes that no model of the pool knows. Give it settings that take seconds; the promises do not depend on them.
"""

import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from metapool.base.images import LabelledImages, to_bytes, to_float
from metapool.base.store import Store, silent
from metapool.episodes import Episodes, sample_episodes
from metapool.evaluate import evaluate
from metapool.learners import FewShotModel
from metapool.methods import Method, describe, load_model
from metapool.pool import ModelPool
from metapool.realdata.datasets import DATA
from metapool.realdata.pretrain import PoolSettings, build_pool

SIDE = 16
KINDS = tuple((degrees, pixels) for pixels in (4, 8) for degrees in range(0, 180, 30))
"""Twelve classes: six directions of fine and of coarse stripes."""
POOL_KINDS = (0, 1, 2, 4, 5, 7, 9, 10)
NEW_KINDS = (3, 6, 8, 11)
TRAINING = PoolSettings(models=3, way=3, architectures=("conv4:8",), epochs=12, batch=16, shift=1)


def stripes(kinds: Sequence[int], per_class: int, seed: int = 0) -> LabelledImages:
    """Grey images of stripes whose phase and noise are random, so that no pixel tells the class.

    Args:
        kinds: classes, as places in :data:`KINDS`.
        per_class: images of each.
        seed: of phases and noise.

    Returns:
        uint8 images [N, 1, 16, 16] with labels in the order of ``kinds``.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = []
    for kind in kinds:
        degrees, pixels = KINDS[kind]
        across = rows * math.cos(math.radians(degrees)) + columns * math.sin(math.radians(degrees))
        phase = torch.rand(per_class, 1, 1, 1, generator=generator)
        noise = 0.1 * torch.randn(per_class, 1, SIDE, SIDE, generator=generator)
        images.append(0.5 + 0.4 * torch.sin(2 * math.pi * (across / pixels + phase)) + noise)
    labels = torch.arange(len(kinds)).repeat_interleave(per_class)
    names = tuple("{}-degrees-{}-pixels".format(*KINDS[kind]) for kind in kinds)
    return LabelledImages(to_bytes(torch.cat(images)), labels, names)


def striped_pool(folder: Path, training: PoolSettings = TRAINING) -> ModelPool:
    """Small models, each of three kinds of stripes.

    Args:
        folder: of the pool; its models are kept in a store beside it until it is whole.
        training: how many, and how they are trained.

    Returns:
        The pool.
    """
    store = Store(folder.parent / f"{folder.name}-store", threads=1)
    return build_pool(stripes(POOL_KINDS, 25), training, store, folder, name="stripes", seed=0, licence="CC0-1.0")


@dataclass(frozen=True)
class World:
    """Where methods are checked.

    Attributes:
        root: a folder for stores and models.
        pool: the models.
        images: of classes that no model knows.
        episodes: of them.
    """

    root: Path
    pool: ModelPool
    images: LabelledImages
    episodes: Episodes

    def store(self, name: str, progress: Any = silent) -> Store:
        """A store of its own.

        Args:
            name: the same name gives the same store.
            progress: called as by every store.

        Returns:
            The store, which works in this process.
        """
        return Store(self.root / name, progress=progress)

    def fit(self, method: Any, store: Store, seed: int = 0) -> Path:
        """Fits and saves.

        Args:
            method: any.
            store: keeps the stages.
            seed: of the fit.

        Returns:
            The folder of the saved model.
        """
        return store.artifact(
            "checked",
            {"method": method.model_dump(mode="json"), "seed": seed},
            lambda folder: method.fit(self.pool, store, seed).save(folder),
        )


def make_world(root: Path) -> World:
    """The striped world.

    Args:
        root: an empty folder.

    Returns:
        The world.
    """
    images = stripes(NEW_KINDS, 20, seed=5)
    return World(root, striped_pool(root / "pool"), images, sample_episodes(images, 4, 5, 5, 60, 0))


class BrokenPromise(AssertionError):
    """A method that does not do what every method does."""


def check_method(method: Method, world: World | None = None) -> None:
    """Asks a method to keep all promises of :data:`CHECKS`, one after the other.

    Args:
        method: with settings that take seconds on the toy pool.
        world: where, when many methods are checked; a new one when not given.

    Raises:
        BrokenPromise: the first that it does not keep, with what was found.
    """
    if world is None:
        with tempfile.TemporaryDirectory() as folder:
            check_method(method, make_world(Path(folder)))
        return
    for name, check in CHECKS.items():
        try:
            check(method, world)
        except BrokenPromise as broken:
            raise BrokenPromise(f"{type(method).__name__} {name}: {broken}") from broken


def _promise(kept: bool, otherwise: str) -> None:
    if not kept:
        raise BrokenPromise(otherwise)


def _settings(method: Any, world: World) -> None:
    kind = type(method)
    again = kind.model_validate(yaml.safe_load(yaml.safe_dump(method.model_dump(mode="json"))))
    _promise(again == method, "its settings change on their way through YAML")
    _promise(again.digest() == method.digest(), "equal settings have unequal digests")
    unsaid = [name for name, field in kind.model_fields.items() if not field.description]
    _promise(not unsaid, f"a sentence is missing below the setting {', '.join(unsaid)}")
    _promise(kind.model_fields["name"].default == method.name, "its name can be set to something else")
    _promise(kind.model_config.get("frozen") is True, "its settings can be changed after they are made")


def _paper(method: Any, world: World) -> None:
    about = describe(method)
    honest = about["paper"].startswith("honest baseline")
    _promise(honest or bool(re.search(r"\b(19|20)\d\d\b", about["paper"])), f"paper {about['paper']!r} names no year")
    _promise(bool(about["about"]), "it has no docstring")
    _promise(bool(about["cost"]), "no paragraph of its docstring, or of its file's, starts with 'Cost'")
    number = re.search(r"\d{4}\.\d{5}", about["paper"])
    text = sys.modules[type(method).__module__].__doc__ or ""
    _promise(number is None or number[0] in text, "its file's docstring does not cite its paper")


def _same_bits(method: Method, world: World) -> None:
    first = _bytes(world.fit(method, world.store("whole")))
    torch.manual_seed(1)  # decides nothing
    second = _bytes(world.fit(method, world.store("again")))
    _promise(first == second, "the same seed gives other bits")


def _resume(method: Method, world: World) -> None:
    """Stopped once in the middle of every stage and loop that tells its progress, and called again."""

    def stop(kind: str, done: int, total: int) -> None:
        if total / 2 < done < total and kind not in stopped:
            stopped.add(kind)
            raise KeyboardInterrupt

    stopped: set[str] = set()
    broken: Path | None = None
    while broken is None:
        with suppress(KeyboardInterrupt):
            broken = world.fit(method, world.store("broken", stop))
    whole = world.fit(method, world.store("whole"))
    _promise(_bytes(broken) == _bytes(whole), f"stopped in {', '.join(stopped)}, it ends with other bits")


def _beats_chance(method: Method, world: World) -> None:
    model = load_model(world.fit(method, world.store("whole")))
    chance = 100 / world.episodes.way
    low = evaluate(model, world.images, world.episodes).interval.low
    _promise(low > chance + 5, f"accuracy on new classes may be as low as {low:.1f} %, chance is {chance:.1f} %")


def _saves(method: Method, world: World) -> None:
    fitted = method.fit(world.pool, world.store("whole"), 0)
    folder = world.fit(method, world.store("whole"))
    loaded = load_model(folder)
    _promise(bool(torch.equal(_answers(fitted), _answers(loaded))), "a saved and loaded model answers otherwise")
    _promise(loaded.parameter_count > 0 and loaded.models_at_inference > 0, "it does not say what an answer costs")
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 1])
    images = to_float(world.images.images)
    logits = loaded.classify(loaded.encode(images[:7]), labels, loaded.encode(images[7:9]))
    _promise(tuple(logits.shape[-2:]) == (2, 3), f"3 classes with 2, 2 and 3 images gave {tuple(logits.shape)}")


def _inductive(method: Method, world: World) -> None:
    model = load_model(world.fit(method, world.store("whole")))
    if getattr(model, "transductive", False):
        return  # every table marks it
    images, labels = to_float(world.images.images), torch.tensor([0, 1, 2, 3])
    support, query = model.encode(images[::20]), model.encode(images[1::10])
    together, alone = model.classify(support, labels, query), model.classify(support, labels, query[:1])
    close = torch.allclose(together[..., :1, :], alone, rtol=1e-3, atol=1e-3)
    _promise(close, "an answer depends on the other queries, and the model does not say that it is transductive")


def _no_real_data(method: Method, world: World) -> None:
    with _opened_files() as opened:
        method.fit(world.pool, world.store("watched"), 0)
    seen = sorted({path for path in opened if Path(path).is_relative_to(DATA)})
    _promise(not seen, f"it read real images: {', '.join(seen)}")


CHECKS: dict[str, Callable[[Method, World], None]] = {
    "settings go through YAML and back": _settings,
    "cites its paper and says what it costs": _paper,
    "same seed, same bits": _same_bits,
    "stopped and started again ends with the same bits": _resume,
    "beats chance on a pool that can be solved": _beats_chance,
    "saves, loads and answers alike": _saves,
    "answers each query by itself": _inductive,
    "reads no real data": _no_real_data,
}
"""The promises, by name."""


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def _answers(model: FewShotModel) -> Tensor:
    images = to_float(stripes(NEW_KINDS, 4, seed=9).images)
    return model.classify(model.encode(images[::4]), torch.arange(4), model.encode(images[1::2]))


_watching: list[list[str]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open":
        _watching[-1].append(str(arguments[0]))


@contextmanager
def _opened_files() -> Iterator[list[str]]:
    """Paths of all files that this process opens within the context."""
    if _note not in _hooks:
        sys.addaudithook(_note)  # for good: there is no way to take one out
        _hooks.append(_note)
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


_hooks: list[Callable[[str, tuple[Any, ...]], None]] = []
