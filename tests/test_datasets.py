"""Shipped domains, loaders of every layout on small made-up folders, and the pure functions of tools/build_icons.py."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages
from metapool.realdata import datasets

DOMAINS = {  # channels, classes per split, fewest images of a class
    "icons": (1, {"train": 64, "val": 16, "test": 20}, 60),
    "emoji": (3, {"train": 192, "val": 48, "test": 60}, 9),
    "logos": (3, {"train": 128, "val": 32, "test": 40}, 10),
}


def write_image(path: Path, colour: Any, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


# The shipped domains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_shipped_domain_has_the_promised_classes_and_images(domain: str) -> None:
    channels, counts, smallest = DOMAINS[domain]
    for split, classes in counts.items():
        data = datasets.shipped(domain, split)
        assert data.images.dtype == torch.uint8
        assert data.labels.dtype == torch.int64
        assert data.images.shape == (len(data), channels, 32, 32)
        assert len(data.classes) == len(set(data.classes)) == classes
        per_class = torch.bincount(data.labels, minlength=classes)
        assert len(per_class) == classes
        assert per_class.min() >= smallest
        assert data.images.float().flatten(1).std(1).min() > 0, "a blank image"


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_class_and_no_image(domain: str) -> None:
    parts = [datasets.shipped(domain, split) for split in datasets.SPLITS]
    names = [name for part in parts for name in part.classes]
    assert len(names) == len(set(names))
    prints = [hashlib.sha256(image.numpy().tobytes()).digest() for part in parts for image in part.images]
    assert len(prints) == len(set(prints)), "an image stands twice, in one class, two classes or two splits"


def test_attribution_counts_every_shipped_image() -> None:
    text = (datasets.DATA / "ATTRIBUTION.md").read_text()
    for domain in DOMAINS:
        total = sum(len(datasets.shipped(domain, split)) for split in datasets.SPLITS)
        assert f"{domain} {total}" in text.splitlines()[-1]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| set")]
    assert len(rows) > 100
    counted = sum(int(part.split()[1]) for row in rows for part in row[6].split(","))
    assert counted == sum(len(datasets.shipped(d, s)) for d in DOMAINS for s in datasets.SPLITS)


@pytest.mark.parametrize(("benchmark", "counts"), [("cifar_fs", (64, 16, 20)), ("cub", (100, 50, 50))])
def test_benchmark_splits_are_disjoint(benchmark: str, counts: tuple[int, ...]) -> None:
    splits = json.loads((datasets.DATA / f"{benchmark}.json").read_text())
    assert tuple(len(splits[split]) for split in datasets.SPLITS) == counts
    assert len({name for split in datasets.SPLITS for name in splits[split]}) == sum(counts)


# Images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [suffix[1:] for suffix in datasets.IMAGE_SUFFIXES])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = write_image(tmp_path / f"a.{suffix}", (200, 200, 200))
    image = datasets.read_image(path, 3, 4, 5)
    assert image.shape == (3, 4, 5)
    torch.testing.assert_close(image, torch.full_like(image, 200), atol=2, rtol=0)


def test_transparent_pixels_are_white_and_opaque_ones_are_not(tmp_path: Path) -> None:
    clear = write_image(tmp_path / "clear.png", (255, 0, 0, 0), mode="RGBA")
    half = write_image(tmp_path / "half.png", (0, 0, 0, 128), mode="RGBA")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.gif", transparency=0)
    for path in (clear, tmp_path / "palette.gif"):
        assert (datasets.read_image(path, 3, 4, 4) == 255).all()
    assert (datasets.read_image(half, 1, 4, 4) == 127).all()
    opaque = write_image(tmp_path / "opaque.png", (255, 0, 0, 255), mode="RGBA")
    assert datasets.read_image(opaque, 3, 1, 1).flatten().tolist() == [255, 0, 0]


def test_channels_and_sixteen_bits(tmp_path: Path) -> None:
    red = write_image(tmp_path / "red.png", (255, 0, 0))
    assert datasets.read_image(red, 1, 2, 2).flatten().tolist() == [76] * 4  # luma: 0.299 of 255
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert datasets.read_image(tmp_path / "deep.png", 1, 4, 4).flatten().tolist() == [128] * 16


def test_rows_and_columns_keep_their_places(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    torch.testing.assert_close(datasets.read_image(tmp_path / "a.png", 1, 3, 4)[0], torch.from_numpy(pixels))


# Layouts -------------------------------------------------------------------------------------------------------------


def test_folder_is_sorted_and_mixes_sizes_and_formats(tmp_path: Path) -> None:
    write_image(tmp_path / "b" / "2.png", "white", (5, 9))
    write_image(tmp_path / "b" / "1.JPG", "black", (50, 40))
    write_image(tmp_path / "a" / "x.bmp", "black")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    data = datasets.folder(tmp_path, channels=1, height=8, width=10)
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.images.shape == (3, 1, 8, 10)
    assert data.images.flatten(1).float().mean(1).tolist() == [0, 0, 255]


def test_folder_with_splits_and_one_class(tmp_path: Path) -> None:
    for split in datasets.SPLITS:
        write_image(tmp_path / split / f"only-{split}" / "1.png", "red")
    data = datasets.folder(tmp_path, channels=3, height=4, width=4, split="val")
    assert data.classes == ("only-val",)
    mini = datasets.mini_imagenet(tmp_path, "test")
    assert mini.images.shape == (1, 3, 84, 84)
    assert mini.classes == ("only-test",)


def test_csv_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures" / "one.png", "white")
    write_image(tmp_path / "two.png", "black")
    (tmp_path / "list.csv").write_text("label,path,note\nzebra,pictures/one.png,x\n0,two.png,y\n", encoding="utf-8-sig")
    data = datasets.csv(tmp_path / "list.csv", channels=3, height=4, width=4)
    assert data.classes == ("0", "zebra")
    assert data.labels.tolist() == [1, 0]
    assert data.images.flatten(1).float().mean(1).tolist() == [255, 0]


def cifar_binary(root: Path, names: list[str], per_class: int = 2) -> None:
    """A CIFAR-100 of made-up images: image k of fine label f is filled with f in red, k in green, 7 in blue."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    for part, file in enumerate(("train.bin", "test.bin")):
        records = [
            bytes([3, fine]) + bytes([fine] * 1024) + bytes([part * per_class + k] * 1024) + bytes([7] * 1024)
            for k in range(per_class)
            for fine in range(len(names))
        ]
        (root / file).write_bytes(b"".join(records))


