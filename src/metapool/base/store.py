"""Settings, seeds by name, and a content-keyed store of what was made from what.

The store is what makes a run resumable: every stage asks for its artifact by a key (settings, digests of inputs, seed,
version of the maker); what is there is reused, what is missing is built in a temporary folder and renamed. A killed run
leaves either a whole artifact or none, so calling again goes on and ends with the same bits as an unbroken run.
"""

import ctypes
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import joblib
import pydantic
import torch
from filelock import FileLock

Key = Mapping[str, Any]
Progress = Callable[[str, int, int], None]


class Settings(pydantic.BaseModel):
    """Frozen, closed settings: unknown fields are errors, equal settings have equal digests."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def digest(self) -> str:
        """Hash of all fields.

        Returns:
            16 hexadecimal digits.
        """
        return digest_of(self.model_dump(mode="json"))


def digest_of(value: object) -> str:
    """Hash of a JSON-able value, independent of the order of dictionary keys.

    Args:
        value: anything that ``json.dumps`` takes.

    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seed_for(seed: int, *names: str) -> int:
    """A seed for one named unit of work, so that adding a unit moves no other unit's seed.

    Args:
        seed: the run's seed.
        *names: what the seed is for, for example ``"recover", "model-07"``.

    Returns:
        An integer in [0, 2**63).
    """
    text = "\x1f".join((str(seed), *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *names: str) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_for`.

    Args:
        seed: the run's seed.
        *names: what the numbers are for.

    Returns:
        A fresh generator.
    """
    return torch.Generator().manual_seed(seed_for(seed, *names))


def keep_memory() -> None:
    """Has this process keep the memory that it frees, where the C library can: tensors of one step serve the next.

    glibc gives every block over 32 MB back to the system as soon as it is freed, and the kernel zeroes it
    anew for the next tensor: half the time of a training step on images (docs/lab-notes.md). Bits do not change; what
    a process holds is then its peak. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_THRESHOLD, 2**30), (_TOP_PAD, 2**26)):
        mallopt(ctypes.c_int(parameter), ctypes.c_int(value))


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)


class State(Protocol):
    """What a checkpointed loop carries from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""


class States:
    """Several states as one, for a loop that carries more than one thing.

    Args:
        **parts: states by name.
    """

    def __init__(self, **parts: State) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on.

        Returns:
            The state of every part, by name.
        """
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave.

        Args:
            state: by name.
        """
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def silent(kind: str, done: int, total: int) -> None:
    """Progress that shows nothing.

    Args:
        kind: the stage.
        done: units finished.
        total: units in all.
    """


class Store:
    """Content-keyed artifacts under one root folder: ``<root>/<kind>/<digest>/`` with ``made.json`` inside.

    Args:
        root: folder of the store; created when missing.
        jobs: worker processes for :meth:`units`. The result never depends on it.
        unit_threads: torch threads inside a unit of :meth:`units`; part of every key, because bits depend on it.
        threads: torch threads of everything else; part of every key too.
        progress: called as ``progress(kind, done, total)``.
    """

    def __init__(
        self, root: Path, jobs: int = 1, unit_threads: int = 1, threads: int = 1, progress: Progress = silent
    ) -> None:
        self.root = Path(root)
        self.jobs = jobs
        self.unit_threads = unit_threads
        self.threads = threads
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._inner = (0.0, 0.0)  # seconds, and those of the processor, of what ran inside the stage that runs now
        self._parts: dict[str, dict[str, Any]] = {}  # what the artifact that is built now is made from
        self.used: dict[str, dict[str, Any]] = {}

    def artifact(self, kind: str, key: Key, build: Callable[[Path], None]) -> Path:
        """The folder of one artifact, built when it is not there.

        Args:
            kind: name of the stage, for example ``"meta-model"``.
            key: what the artifact depends on (JSON-able).
            build: fills the empty folder that it is given.

        Returns:
            The finished folder.
        """
        outer, self._parts = self._parts, {}
        try:
            with self._timed(kind):
                made = _make(
                    self.root, kind, self._full(key, unit=False), build, self.threads,
                    lambda: (self._parts, self._inner),
                )  # fmt: skip
        finally:
            self._parts = outer
        return self._note(kind, made)

    def units(self, kind: str, keys: Mapping[str, Key], build: Callable[[str, Path], None]) -> dict[str, Path]:
        """Many independent artifacts of one kind, missing ones built in parallel worker processes.

        Args:
            kind: name of the stage.
            keys: key of every unit, by the unit's name.
            build: fills a unit's empty folder; called as ``build(name, folder)``, picklable by joblib.

        Returns:
            The finished folder of every unit, in the order of ``keys``.
        """
        full = {name: self._full(key, unit=True) for name, key in keys.items()}
        folders = {name: self.root / kind / digest_of(key) for name, key in full.items()}
        missing = [name for name, folder in folders.items() if not folder.exists()]
        done = len(full) - len(missing)
        if missing:
            self.progress(kind, done, len(full))
        calls = (
            joblib.delayed(_make_unit)(self.root, kind, full[name], build, name, self.unit_threads) for name in missing
        )
        workers = min(self.jobs, max(1, len(missing)))
        with self._timed(kind):
            for _ in joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(calls):
                done += 1
                self.progress(kind, done, len(full))
        return {name: self._note(kind, folder) for name, folder in folders.items()}

    def steps(self, kind: str, key: Key, state: State, total: int, every: int) -> Iterator[int]:
        """A checkpointed loop: goes on after the last checkpoint, saves every ``every`` steps.

        Args:
            kind: name of the loop.
            key: what the loop depends on.
            state: restored before the first step that is yielded, saved along the way.
            total: number of steps.
            every: steps between checkpoints.

        Yields:
            The number of the step to take, from where the checkpoint ends to ``total - 1``.
        """
        checkpoint = self._checkpoint(kind, key)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        first = 0
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            first = saved["step"]
            state.load_state_dict(saved["state"])
        for step in range(first, total):
            yield step
            if (step + 1) % every == 0 or step + 1 == total:
                temporary = checkpoint.with_suffix(f".{os.getpid()}.tmp")
                torch.save({"step": step + 1, "state": state.state_dict()}, temporary)
                temporary.replace(checkpoint)
            self.progress(kind, step + 1, total)

    def folder(self, kind: str, key: Key, *, unit: bool = False) -> Path:
        """Where an artifact is, or would be: asks, and builds nothing.

        Args:
            kind: name of the stage.
            key: what the artifact depends on.
            unit: whether it is one of :meth:`units`, and not of :meth:`artifact`.

        Returns:
            The folder; it exists when the artifact is whole.
        """
        return self.root / kind / digest_of(self._full(key, unit=unit))

    def steps_done(self, kind: str, key: Key) -> int:
        """How far a loop of :meth:`steps` has come: takes no step.

        Args:
            kind: name of the loop.
            key: what the loop depends on.

        Returns:
            Steps that the last checkpoint holds, 0 when there is none.
        """
        checkpoint = self._checkpoint(kind, key)
        return int(torch.load(checkpoint, weights_only=True)["step"]) if checkpoint.exists() else 0

    def ancestry(self, folder: Path) -> dict[str, dict[str, Any]]:
        """An artifact and all that it was made from, directly or not, be it still there or not.

        Args:
            folder: of a finished artifact of this store.

        Returns:
            By ``kind/digest``, when each was made and what it took by itself: seconds, and those of the processor.
        """
        return _line_of(folder)

    def _full(self, key: Key, *, unit: bool) -> dict[str, Any]:
        return {**key, "threads": self.unit_threads if unit else self.threads}

    def _checkpoint(self, kind: str, key: Key) -> Path:
        return self.root / "checkpoints" / f"{kind}-{digest_of(self._full(key, unit=False))}.pt"

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        """Adds the time to the stage's own, without that of the stages inside it."""
        outer, self._inner = self._inner, (0.0, 0.0)
        started = _now()
        try:
            yield
        finally:
            elapsed = _since(started)
            self.seconds[kind] = self.seconds.get(kind, 0.0) + elapsed[0] - self._inner[0]
            self._inner = (outer[0] + elapsed[0], outer[1] + elapsed[1])

    def _note(self, kind: str, folder: Path) -> Path:
        line = _line_of(folder)
        self._parts |= line
        self.used[f"{kind}/{folder.name}"] = line[f"{kind}/{folder.name}"]
        return folder


def _make_unit(root: Path, kind: str, key: Key, build: Callable[[str, Path], None], name: str, threads: int) -> Path:
    return _make(root, kind, key, lambda folder: build(name, folder), threads)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    now = _now()
    return now[0] - started[0], now[1] - started[1]


def _line_of(folder: Path) -> dict[str, dict[str, Any]]:
    """An artifact and what it was made from; earlier versions noted neither parts nor the processor's seconds."""
    made = {"parts": {}, **json.loads((folder / "made.json").read_text())}
    brief = {"seconds": made["seconds"], "cpu_seconds": made.get("cpu_seconds", made["seconds"]), "made": made["made"]}
    return {f"{folder.parent.name}/{folder.name}": brief, **made["parts"]}


def _make(
    root: Path,
    kind: str,
    key: Key,
    build: Callable[[Path], None],
    threads: int,
    inside: Callable[[], tuple[dict[str, dict[str, Any]], tuple[float, float]]] = lambda: ({}, (0.0, 0.0)),
) -> Path:
    """Builds ``root/kind/digest`` under a lock, in a temporary folder that is renamed when it is whole."""
    # ``inside`` tells, afterwards, what the build was made from, and the seconds that went into that meanwhile.
    folder = root / kind / digest_of(key)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return folder
        temporary = folder.with_suffix(".building")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        keep_memory()
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        started = _now()
        try:
            build(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            torch.set_num_threads(before)
        parts, elsewhere = inside()
        own = [round(spent - other, 3) for spent, other in zip(_since(started), elsewhere)]
        record = {
            "kind": kind,
            "key": key,
            "parts": parts,
            "seconds": own[0],
            "cpu_seconds": own[1],
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform(),
        }
        (temporary / "made.json").write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(folder)
    return folder
