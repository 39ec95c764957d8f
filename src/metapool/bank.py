"""Recovered tasks on disk: one safetensors file per model, uint8 images, labels and the teacher's logits."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metapool.base.images import InputSpec, LabelledImages, to_bytes, to_float
from metapool.base.store import digest_of

Identity = Literal["distinct", "by-name"]


@dataclass(frozen=True)
class RecoveredTask:
    """What one model gave back.

    Attributes:
        images: uint8 [N, C, H, W], at the model's own input size.
        labels: int64 [N] in [0, K): the labels that were asked for.
        logits: float32 [N, K]: the model's answer to the *rounded* images.
        classes: K names.
        record: how recovery went (final losses, agreement, seconds).
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    classes: tuple[str, ...]
    record: dict[str, float]

    def save(self, folder: Path) -> None:
        """Writes ``task.safetensors`` and ``task.json``.

        Args:
            folder: an existing folder.
        """
        tensors = {"images": self.images, "labels": self.labels, "logits": self.logits}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "task.safetensors")
        text = json.dumps({"classes": self.classes, "record": self.record}, indent=1)
        (folder / "task.json").write_text(text + "\n")

    @classmethod
    def load(cls, folder: Path) -> "RecoveredTask":
        """Reads what :meth:`save` wrote.

        Args:
            folder: where.

        Returns:
            The task.
        """
        tensors = load_file(folder / "task.safetensors")
        about = json.loads((folder / "task.json").read_text())
        return cls(tensors["images"], tensors["labels"], tensors["logits"], tuple(about["classes"]), about["record"])


class TaskBank(Mapping[str, RecoveredTask]):
    """All recovered tasks by model id, read from disk one at a time.

    Args:
        folders: folder of every task, by model id.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)

    def __getitem__(self, id: str) -> RecoveredTask:
        return RecoveredTask.load(self.folders[id])

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)

    def digest(self) -> str:
        """Hash of what the bank was made from: the names of its folders are hashes of their keys.

        Returns:
            16 hexadecimal digits.
        """
        return digest_of([[id, folder.name] for id, folder in self.folders.items()])

    def labelled(self, identity: Identity, input: InputSpec) -> LabelledImages:
        """All images with labels that hold across models.

        Args:
            identity: ``"distinct"``: every model's classes are classes of their own; ``"by-name"``: classes of one name
                are one class, whichever model they come from.
            input: size and channels wanted; images of other sizes are resized.

        Returns:
            The images of all models, in the order of the bank.
        """
        images: list[Tensor] = []
        labels: list[Tensor] = []
        index: dict[str, int] = {}
        for id, task in self.items():
            names = [name if identity == "by-name" else f"{id}/{name}" for name in task.classes]
            numbers = torch.tensor([index.setdefault(name, len(index)) for name in names])
            images.append(fit_bytes(task.images, input))
            labels.append(numbers[task.labels])
        return LabelledImages(torch.cat(images), torch.cat(labels), tuple(index))


class Memory:
    """Recovered images that come in while a method trains: of every class name the latest ones.

    Args:
        per_class: images that are kept of a class; an older one makes room for a new one.
    """

    def __init__(self, per_class: int) -> None:
        self.per_class = per_class
        self._images: dict[str, Tensor] = {}

    def add(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        """Takes images in.

        Args:
            images: uint8 [N, C, H, W], all of one size, whenever they come.
            labels: int64 [N] in [0, K).
            classes: K names; classes of one name are one class.
        """
        for label, name in enumerate(classes):
            new = images[labels == label]
            known = self._images.get(name, new[:0])
            self._images[name] = torch.cat([known, new])[-self.per_class :]

    def labelled(self) -> LabelledImages:
        """All that is kept.

        Returns:
            Images class by class, classes in the order of their first coming.
        """
        counts = torch.tensor([len(images) for images in self._images.values()])
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        return LabelledImages(torch.cat(list(self._images.values())), labels, tuple(self._images))

    def __len__(self) -> int:
        return sum(map(len, self._images.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The images by class name.

        Returns:
            uint8 tensors.
        """
        return dict(self._images)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts back what :meth:`state_dict` gave.

        Args:
            state: images by class name.
        """
        self._images = dict(state)


def fit_bytes(images: Tensor, input: InputSpec) -> Tensor:
    """Stored images at another input's size and channels.

    Args:
        images: uint8 [N, C', H', W'].
        input: what is wanted.

    Returns:
        uint8 [N, C, H, W].
    """
    if tuple(images.shape[1:]) == input.shape:
        return images
    return to_bytes(input.fit(to_float(images)))
