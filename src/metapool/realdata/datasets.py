"""Labelled images: the shipped domains, folders, CSV lists, and the published few-shot benchmarks.

Every loader returns :class:`LabelledImages` (uint8 [N, C, H, W] with labels and class names) and fails with one
:class:`MetapoolError` that says what was expected where, and what was found.
"""

import csv as csv_files
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SHIPPED = ("icons", "emoji", "logos")
BENCHMARKS = {"cifar_fs": 32, "cub": 84, "mini_imagenet": 84}
"""Published benchmarks that a user brings, with the side of their images in pixels."""
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
DATA = Path(__file__).parent / "data"
CIFAR_SIDE = 32
CIFAR_RECORD = 2 + 3 * CIFAR_SIDE**2  # bytes: coarse label, fine label, red, green and blue planes


def load(
    name_or_path: str | Path,
    split: str | None = None,
    *,
    root: str | Path | None = None,
    channels: int = 3,
    height: int = 32,
    width: int = 32,
) -> LabelledImages:
    """Loads whatever a recipe or a command line names.

    Args:
        name_or_path: a shipped domain (``icons``, ``emoji``, ``logos``), a benchmark (``cifar_fs``, ``cub``,
            ``mini_imagenet``), a folder ``<class>/<images>``, or a CSV file with the columns ``path,label``. A folder
            of the same name as a domain is meant by ``./icons``.
        split: ``train``, ``val`` or ``test``; may be left out for a folder (which then holds the classes themselves)
            and has no meaning for a CSV file.
        root: folder of the benchmark's files.
        channels: C of a folder or CSV file; domains and benchmarks have their own.
        height: H of the same.
        width: W of the same.

    Returns:
        The labelled images.

    Raises:
        MetapoolError: when there is no such name or path, or the split or the root is missing.
    """
    name = str(name_or_path)
    if name in SHIPPED:
        return shipped(name, _needed_split(name, split))
    if name in BENCHMARKS:
        if root is None:
            raise MetapoolError(f"{name} is not shipped: give the folder of its files as root")
        loader = {"cifar_fs": cifar_fs, "cub": cub, "mini_imagenet": mini_imagenet}[name]
        return loader(root, _needed_split(name, split))
    path = Path(name_or_path)
    if path.is_dir():
        return folder(path, channels=channels, height=height, width=width, split=split)
    if path.is_file() and path.suffix.lower() == ".csv":
        if split is not None:
            raise MetapoolError(f"{path}: a CSV file has no splits (asked for {split!r}); give one file per split")
        return csv(path, channels=channels, height=height, width=width)
    known = ", ".join([*SHIPPED, *BENCHMARKS])
    found = "a file that is no .csv" if path.exists() else "nothing"
    raise MetapoolError(f"{name}: expected one of {known}, a folder of images or a .csv file; found {found} there")


def shipped(domain: str, split: str) -> LabelledImages:
    """One split of a domain that comes with the package; the splits share no class.

    Args:
        domain: ``icons`` (1×32×32), ``emoji`` or ``logos`` (3×32×32).
        split: ``train``, ``val`` or ``test``.

    Returns:
        uint8 [N, C, 32, 32]; licences and sources are in ``data/ATTRIBUTION.md``.

    Raises:
        MetapoolError: when there is no such domain or split, or its file is missing or damaged.
    """
    if domain not in SHIPPED:
        raise MetapoolError(f"no shipped domain {domain!r}: there are {', '.join(SHIPPED)}")
    path = DATA / f"{domain}-{_checked_split(split)}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels, classes = arrays["images"], arrays["labels"], arrays["classes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MetapoolError(f"{path}: the shipped images cannot be read ({error}); install metapool again") from error
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels), tuple(map(str, classes)))