def all_of(benchmark: str) -> list[str]:
    splits = json.loads((datasets.DATA / f"{benchmark}.json").read_text())
    return sorted(name for split in datasets.SPLITS for name in splits[split])


@pytest.mark.parametrize("inner", [".", "cifar-100-binary"])
def test_cifar_fs_binary(tmp_path: Path, inner: str) -> None:
    names = all_of("cifar_fs")
    cifar_binary(tmp_path / inner, names)
    data = datasets.cifar_fs(tmp_path, "test")
    assert len(data.classes) == 20
    assert data.images.shape == (80, 3, 32, 32)
    assert data.labels.tolist() == [label for label in range(20) for _ in range(4)]
    for image, label in zip(data.images, data.labels.tolist()):
        assert image[0].unique().tolist() == [names.index(data.classes[label])]
        assert image[2].unique().tolist() == [7]
    assert data.images[:4, 1, 0, 0].tolist() == [0, 1, 2, 3]


def test_cifar_fs_folder(tmp_path: Path) -> None:
    for k, name in enumerate(all_of("cifar_fs")):
        write_image(tmp_path / name / "1.png", (k, k, k), (32, 32))
    data = datasets.cifar_fs(tmp_path, "val")
    assert data.images.shape == (16, 3, 32, 32)
    assert data.images[:, 0, 0, 0].tolist() == [all_of("cifar_fs").index(name) for name in data.classes]


