"""What is held in memory: no growth from step to step, a bank that is mapped, one model of the pool at a time."""

import ctypes
import gc
import multiprocessing
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import pytest
import safetensors.torch
import torch
from torch import Tensor
from toys import HASTY

from metapool.bank import RecoveredTask, TaskBank
from metapool.base.functional import Params
from metapool.base.networks import build
from metapool.base.store import Store
from metapool.embed import ProbeSettings, embed_bank
from metapool.gradients import Batch, GradientStats, TaskLoss, implicit_step
from metapool.learners import MAML
from metapool.methods import tgr
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import recover_pool
from metapool.views import Views, ViewSettings, view_bank

MAPS, STATM = Path("/proc/self/smaps"), Path("/proc/self/statm")
SHAPE = (1, 16, 16)
MEGABYTE = 2**20


def untrained_pool(path: Path, models: int) -> ModelPool:
    pool = ModelPool.create(path, "untrained")
    for index in range(models):
        spec = cases.network_spec("conv4", SHAPE, classes=3)
        network = build(spec, torch.Generator().manual_seed(index))
        pool.add(PretrainedModel(f"model-{index}", network, cases.input_spec(SHAPE), tuple("abc"), spec=spec))
    return pool


# The training loop: TGR's own, looked at from outside.

SHORT: dict[str, Any] = {
    "recovery": HASTY,
    "probe": ProbeSettings(width=4, steps=2, batch=8),
    "groups": 1,
    "teachers": 2,
    "width": 4,
    "way": 3,
    "query": 2,
    "batch": 8,
    "replay_updates": 1,
    "replay_batch": 16,
    "replay_tasks": 1,
    "views": ViewSettings(copies=1, blends=1),
    "check_every": 50,
}
SECOND_ORDER = TGR(**SHORT, task_loss="episodic", replay="episodes", learner=MAML(inner_steps=1), steps=500)
"""Graphs of gradients of gradients: what is left alive by mistake most often."""
RELATIONAL = TGR(**SHORT, steps=500)
"""The main job's loss, replay and learner."""
ROOM = 4 * MEGABYTE
"""More is growth. A graph that every step of ``SECOND_ORDER`` leaves takes as much after a dozen of them."""


@dataclass(frozen=True)
class Held:
    """What a process holds after some step; bytes are none where the system does not tell."""

    tensors: int
    heap: int | None
    resident: int | None

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        # By type: isinstance() would ask some of torch's lazy objects for their class, which imports things.
        tensors = sum(issubclass(type(one), Tensor) for one in gc.get_objects())
        return cls(tensors, heap_bytes(), resident_bytes())


class _HeapInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc: ten numbers, of which ``hblkhd`` and ``uordblks`` are bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "free", "top")
    ]


def heap_bytes() -> int | None:
    """Allocated and not freed. Resident memory cannot say that exactly: what is freed may stay with the process."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo.restype = _HeapInfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def resident_bytes() -> int | None:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.is_file() else None


def train(folder: Path, method: TGR, looks: tuple[int, ...], leak: bool = False) -> tuple[list[Held], list[Any]]:
    """Fits a method on three untrained models.

    Args:
        folder: for pool and store.
        method: what to fit.
        looks: numbers of steps after which to look.
        leak: whether the loop is a careless one, see ``leaking_step``.

    Returns:
        What was held at every look, and the loop's records as the last checkpoint has them.
    """
    torch.set_num_threads(1)
    seen: list[Held] = []

    def look(stage: str, done: int, _total: int) -> None:
        if stage == "meta-train" and done in looks:
            seen.append(Held.now())

    if leak:
        tgr.implicit_step = leaking_step()
    method.fit(untrained_pool(folder / "pool", 3), Store(folder / "store", threads=1, progress=look), seed=0)
    (checkpoint,) = (folder / "store" / "checkpoints").glob("meta-train-*.pt")
    return seen, torch.load(checkpoint, weights_only=True)["state"]["training"]["records"]


def leaking_step() -> Callable[..., tuple[Params, GradientStats]]:
    """``implicit_step`` with the classical mistake: losses are kept, and with each all that it was computed from."""
    kept: list[Tensor] = []

    def step(task_loss: TaskLoss, params: Params, batches: Batch, *rest: Any) -> tuple[Params, GradientStats]:
        kept.append(task_loss(params, tuple(tensor[0] for tensor in batches)))
        return implicit_step(task_loss, params, batches, *rest)

    return step


def train_apart(*arguments: Any) -> tuple[list[Held], list[Any]]:
    """``train`` in a process of its own, in which no memory that other tests have freed hides a leak."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(train, *arguments).result()


