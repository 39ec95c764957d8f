"""Recovered tasks on disk and class identity across models."""

from pathlib import Path

import cases
import pytest
import torch

from metapool.bank import Memory, RecoveredTask, TaskBank, fit_bytes
from metapool.base.images import to_float


def task(shape: cases.Shape, classes: tuple[str, ...], per_class: int = 2, seed: int = 0) -> RecoveredTask:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    images = torch.randint(256, (len(labels), *shape), generator=generator, dtype=torch.uint8)
    logits = torch.randn(len(labels), len(classes), generator=generator)
    return RecoveredTask(images, labels, logits, classes, {"loss": 0.5, "agreement": 100.0})


@pytest.fixture
def bank(tmp_path: Path) -> TaskBank:
    """Two models of one size that share a class name, and a third of another size and channels."""
    tasks = {
        "one": task((1, 16, 16), ("cat", "dog"), seed=1),
        "two": task((1, 16, 16), ("dog", "cow", "hen"), seed=2),
        "three": task((3, 20, 28), ("cat", "cat "), seed=3),
    }
    folders = {}
    for id, found in tasks.items():
        folders[id] = tmp_path / id
        folders[id].mkdir()
        found.save(folders[id])
    return TaskBank(folders)


def test_a_task_comes_back_as_it_went(tmp_path: Path) -> None:
    first = task((3, 8, 9), ("a", "b", "ç/☂"))
    first.save(tmp_path)
    again = RecoveredTask.load(tmp_path)
    for name in ("images", "labels", "logits"):
        torch.testing.assert_close(getattr(again, name), getattr(first, name), rtol=0, atol=0)
    assert again.classes == first.classes
    assert again.record == first.record


def test_a_bank_is_a_mapping_in_order(bank: TaskBank) -> None:
    assert list(bank) == ["one", "two", "three"]
    assert len(bank) == 3
    assert bank["two"].classes == ("dog", "cow", "hen")
    assert "two" in bank
    assert "four" not in bank
    with pytest.raises(KeyError):
        bank["four"]


def test_distinct_classes_are_each_model_s_own(bank: TaskBank) -> None:
    data = bank.labelled("distinct", cases.input_spec((1, 16, 16)))
    assert data.classes == ("one/cat", "one/dog", "two/dog", "two/cow", "two/hen", "three/cat", "three/cat ")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert tuple(data.images.shape) == (14, 1, 16, 16)


def test_by_name_one_name_is_one_class(bank: TaskBank) -> None:
    data = bank.labelled("by-name", cases.input_spec((1, 16, 16)))
    assert data.classes == ("cat", "dog", "cow", "hen", "cat ")
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 0, 0, 4, 4]


def test_images_that_fit_are_untouched_and_others_resized(bank: TaskBank) -> None:
    spec = cases.input_spec((1, 16, 16))
    data = bank.labelled("distinct", spec)
    torch.testing.assert_close(data.images[:4], bank["one"].images, rtol=0, atol=0)
    resized = (255 * spec.fit(to_float(bank["three"].images))).round().to(torch.uint8)
    torch.testing.assert_close(data.images[10:], resized, rtol=0, atol=0)
    assert fit_bytes(bank["three"].images, spec).dtype == torch.uint8


def test_digest_is_that_of_the_folders_names_and_order(bank: TaskBank) -> None:
    assert TaskBank(dict(bank.folders)).digest() == bank.digest()
    moved = TaskBank({id: Path("elsewhere") / folder.name for id, folder in bank.folders.items()})
    assert moved.digest() == bank.digest()
    turned = TaskBank(dict(reversed(bank.folders.items())))
    other = TaskBank({**bank.folders, "one": Path("another")})
    assert len({bank.digest(), turned.digest(), other.digest()}) == 3


def test_a_memory_keeps_the_latest_images_of_every_name() -> None:
    memory = Memory(3)
    one, two = task((1, 4, 4), ("cat", "dog"), seed=1), task((1, 4, 4), ("dog", "hen"), seed=2)
    memory.add(one.images, one.labels, one.classes)
    memory.add(two.images, two.labels, two.classes)
    kept = memory.labelled()
    assert kept.classes == ("cat", "dog", "hen")
    assert kept.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert len(memory) == 7
    expected = torch.cat([one.images[:2], one.images[3:], two.images[:2], two.images[2:]])
    torch.testing.assert_close(kept.images, expected, rtol=0, atol=0)
    again = Memory(3)
    again.load_state_dict(memory.state_dict())
    assert again.labelled().digest() == kept.digest()
    again.add(one.images, one.labels, one.classes)
    assert again.labelled().digest() != kept.digest()
    assert memory.labelled().digest() == kept.digest(), "a state is not shared"