@pytest.mark.parametrize("inner", [".", "CUB_200_2011"])
def test_cub(tmp_path: Path, inner: str) -> None:
    for name in json.loads((datasets.DATA / "cub.json").read_text())["val"]:
        write_image(tmp_path / inner / "images" / name / "bird.jpg", "green")
    data = datasets.cub(tmp_path, "val")
    assert data.images.shape == (50, 3, 84, 84)
    assert data.classes[0][3] == "."


def test_load_finds_the_loader(tmp_path: Path) -> None:
    write_image(tmp_path / "data" / "a" / "1.png", "red")
    (tmp_path / "list.csv").write_text("path,label\ndata/a/1.png,a\n")
    write_image(tmp_path / "mini" / "val" / "c" / "1.png", "red")
    cifar_binary(tmp_path / "cifar", all_of("cifar_fs"), per_class=1)
    small: dict[str, Any] = {"channels": 1, "height": 5, "width": 6}
    assert datasets.load("icons", "val").classes == datasets.shipped("icons", "val").classes
    assert datasets.load(tmp_path / "data", **small).images.shape == (1, 1, 5, 6)
    assert datasets.load(str(tmp_path / "list.csv"), **small).images.shape == (1, 1, 5, 6)
    assert datasets.load(tmp_path / "mini", "val", **small).classes == ("c",)
    assert datasets.load("mini_imagenet", "val", root=tmp_path / "mini").images.shape == (1, 3, 84, 84)
    assert len(datasets.load("cifar_fs", "test", root=tmp_path / "cifar")) == 40


# Errors --------------------------------------------------------------------------------------------------------------


def prepare_errors(root: Path) -> None:
    """Every mistake of the table below, in one folder."""
    write_image(root / "good" / "a" / "1.png", "red")
    write_image(root / "loose" / "1.png", "red")
    (root / "empty").mkdir()
    write_image(root / "hole" / "a" / "1.png", "red")
    (root / "hole" / "b").mkdir()
    write_image(root / "split" / "train" / "a" / "1.png", "red")
    (root / "broken" / "a").mkdir(parents=True)
    (root / "broken" / "a" / "bad.png").write_bytes(b"not an image")
    whole = (root / "good" / "a" / "1.png").read_bytes()
    (root / "cut" / "a").mkdir(parents=True)
    (root / "cut" / "a" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "header.csv").write_text("file,class\na.png,a\n")
    (root / "norows.csv").write_text("path,label\n")
    (root / "gap.csv").write_text("path,label\ngood/a/1.png,\n")
    (root / "lost.csv").write_text("path,label\nnowhere.png,a\n")
    (root / "binary.csv").write_bytes(b"\xff\xfe\x00path")
    (root / "text.txt").write_text("hello")
    (root / "pickled" / "cifar-100-python").mkdir(parents=True)
    (root / "pickled" / "cifar-100-python" / "meta").write_bytes(b"")
    names = all_of("cifar_fs")
    cifar_binary(root / "short", names, per_class=1)
    (root / "short" / "train.bin").write_bytes(b"12345")
    cifar_binary(root / "untested", names, per_class=1)
    (root / "untested" / "test.bin").unlink()
    cifar_binary(root / "renamed", [name.upper() for name in names], per_class=1)
    cifar_binary(root / "few", names, per_class=1)
    for file in ("train.bin", "test.bin"):
        (root / "few" / file).write_bytes((root / "few" / file).read_bytes()[:3074])
    write_image(root / "cifarpart" / names[0] / "1.png", "red")
    (root / "birds" / "images").mkdir(parents=True)