@pytest.mark.parametrize("method", [SECOND_ORDER, RELATIONAL], ids=["second-order", "relational"])
def test_500_steps_hold_what_100_hold(method: TGR, tmp_path: Path) -> None:
    (early, middle, late), records = train_apart(tmp_path, method, (100, 300, 500))
    assert early.tensors >= middle.tensors == late.tensors, "none is left behind; layers that freeze give some back"
    if early.heap is not None and late.heap is not None:
        assert late.heap - early.heap < ROOM
    if early.resident is not None and late.resident is not None:
        assert late.resident - early.resident < ROOM
    assert len(records) == 500
    kinds = {type(value) for record in records for value in record.values()}
    assert kinds <= {int, float, str, type(None)}, "a record is plain values: a tensor in it would keep its graph"


def test_a_loop_that_keeps_its_losses_is_caught(tmp_path: Path) -> None:
    method = SECOND_ORDER.model_copy(update={"steps": 60})
    (early, late), _ = train_apart(tmp_path, method, (20, 60), True)
    assert late.tensors > early.tensors
    if early.heap is not None and late.heap is not None:
        assert late.heap - early.heap > ROOM
    if early.resident is not None and late.resident is not None:
        assert late.resident - early.resident > ROOM


def view_of_all(pool: ModelPool, bank: TaskBank, store: Store) -> Views:
    return view_bank(pool, bank, [pool.ids], cases.input_spec(SHAPE), ViewSettings(copies=1, blends=1), store)[0]


# The bank: safetensors maps a file into memory, copy on write, and its tensors are views of the mapping.

needs_maps = pytest.mark.skipif(not MAPS.is_file(), reason="the system does not list what a process has mapped")


@dataclass(frozen=True)
class Mapping:
    """A part of a file in the address space of this process."""

    start: int
    end: int
    resident: int
    """Bytes of it that are in memory."""


def mappings(file: Path) -> list[Mapping]:
    found: list[Mapping] = []
    here, bounds = False, [0, 0]
    for line in MAPS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            here = rest[-1] == str(file.resolve())
            bounds = [int(bound, 16) for bound in first.split("-")]
        elif here and first == "Rss:":
            found.append(Mapping(*bounds, 1024 * int(rest[0])))
    return found


def is_mapped(tensor: Tensor, file: Path) -> bool:
    start = tensor.data_ptr()
    return any(one.start <= start and start + tensor.nbytes <= one.end for one in mappings(file))


IMAGES = 32_000
BYTES = IMAGES * 32 * 32


@pytest.fixture
def large_bank(tmp_path: Path) -> TaskBank:
    """Two tasks of 31 MB each."""
    images = torch.zeros(IMAGES, 1, 32, 32, dtype=torch.uint8)
    task = RecoveredTask(images, torch.zeros(IMAGES, dtype=torch.int64), torch.zeros(IMAGES, 2), ("a", "b"), {})
    folders = {name: tmp_path / name for name in ("one", "other")}
    for folder in folders.values():
        folder.mkdir()
        task.save(folder)
    return TaskBank(folders)


@needs_maps
def test_a_task_is_mapped_and_read_as_it_is_used(large_bank: TaskBank) -> None:
    file, other = (folder / "task.safetensors" for folder in large_bank.folders.values())
    task = large_bank["one"]
    assert all(is_mapped(tensor, file) for tensor in (task.images, task.labels, task.logits))
    assert sum(one.resident for one in mappings(file)) < BYTES / 8, "opening it reads no more than its header"
    task.images[:100].sum()
    assert sum(one.resident for one in mappings(file)) < BYTES / 4, "some images are read, and what lies around them"
    task.images.sum()
    assert sum(one.resident for one in mappings(file)) >= BYTES, "and here the numbers show that all were read"
    assert mappings(other) == [], "the other task was not opened"
    del task
    assert mappings(file) == []


