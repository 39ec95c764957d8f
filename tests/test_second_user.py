"""The second user's path, as documented: own folder of images, own pool, own few-shot learner, own predictions."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml
from PIL import Image

from metapool.base.images import LabelledImages
from metapool.base.store import Store
from metapool.interface import run as running
from metapool.interface.cli import main
from metapool.pool import ModelPool

RECIPE: dict[str, Any] = {
    "name": "mine",
    "method": {
        "name": "tgr",
        "recovery": {"name": "generator", "per_class": 12, "steps": 30, "code": 16, "width": 8, "learning_rate": 0.02},
        "probe": {"width": 4, "steps": 5, "batch": 16},
        "groups": 1,
        "teachers": 2,
        "width": 8,
        "steps": 40,
        "batch": 32,
        "check_every": 20,
        "learning_rate": 0.01,
        "replay_updates": 1,
        "replay_batch": 32,
        "average": 0.5,
    },
    "compare": ["untrained", "best-single", "ensemble"],
}


def metapool(command: str) -> None:
    """As typed in a shell."""
    main(shlex.split(command))


def write_photos(folder: Path, data: LabelledImages) -> Path:
    """As a user has them: colour, larger than the network's input, of several formats and sizes, with other files."""
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
        place = folder / data.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(image.squeeze(0).numpy())
        tinted = Image.merge("RGB", (grey, grey, grey.point(lambda value: value // 2)))
        side = (32, 48, 64)[number % 3]
        tinted.resize((side, side), Image.Resampling.NEAREST).save(place / f"IMG {number}.{('png', 'jpg')[number % 2]}")
        (place / ".DS_Store").write_bytes(b"\x00")
    return folder


def test_from_own_images_to_own_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "Store", partial(Store, threads=1))
    monkeypatch.chdir(tmp_path)  # as a user: relative paths, default places
    write_photos(Path("photos") / "train", toys.stripes(toys.POOL_KINDS, 20, seed=1))
    write_photos(Path("photos") / "test", toys.stripes(toys.NEW_KINDS, 12, seed=2))

    build = "pool build --data photos --out pools/mine --size 16 --channels 1 --models 3 --way 3 --epochs 12 --batch 16"
    metapool(f"{build} --architectures conv4:8 --shift 1 --licence 'my own' --jobs 1")
    shown = capsys.readouterr().out
    assert "mine-002" in shown
    assert "3 models, mean accuracy on held-out images of their own tasks" in shown
    pool = ModelPool.open(Path("pools/mine"))
    assert all(entry.licence == "my own" and (entry.accuracy or 0) > 50 for entry in pool.manifest.models)
    assert all(entry.input.shape == (1, 16, 16) for entry in pool.manifest.models)
    assert not {name for entry in pool.manifest.models for name in entry.classes} & set(
        toys.stripes(toys.NEW_KINDS, 1).classes
    ), "the pool does not know the test classes"

    Path("mine.yaml").write_text(yaml.safe_dump(RECIPE))
    run = "run mine.yaml --pool pools/mine --evaluation.data photos --evaluation.way 4 --evaluation.query 5 --jobs 1"
    metapool(f"{run} --evaluation.episodes 40")
    shown = capsys.readouterr().out
    assert "report: runs/mine/report.html" in shown
    assert Path("runs/mine/report.html").stat().st_size > 10_000
    scores = json.loads(Path("runs/mine/scores.json").read_text())["methods"]
    assert list(scores) == ["tgr", "untrained", "best-single", "ensemble"]
    assert scores["tgr"]["shots"]["5"]["mean"] > 25 + 20

    metapool("evaluate --model runs/mine/model --data photos --way 4 --shot 5 --query 5 --episodes 40 --json")
    alone = json.loads(capsys.readouterr().out)
    assert alone["mean"] == scores["tgr"]["shots"]["5"]["mean"], "the saved model is the one in the table"

    write_photos(Path("examples"), toys.stripes(toys.NEW_KINDS, 5, seed=3))
    write_photos(Path("unknown"), toys.stripes(toys.NEW_KINDS, 6, seed=4))
    metapool("predict --model runs/mine/model --support examples --query unknown --json")
    answers = json.loads(capsys.readouterr().out)
    assert len(answers) == 24
    right = [answer["class"] == Path(answer["file"]).parent.name for answer in answers]
    assert sum(right) >= 12, "a quarter is chance"

    before = sorted(path for path in Path("store").rglob("made.json"))
    metapool(f"{run} --evaluation.episodes 40")
    assert sorted(path for path in Path("store").rglob("made.json")) == before, "nothing is made twice"


def test_a_folder_of_classes_alone_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``<class>/<images>`` without train and test: the pool learns from all, scores are on a folder of its own."""
    monkeypatch.setattr(running, "Store", partial(Store, threads=1))
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), toys.stripes((0, 1, 2, 4), 8))
    write_photos(Path("others"), toys.stripes((3, 5), 4))
    build = (
        "pool build --data photos --out pool --size 16 --models 2 --way 2 --epochs 1 --architectures conv4:4 --jobs 1"
    )
    metapool(build)
    assert ModelPool.open(Path("pool"))[0].input.shape == (3, 16, 16)
    recovery = {"name": "pixels", "per_class": 6, "steps": 1}
    method = {**RECIPE["method"], "recovery": recovery, "steps": 2, "way": 2}
    Path("mine.yaml").write_text(
        yaml.safe_dump({"name": "mine", "pool": "pool", "jobs": 1, "method": method, "compare": []})
    )
    metapool("run mine.yaml --evaluation.data others --evaluation.way 2 --evaluation.shots 1 --evaluation.query 3")
    assert "report: runs/mine/report.html" in capsys.readouterr().out
    metapool("predict --model runs/mine/model --support photos --query others")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(len(line.split("\t")) == 3 for line in lines)
