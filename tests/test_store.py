"""Settings, named seeds and the content-keyed store: same key same folder, whole or not at all, whoever is killed."""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from metapool.base.store import Settings, States, Store, digest_of, digest_of_file, generator_for, seed_for

# Settings, digests, seeds ---------------------------------------------------------------------------------------------


class Small(Settings):
    rate: float = 0.1
    names: tuple[str, ...] = ("a",)


def test_equal_settings_have_equal_digests_and_a_changed_field_another() -> None:
    assert Small(rate=0.1).digest() == Small().digest()
    changed = [Small(rate=0.2), Small(names=("b",)), Small(names=("a", "b"))]
    assert len({setting.digest() for setting in [Small(), *changed]}) == 4


def test_settings_are_frozen_and_closed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Small().rate = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="rte"):
        Small.model_validate({"rte": 1.0})


def test_digest_ignores_the_order_of_keys_but_not_of_lists() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})


def test_digest_of_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    first.write_bytes(b"same")
    second.write_bytes(b"same")
    third.write_bytes(b"samf")
    assert digest_of_file(first) == digest_of_file(second) != digest_of_file(third)


def test_seeds_depend_on_every_name_and_on_where_one_name_ends() -> None:
    seeds = [
        seed_for(0),
        seed_for(1),
        seed_for(0, "a"),
        seed_for(0, "a", "b"),
        seed_for(0, "ab"),
        seed_for(0, "b", "a"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(0, "recover", "m") == seed_for(0, "recover", "m")


def test_generator_for_repeats_and_ignores_the_global_seed() -> None:
    first = torch.rand(4, generator=generator_for(3, "x"))
    torch.manual_seed(99)
    torch.testing.assert_close(torch.rand(4, generator=generator_for(3, "x")), first, rtol=0, atol=0)
    assert not torch.equal(torch.rand(4, generator=generator_for(3, "y")), first)


# One artifact ---------------------------------------------------------------------------------------------------------


class Counted:
    """A maker that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "value.txt").write_text("made")


def test_what_is_there_is_not_made_again(store: Store) -> None:
    build = Counted()
    first = store.artifact("thing", {"a": 1}, build)
    assert store.artifact("thing", {"a": 1}, build) == first
    assert build.calls == 1
    assert (first / "value.txt").read_text() == "made"


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1, "b": 0}, {"a": "1"}])
def test_another_key_is_another_folder(store: Store, other: dict[str, object]) -> None:
    build = Counted()
    assert store.artifact("thing", {"a": 1}, build) != store.artifact("thing", other, build)
    assert build.calls == 2


def test_kinds_do_not_share_artifacts(store: Store) -> None:
    build = Counted()
    assert store.artifact("thing", {"a": 1}, build) != store.artifact("other", {"a": 1}, build)
    assert build.calls == 2


def test_made_json_says_what_from_and_how(store: Store) -> None:
    made = json.loads((store.artifact("thing", {"a": [1, 2]}, Counted()) / "made.json").read_text())
    assert made["kind"] == "thing"
    assert made["key"] == {"a": [1, 2], "threads": 1}
    assert made["seconds"] >= 0
    assert made["torch"] == torch.__version__


def test_number_of_threads_is_part_of_the_key_and_is_set_inside_and_restored(tmp_path: Path) -> None:
    seen: list[int] = []

    def build(folder: Path) -> None:
        seen.append(torch.get_num_threads())

    folders = {Store(tmp_path, threads=n).artifact("thing", {"a": 1}, build) for n in (1, 2)}
    assert len(folders) == 2
    assert seen == [1, 2]
    assert torch.get_num_threads() == 1
    units = [Store(tmp_path, unit_threads=n).units("unit", {"u": {"a": 1}}, _touch)["u"] for n in (1, 2)]
    assert units[0] != units[1]


def test_number_of_workers_is_not_part_of_the_key(tmp_path: Path) -> None:
    build = Counted()
    folders = {Store(tmp_path, jobs=jobs, threads=1).artifact("thing", {}, build) for jobs in (1, 2, 8)}
    assert len(folders) == build.calls == 1


def test_a_maker_that_raises_leaves_nothing_and_can_be_called_again(store: Store) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.artifact("thing", {"a": 1}, fail)
    assert [path for path in (store.root / "thing").iterdir() if path.is_dir()] == []
    assert torch.get_num_threads() == 1
    folder = store.artifact("thing", {"a": 1}, Counted())
    assert sorted(path.name for path in folder.iterdir()) == ["made.json", "value.txt"]


def test_what_a_killed_maker_left_is_not_mixed_into_the_next(store: Store) -> None:
    stale = store.root / "thing" / f"{digest_of({'a': 1, 'threads': 1})}.building"
    stale.mkdir(parents=True)
    (stale / "half.txt").write_text("half")
    folder = store.artifact("thing", {"a": 1}, Counted())
    assert folder.with_suffix(".building") == stale, "the test must put its rubbish where the store builds"
    assert sorted(path.name for path in folder.iterdir()) == ["made.json", "value.txt"]
    assert not stale.exists()


def _write_then_die(folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_in_the_middle_then_called_again(store: Store) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=store.artifact, args=("thing", {"a": 1}, _write_then_die), daemon=True
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    left = list((store.root / "thing").rglob("half.txt"))
    assert len(left) == 1, "the child died in the middle, its half-made folder is there"
    assert not any(path.name == "made.json" for path in store.root.rglob("*"))
    build = Counted()
    folder = store.artifact("thing", {"a": 1}, build)
    assert build.calls == 1
    assert sorted(path.name for path in folder.iterdir()) == ["made.json", "value.txt"]
    assert not left[0].exists()


def test_a_second_builder_waits_and_takes_what_the_first_made(tmp_path: Path) -> None:
    started: list[float] = []
    ended: list[float] = []
    found: list[Path] = []

    def build(folder: Path) -> None:
        started.append(time.monotonic())
        time.sleep(0.3)
        (folder / "value.txt").write_text("made")
        ended.append(time.monotonic())

    def ask() -> None:
        folder = Store(tmp_path, threads=1).artifact("thing", {"a": 1}, build)
        assert (folder / "value.txt").read_text() == "made"
        found.append(folder)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(30)
    assert len(started) == len(ended) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


# Units ----------------------------------------------------------------------------------------------------------------


def _touch(name: str, folder: Path) -> None:
    (folder / "name.txt").write_text(name)


def _numbers(name: str, folder: Path) -> None:
    """Convolution, reductions and random numbers: bits that depend on threads and seeds."""
    generator = generator_for(7, "unit", name)
    images = torch.randn(16, 8, 24, 24, generator=generator)
    weights = torch.randn(8, 8, 3, 3, generator=generator).requires_grad_()
    loss = torch.nn.functional.conv2d(images, weights).exp().mean().log()
    loss.backward()
    torch.save([loss.detach(), weights.grad], folder / "numbers.pt")


def test_units_have_the_same_bits_whatever_the_number_of_workers(tmp_path: Path) -> None:
    keys = {name: {"unit": name} for name in ("a", "b", "c")}
    folders = [Store(tmp_path / str(jobs), jobs=jobs).units("number", keys, _numbers) for jobs in (1, 2)]
    for name in keys:
        one, two = (torch.load(made[name] / "numbers.pt", weights_only=True) for made in folders)
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    first, other = (torch.load(folders[0][name] / "numbers.pt", weights_only=True) for name in ("a", "b"))
    assert not torch.equal(first[0], other[0])


def test_only_missing_units_are_made_and_the_order_is_that_of_the_keys(store: Store) -> None:
    made: list[str] = []

    def build(name: str, folder: Path) -> None:
        made.append(name)
        _touch(name, folder)

    store.units("unit", {"b": {"n": 2}}, build)
    folders = store.units("unit", {"c": {"n": 3}, "b": {"n": 2}, "a": {"n": 1}}, build)
    assert made == ["b", "c", "a"]
    assert list(folders) == ["c", "b", "a"]
    assert [(folder / "name.txt").read_text() for folder in folders.values()] == ["c", "b", "a"]


def test_a_broken_unit_keeps_the_finished_ones(store: Store) -> None:
    def build(name: str, folder: Path) -> None:
        if name == "b":
            raise ValueError("b cannot be made")
        _touch(name, folder)

    keys = {name: {"unit": name} for name in ("a", "b", "c")}
    with pytest.raises(ValueError, match="b cannot be made"):
        store.units("unit", keys, build)
    made: list[str] = []

    def note(name: str, folder: Path) -> None:
        made.append(name)

    store.units("unit", keys, note)
    assert "a" not in made
    assert "b" in made


def test_no_units_is_fine(store: Store) -> None:
    assert store.units("unit", {}, _touch) == {}


def test_progress_counts_units_found_and_made(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    store = Store(tmp_path, progress=lambda kind, done, total: seen.append((kind, done, total)))
    store.units("unit", {"a": {"n": 1}}, _touch)
    seen.clear()
    store.units("unit", {"a": {"n": 1}, "b": {"n": 2}}, _touch)
    assert seen == [("unit", 1, 2), ("unit", 2, 2)]
    seen.clear()
    store.units("unit", {"a": {"n": 1}, "b": {"n": 2}}, _touch)
    assert seen == [], "nothing to do, nothing to show"


def test_store_knows_what_was_used_and_how_long_it_took(store: Store) -> None:
    folder = store.artifact("thing", {"a": 1}, Counted())
    units = store.units("unit", {"a": {"n": 1}}, _touch)
    assert set(store.used) == {f"thing/{folder.name}", f"unit/{units['a'].name}"}
    assert set(store.seconds) == {"thing", "unit"}
    assert all(seconds >= 0 for seconds in store.seconds.values())


# Steps ----------------------------------------------------------------------------------------------------------------


class Counter:
    """A state that is only a list of the steps taken."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def state_dict(self) -> dict[str, list[int]]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.taken = state["taken"]


def run(store: Store, total: int, every: int, stop: int | None = None, key: dict[str, int] | None = None) -> Counter:
    state = Counter()
    for step in store.steps("loop", key or {}, state, total, every):
        if step == stop:
            break
        state.taken.append(step)
    return state


@pytest.mark.parametrize(("stop", "resumed_from"), [(0, 0), (2, 0), (3, 3), (5, 3), (6, 6)])
def test_a_loop_goes_on_after_its_last_checkpoint(store: Store, stop: int, resumed_from: int) -> None:
    assert run(store, 7, 3, stop).taken == list(range(stop))
    seen: list[int] = []
    state = Counter()
    for step in store.steps("loop", {}, state, 7, 3):
        seen.append(step)
        state.taken.append(step)
    assert seen == list(range(resumed_from, 7))
    assert state.taken == list(range(7))


def test_a_finished_loop_takes_no_step_and_has_its_end(store: Store) -> None:
    run(store, 5, 2)
    state = Counter()
    assert list(store.steps("loop", {}, state, 5, 2)) == []
    assert state.taken == [0, 1, 2, 3, 4]


def test_loops_of_other_keys_or_threads_start_anew(store: Store) -> None:
    run(store, 4, 2, key={"a": 1})
    assert next(store.steps("loop", {"a": 2}, Counter(), 4, 2)) == 0
    assert next(Store(store.root, threads=2).steps("loop", {"a": 1}, Counter(), 4, 2)) == 0


def test_a_checkpoint_that_names_code_is_refused(store: Store) -> None:
    run(store, 2, 1)
    checkpoint = next((store.root / "checkpoints").glob("loop-*.pt"))
    torch.save({"step": 1, "state": Path("harmless")}, checkpoint)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        next(store.steps("loop", {}, Counter(), 3, 1), None)


def test_memory_that_a_process_frees_serves_its_next_tensors() -> None:
    """Large tensors that come and go fault hardly any new page in; without the setting, each of them does."""
    script = """
import resource, sys, torch
from metapool.base.store import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def turn():
    torch.ones(2**24)
for _ in range(8):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc is told")
    faults = [
        int(subprocess.run([sys.executable, "-c", script, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "leave")
    ]
    assert faults[0] < 0.1 * faults[1]


# What an artifact was made from ---------------------------------------------------------------------------------------


def nested(store: Store, seconds: float = 0.05) -> Path:
    """An artifact that asks for two units and for another artifact, which asks for one of the units again."""

    def sleep(name: str, folder: Path) -> None:
        time.sleep(seconds)

    def inner(folder: Path) -> None:
        store.units("unit", {"a": {"n": 0}}, sleep)
        time.sleep(seconds)

    def outer(folder: Path) -> None:
        store.units("unit", {"a": {"n": 0}, "b": {"n": 1}}, sleep)
        store.artifact("inner", {}, inner)
        time.sleep(seconds)

    return store.artifact("outer", {}, outer)


def test_ancestry_has_every_part_once_with_its_own_seconds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = nested(store)
    found = store.ancestry(folder)
    assert sorted(name.split("/")[0] for name in found) == ["inner", "outer", "unit", "unit"]
    assert all(0.05 <= made["seconds"] < 0.1 for made in found.values()), "each slept once"
    assert all(0 <= made["cpu_seconds"] < 0.04 for made in found.values()), "and did not work"
    # Asked of another store object, and when nothing is made any more, it is the same.
    assert nested(Store(tmp_path)) == folder
    assert Store(tmp_path).ancestry(folder) == found
    alone = store.artifact("alone", {}, lambda _: None)
    assert list(store.ancestry(alone)) == [f"alone/{alone.name}"]
    shutil.rmtree(tmp_path / "unit")
    assert Store(tmp_path).ancestry(folder) == found, "what is gone is still known"


def test_an_artifact_of_an_earlier_version_is_used_and_counts_its_seconds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = nested(store)
    file = folder / "made.json"
    made = json.loads(file.read_text())
    file.write_text(json.dumps({name: made[name] for name in made if name not in ("parts", "cpu_seconds")}))
    later = Store(tmp_path)
    assert nested(later) == folder, "it is not made again"
    (line,) = later.ancestry(folder).values()
    assert line["cpu_seconds"] == line["seconds"] == made["seconds"]


def test_several_states_are_carried_as_one() -> None:
    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(3, 1)
    both = States(first=first, second=second)
    saved = {name: {k: v.clone() for k, v in part.items()} for name, part in both.state_dict().items()}
    kept = second.weight.detach().clone()
    torch.nn.init.zeros_(second.weight)
    both.load_state_dict(saved)
    torch.testing.assert_close(second.weight.detach(), kept, rtol=0, atol=0)
    with pytest.raises(KeyError):
        both.load_state_dict({"first": saved["first"]})