@needs_maps
def test_a_copy_is_not_taken_for_a_mapping(large_bank: TaskBank) -> None:
    file = large_bank.folders["one"] / "task.safetensors"
    copied = safetensors.torch.load(file.read_bytes())
    assert not is_mapped(copied["images"], file)
    assert not is_mapped(large_bank["one"].images.clone(), file)


@needs_maps
def test_images_and_outputs_of_views_are_mapped(tmp_path: Path) -> None:
    pool, store = untrained_pool(tmp_path / "pool", 2), Store(tmp_path / "store", threads=1)
    views = view_of_all(pool, recover_pool(pool, HASTY, store), store)
    (images,) = (tmp_path / "store" / "view-images").glob("*/images.safetensors")
    assert is_mapped(views.images, images)
    outputs = list((tmp_path / "store" / "view").glob("*/view.safetensors"))
    assert len(outputs) == 2
    for tensor in (*views.features.values(), *views.logits.values()):
        assert any(is_mapped(tensor, file) for file in outputs)


@needs_maps
def test_writing_to_a_mapped_task_does_not_reach_the_file(large_bank: TaskBank) -> None:
    large_bank["one"].images.fill_(7)
    torch.testing.assert_close(int(large_bank["one"].images.max()), 0)


# The pool: one model in memory at a time.


class Census:
    """How many models that a pool gave out are alive, asked whenever it gives out one more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given = 0
        self.most = 0
        self._models: list[weakref.ref[PretrainedModel]] = []
        get = ModelPool.get

        def counted(pool: ModelPool, id: str) -> PretrainedModel:
            model = get(pool, id)
            self.given += 1
            self._models.append(weakref.ref(model))
            self.most = max(self.most, self.alive())
            return model

        monkeypatch.setattr(ModelPool, "get", counted)

    def alive(self) -> int:
        return sum(model() is not None for model in self._models)


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    """Without the collector of cycles: a model must go when its last reference does, not some day."""
    gc.collect()
    gc.disable()
    yield Census(monkeypatch)
    gc.enable()


def test_iterating_over_a_pool_holds_the_present_model_and_the_last(census: Census, tmp_path: Path) -> None:
    pool = untrained_pool(tmp_path / "pool", 5)
    for model in pool:
        assert model.id in pool.ids
    assert census.given == 5
    assert census.most == 2, "a loop's variable holds the last model while the next one is read"
    del model
    assert census.alive() == 0


def test_models_that_are_kept_are_counted(census: Census, tmp_path: Path) -> None:
    kept = list(untrained_pool(tmp_path / "pool", 5))
    assert census.most == census.alive() == len(kept) == 5


def test_no_stage_holds_more_than_one_model(census: Census, tmp_path: Path) -> None:
    pool, store = untrained_pool(tmp_path / "pool", 5), Store(tmp_path / "store", jobs=1, threads=1)
    bank = recover_pool(pool, HASTY, store)
    assert census.given == 5
    assert (census.most, census.alive()) == (1, 0)
    view_of_all(pool, bank, store)
    assert census.given == 10
    assert (census.most, census.alive()) == (1, 0)
    embed_bank(bank, cases.input_spec(SHAPE), ProbeSettings(width=4, steps=2, batch=8), store)
    assert census.given == 10, "embedding reads images, and no model"


def test_meta_training_opens_no_model(census: Census, tmp_path: Path) -> None:
    pool, store = untrained_pool(tmp_path / "pool", 3), Store(tmp_path / "store", jobs=1, threads=1)
    method = RELATIONAL.model_copy(update={"steps": 2})
    method.fit(pool, store, seed=0)
    assert census.given == 2 * len(pool), "once to recover it, once to view"
    assert (census.most, census.alive()) == (1, 0)
    method.fit(pool, store, seed=1)
    assert census.given == 2 * len(pool), "training anew, on the same bank"
