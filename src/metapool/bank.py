"""Recovered tasks on disk: one safetensors file per model, uint8 images, labels and the teacher's logits."""

import json
from collections.abc import Iterator, Mapping
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