def folder(root: str | Path, *, channels: int, height: int, width: int, split: str | None = None) -> LabelledImages:
    """Images sorted into a folder per class.

    Args:
        root: holds ``<class>/<images>``, or ``{train,val,test}/<class>/<images>`` when a split is given.
        channels: wanted C.
        height: wanted H.
        width: wanted W.
        split: ``train``, ``val`` or ``test``; None for a folder without splits.

    Returns:
        uint8 [N, C, H, W], classes and files in sorted order.

    Raises:
        MetapoolError: when the folder, the split, a class or an image is missing or broken.
    """
    base = _existing_folder(Path(root), "a folder with a sub-folder of images per class")
    if split is not None:
        base = _existing_folder(base / _checked_split(split), f"the {split} classes, {split}/<class>/<images>")
    names = sorted(entry.name for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise MetapoolError(f"{base}: expected a sub-folder of images per class, found {_contents(base)}")
    if split is None and set(names) <= set(SPLITS) and all(_has_folders(base / name) for name in names):
        raise MetapoolError(f"{base}: holds the splits {', '.join(names)}, not classes: say which split")
    return _read_classes({name: base / name for name in names}, channels, height, width)


def csv(path: str | Path, *, channels: int, height: int, width: int) -> LabelledImages:
    """Images listed in a CSV file with the header ``path,label``.

    Args:
        path: the CSV file (UTF-8); its paths are relative to its own folder. More columns are allowed.
        channels: wanted C.
        height: wanted H.
        width: wanted W.

    Returns:
        uint8 [N, C, H, W] in the file's order; classes are the sorted labels.

    Raises:
        MetapoolError: when the file, a column, a field or an image is missing or broken.
    """
    path = Path(path)
    if not path.is_file():
        raise MetapoolError(f"{path}: expected a CSV file with the columns path,label, found {_kind(path)}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv_files.DictReader(lines)
            header = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv_files.Error) as error:
        raise MetapoolError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if not {"path", "label"} <= set(header):
        raise MetapoolError(f"{path}: expected the columns path,label in the first line, found {','.join(header)!r}")
    if not rows:
        raise MetapoolError(f"{path}: expected a line per image below the header, found none")
    for number, row in rows:
        if not row["path"] or not row["label"]:
            raise MetapoolError(f"{path}, line {number}: expected a path and a label, found one of them empty")
    classes = sorted({row["label"] for _, row in rows})
    label_of = {name: label for label, name in enumerate(classes)}
    images = [read_image(path.parent / row["path"], channels, height, width) for _, row in rows]
    labels = torch.tensor([label_of[row["label"]] for _, row in rows])
    return LabelledImages(torch.stack(images), labels, tuple(classes))


def cifar_fs(root: str | Path, split: str) -> LabelledImages:
    """CIFAR-FS: the classes of CIFAR-100 in the split of Bertinetto et al. 2019, 64/16/20.

    Args:
        root: either holds the *binary* version of CIFAR-100 (``train.bin``, ``test.bin``, ``fine_label_names.txt``,
            here or in ``cifar-100-binary/``), or ``<class>/<images>``. The Python version is a pickle, which can run
            code when it is opened, and is refused.
        split: ``train``, ``val`` or ``test``.

    Returns:
        uint8 [N, 3, 32, 32]; 600 images a class from the binary version.

    Raises:
        MetapoolError: when files or classes are missing, truncated or pickled.
    """
    base = _existing_folder(Path(root), "the files of CIFAR-100")
    names = _split_classes("cifar_fs", split)
    for candidate in (base, base / "cifar-100-binary"):
        if (candidate / "train.bin").is_file() or (candidate / "test.bin").is_file():
            return _cifar_binary(candidate, names)
    if any((candidate / "meta").is_file() for candidate in (base, base / "cifar-100-python")):
        raise MetapoolError(
            f"{base}: this is the Python version of CIFAR-100, a pickle, which could run any code; "
            "use the binary version (cifar-100-binary/train.bin, test.bin, fine_label_names.txt) or <class>/*.png"
        )
    if not any((base / name).is_dir() for name in names):
        raise MetapoolError(
            f"{base}: expected cifar-100-binary/ with train.bin, test.bin and fine_label_names.txt, "
            f"or a folder per class ({names[0]}/*.png, …); found {_contents(base)}"
        )
    return _read_classes({name: base / name for name in names}, 3, CIFAR_SIDE, CIFAR_SIDE)


def cub(root: str | Path, split: str) -> LabelledImages:
    """CUB-200-2011 (Wah et al. 2011) in the split of Chen et al. 2019, 100/50/50 classes.

    Args:
        root: the folder ``CUB_200_2011``, or the one that holds it.
        split: ``train``, ``val`` or ``test``.

    Returns:
        uint8 [N, 3, 84, 84].
    """
    base = _existing_folder(Path(root), "CUB_200_2011/images/<class>/*.jpg")
    names = _split_classes("cub", split)
    inner = base / "CUB_200_2011"
    images = _existing_folder((inner if inner.is_dir() else base) / "images", "the folders of CUB-200-2011's classes")
    side = BENCHMARKS["cub"]
    return _read_classes({name: images / name for name in names}, 3, side, side)


def mini_imagenet(root: str | Path, split: str) -> LabelledImages:
    """The layout of miniImageNet (Vinyals et al. 2016), or any benchmark laid out like it.

    Args:
        root: holds ``{train,val,test}/<class>/<images>``.
        split: ``train``, ``val`` or ``test``.

    Returns:
        uint8 [N, 3, 84, 84].
    """
    side = BENCHMARKS["mini_imagenet"]
    return folder(root, channels=3, height=side, width=side, split=split)


def read_image(path: str | Path, channels: int, height: int, width: int) -> Tensor:
    """Reads one image file; transparent pixels become white.

    Args:
        path: png, jpg, jpeg, bmp, webp or gif (its first frame).
        channels: 1 (grey by luma) or 3 (RGB).
        height: wanted H; images of another size are resized (bilinear, antialiased).
        width: wanted W.

    Returns:
        uint8 [C, H, W].

    Raises:
        MetapoolError: when the file is missing or is no readable image, or for another number of channels.
    """
    path = Path(path)
    if channels not in {1, 3}:
        raise MetapoolError(f"images are read with 1 or 3 channels, not {channels}")
    if not path.is_file():
        raise MetapoolError(f"{path}: expected an image file, found {_kind(path)}")
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            picture = _sixteen_to_eight(upright) if upright.mode.startswith("I") else upright
            if picture.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in picture.info:
                layer = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            picture = picture.convert("L" if channels == 1 else "RGB")
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.array(picture, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MetapoolError(f"{path}: not a readable image ({error})") from error
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def _sixteen_to_eight(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8; Pillow's own conversion would clip it to white."""
    values = np.asarray(picture).astype(np.int64).clip(0, 65535)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _read_classes(folders: Mapping[str, Path], channels: int, height: int, width: int) -> LabelledImages:
    """Reads a folder per class, in the order given; a class without an image is an error."""
    images: list[Tensor] = []
    labels: list[int] = []
    for label, (name, place) in enumerate(folders.items()):
        if not place.is_dir():
            raise MetapoolError(f"{place}: expected a folder with the images of class {name!r}, found {_kind(place)}")
        files = sorted(f for f in place.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))
        if not files:
            wanted = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
            raise MetapoolError(f"{place}: expected images ({wanted}) of class {name!r}, found {_contents(place)}")
        images += [read_image(file, channels, height, width) for file in files]
        labels += [label] * len(files)
    return LabelledImages(torch.stack(images), torch.tensor(labels), tuple(folders))


def _cifar_binary(place: Path, names: Sequence[str]) -> LabelledImages:
    """Parses the binary version of CIFAR-100: records of coarse label, fine label, 3×32×32 bytes."""
    for needed in ("train.bin", "test.bin", "fine_label_names.txt"):
        if not (place / needed).is_file():
            raise MetapoolError(f"{place}: expected {needed} of CIFAR-100's binary version, found {_contents(place)}")
    listed = (place / "fine_label_names.txt").read_text(encoding="utf-8").split()
    missing = [name for name in names if name not in listed]
    if missing:
        raise MetapoolError(f"{place / 'fine_label_names.txt'}: expected the class {missing[0]!r}, found others only")
    parts = []
    for file in (place / "train.bin", place / "test.bin"):
        content = np.fromfile(file, dtype=np.uint8)
        if len(content) == 0 or len(content) % CIFAR_RECORD:
            raise MetapoolError(f"{file}: expected records of {CIFAR_RECORD} bytes, found {len(content)} bytes in all")
        parts.append(content.reshape(-1, CIFAR_RECORD))
    records = np.concatenate(parts)
    new_label = np.full(256, -1)
    new_label[[listed.index(name) for name in names]] = np.arange(len(names))
    labels = new_label[records[:, 1]]
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    empty = sorted(set(range(len(names))) - set(labels[order].tolist()))
    if empty:
        raise MetapoolError(
            f"{place}: expected images of class {names[empty[0]]!r} in train.bin or test.bin, found none"
        )
    images = torch.from_numpy(records[order, 2:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE))
    return LabelledImages(images, torch.from_numpy(labels[order].astype(np.int64)), tuple(names))


def _split_classes(benchmark: str, split: str) -> list[str]:
    """Class names of one split of a benchmark, as shipped."""
    splits = json.loads((DATA / f"{benchmark}.json").read_text(encoding="utf-8"))
    return cast("list[str]", splits[_checked_split(split)])


def _checked_split(split: str) -> str:
    if split not in SPLITS:
        raise MetapoolError(f"no split {split!r}: there are {', '.join(SPLITS)}")
    return split


def _needed_split(name: str, split: str | None) -> str:
    if split is None:
        raise MetapoolError(f"{name}: say which split, one of {', '.join(SPLITS)}")
    return split


def _existing_folder(path: Path, holds: str) -> Path:
    if not path.is_dir():
        raise MetapoolError(f"{path}: expected a folder here ({holds}), found {_kind(path)}")
    return path


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    if path.exists():
        return "a file"
    return f"nothing; {path.parent} holds {_contents(path.parent)}" if path.parent.is_dir() else "nothing"


def _has_folders(path: Path) -> bool:
    return any(entry.is_dir() for entry in path.iterdir())


def _contents(path: Path) -> str:
    """The first names in a folder, for an error message."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "nothing in it"