SMALL: dict[str, Any] = {"channels": 3, "height": 4, "width": 4}
ERRORS: dict[str, tuple[Callable[[Path], LabelledImages], list[str]]] = {
    "no domain": (lambda p: datasets.shipped("icon", "train"), ["'icon'", "icons, emoji, logos"]),
    "no split": (lambda p: datasets.shipped("icons", "training"), ["'training'", "train, val, test"]),
    "split left out": (lambda p: datasets.load("icons"), ["icons", "which split"]),
    "no such name": (lambda p: datasets.load("cifarfs", "train"), ["cifarfs", "cifar_fs", "found nothing"]),
    "no dataset file": (lambda p: datasets.load(p / "text.txt"), ["text.txt", ".csv"]),
    "root left out": (lambda p: datasets.load("cub", "train"), ["cub", "root"]),
    "csv with split": (lambda p: datasets.load(p / "lost.csv", "val"), ["lost.csv", "no splits", "'val'"]),
    "no folder": (lambda p: datasets.folder(p / "god", **SMALL), ["god", "found nothing", "good/"]),
    "a file": (lambda p: datasets.folder(p / "text.txt", **SMALL), ["text.txt", "found a file"]),
    "no classes": (lambda p: datasets.folder(p / "loose", **SMALL), ["sub-folder", "1.png"]),
    "nothing in it": (lambda p: datasets.folder(p / "empty", **SMALL), ["sub-folder", "nothing in it"]),
    "empty class": (lambda p: datasets.folder(p / "hole", **SMALL), ["'b'", "png", "nothing in it"]),
    "splits as classes": (lambda p: datasets.folder(p / "split", **SMALL), ["train", "which split"]),
    "missing split": (lambda p: datasets.folder(p / "split", split="val", **SMALL), ["val", "train/"]),
    "broken image": (lambda p: datasets.folder(p / "broken", **SMALL), ["bad.png", "not a readable image"]),
    "cut image": (lambda p: datasets.folder(p / "cut", **SMALL), ["half.png", "not a readable image"]),
    "two channels": (lambda p: datasets.folder(p / "good", channels=2, height=4, width=4), ["1 or 3", "2"]),
    "no csv": (lambda p: datasets.csv(p / "none.csv", **SMALL), ["none.csv", "path,label", "found nothing"]),
    "columns": (lambda p: datasets.csv(p / "header.csv", **SMALL), ["path,label", "'file,class'"]),
    "no rows": (lambda p: datasets.csv(p / "norows.csv", **SMALL), ["norows.csv", "found none"]),
    "empty field": (lambda p: datasets.csv(p / "gap.csv", **SMALL), ["gap.csv, line 2", "empty"]),
    "lost image": (lambda p: datasets.csv(p / "lost.csv", **SMALL), ["nowhere.png", "found nothing"]),
    "not text": (lambda p: datasets.csv(p / "binary.csv", **SMALL), ["binary.csv", "UTF-8"]),
    "pickle": (lambda p: datasets.cifar_fs(p / "pickled", "train"), ["pickle", "binary version"]),
    "no cifar": (lambda p: datasets.cifar_fs(p / "good", "train"), ["train.bin", "found a/"]),
    "cut cifar": (lambda p: datasets.cifar_fs(p / "short", "train"), ["train.bin", "3074", "5 bytes"]),
    "half cifar": (lambda p: datasets.cifar_fs(p / "untested", "train"), ["test.bin", "found fine_label_names.txt"]),
    "cifar names": (lambda p: datasets.cifar_fs(p / "renamed", "train"), ["fine_label_names.txt", "'apple'"]),
    "cifar class": (lambda p: datasets.cifar_fs(p / "few", "val"), ["expected images of class", "found none"]),
    "cifar folder": (lambda p: datasets.cifar_fs(p / "cifarpart", "train"), ["expected a folder", "found nothing"]),
    "no images": (lambda p: datasets.cub(p / "good", "train"), ["images", "CUB-200-2011", "found nothing"]),
    "no bird": (lambda p: datasets.cub(p / "birds", "train"), ["001.Black_footed_Albatross", "found nothing"]),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    prepare_errors(root)
    return root


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_clear_error(mistakes: Path, case: str) -> None:
    call, fragments = ERRORS[case]
    with pytest.raises(MetapoolError) as caught:
        call(mistakes)
    message = str(caught.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"text"])
def test_damaged_shipped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(datasets, "DATA", tmp_path)
    with pytest.raises(MetapoolError, match=r"icons-train\.npz"):
        datasets.shipped("icons", "train")
    (tmp_path / "icons-train.npz").write_bytes(content)
    with pytest.raises(MetapoolError, match=r"icons-train\.npz"):
        datasets.shipped("icons", "train")


# The tool that builds the arrays --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    path = Path(__file__).parents[1] / "tools" / "build_icons.py"
    spec = importlib.util.spec_from_file_location("build_icons", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_icons"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["build_icons"]


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("calendar", "calendar"),
        ("calendar-24-filled", "calendar"),
        ("outline-two-tone-calendar", "calendar"),
        ("check-circle-rounded", "check"),
        ("calendar-plus", None),
        ("circle-filled", None),
        ("paperclip", "paperclip"),
    ],
)
def test_style_words_go(tool: ModuleType, name: str, concept: str | None) -> None:
    assert tool.concept_of(name) == concept


def drawing(tool: ModuleType, name: str, *ink: tuple[int, int]) -> Any:
    pixels = np.full((1, 32, 32), 255, dtype=np.uint8)
    for start, stop in ink:
        pixels[:, start:stop, start:stop] = 0
    return tool.Drawing("set", name, pixels)


def test_near_identical_finds_noise_and_not_another_drawing(tool: ModuleType) -> None:
    noise = np.random.default_rng(0)
    first, other = (drawing(tool, "a", (4, 20)).pixels, drawing(tool, "b", (4, 12)).pixels)
    noisy = np.clip(first + noise.integers(-3, 4, first.shape), 0, 255).astype(np.uint8)
    images = np.stack([first, other, noisy, other])
    assert tool.near_identical(images, tool.NEAR) == [(0, 2), (1, 3)]
    assert tool.near_identical(images, 1e-9) == [(1, 3)]


def test_two_of_takes_the_plainest_and_the_most_different(tool: ModuleType) -> None:
    plain, close, far, framed = (
        drawing(tool, "home", (4, 20)),
        drawing(tool, "home-bold", (4, 21)),
        drawing(tool, "home-filled", (0, 30)),
        drawing(tool, "home-circle", (10, 12), (20, 31)),
    )
    assert [d.name for d in tool.two_of([framed, far, close, plain])] == ["home", "home-filled"]
    assert [d.name for d in tool.two_of([framed, plain])] == ["home", "home-circle"]
    assert tool.two_of([]) == []


def test_a_drawing_of_two_classes_leaves_both(tool: ModuleType) -> None:
    classes = {
        "mail": [drawing(tool, "mail", (4, 20)), drawing(tool, "mail-2", (2, 10))],
        "letter": [drawing(tool, "letter", (4, 20)), drawing(tool, "letter-2", (12, 30))],
    }
    kept = tool.drop_shared(classes)
    assert {name: [d.name for d in drawings] for name, drawings in kept.items()} == {
        "mail": ["mail-2"],
        "letter": ["letter-2"],
    }


def test_classes_are_split_by_the_seed_alone(tool: ModuleType) -> None:
    names = [f"class{k}" for k in range(20)]
    parts = tool.split_classes(names, (12, 3, 5))
    assert [len(parts[split]) for split in datasets.SPLITS] == [12, 3, 5]
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert tool.split_classes(reversed(names), (12, 3, 5)) == parts


def test_written_bytes_repeat(tool: ModuleType, tmp_path: Path) -> None:
    classes = {"a": [drawing(tool, "a", (4, 20))], "b": [drawing(tool, "b", (1, 5)), drawing(tool, "b-2", (6, 9))]}
    for name in ("one.npz", "two.npz"):
        tool.write_split(tmp_path / name, classes, ["a", "b"])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == [0, 1, 1]
        assert arrays["classes"].tolist() == ["a", "b"]


def test_no_rejected_or_merged_name_is_a_shipped_class(tool: ModuleType) -> None:
    shipped = {d: {name for s in datasets.SPLITS for name in datasets.shipped(d, s).classes} for d in DOMAINS}
    assert not shipped["icons"] & (set(tool.ICON_REJECTED) | set(tool.ICON_SAME))
    assert not shipped["emoji"] & set(tool.EMOJI_REJECTED)
    assert not shipped["logos"] & (set(tool.LOGO_REJECTED) | set(tool.LOGO_SAME))
