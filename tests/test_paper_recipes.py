"""The recipes of the paper from start to end, as their comments say, on made-up files of the published layouts.

Counts are turned down by flags; the commands, the layouts, the methods and the losses are those of the full runs.
"""

import json
import random
import re
import shlex
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from metapool.interface.cli import main
from metapool.interface.recipe import RECIPES, load_recipe, shipped_recipes
from metapool.learners import MAML
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.realdata.datasets import DATA, SPLITS
from metapool.recover import GeneratorRecovery

PAPER = [name for name in shipped_recipes() if name.startswith("paper/")]
PER_CLASS = 6  # an image to learn from and five to ask about, on validation classes
SMALL_POOL = "--epochs 1 --batch 8 --jobs 1"
SMALL_RUN = (
    "--method.recovery.per-class 4 --method.recovery.steps 1 --method.recovery.width 2 --method.recovery.code 4 "
    "--method.recovery.shift 1 --method.probe.width 2 --method.probe.steps 1 --method.probe.batch 8 "
    "--method.groups 1 --method.teachers 2 --method.batch 8 --method.replay-updates 1 --method.replay-tasks 1 "
    "--method.query 1 --method.width 2 --method.steps 2 --method.learner.inner-steps 1 --method.learner.test-steps 1 "
    "--compare untrained ensemble --evaluation.episodes 3 --evaluation.query 2 --evaluation.shots 1 --jobs 1"
)


def commands(recipe: str) -> list[list[str]]:
    """The commands in a recipe's comment, as words, without the program's name."""
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("#   metapool ")]


def picture(seed: int) -> bytes:
    """Eight by eight pixels of noise, as a file."""
    buffer = BytesIO()
    Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(192)).save(buffer, "png")
    return buffer.getvalue()


def folders(root: Path, classes: list[str]) -> None:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            (root / name / f"{number}.png").write_bytes(picture(PER_CLASS * label + number))


def cifar(root: Path) -> None:
    root.mkdir()
    splits = json.loads((DATA / "cifar_fs.json").read_text())
    names = [name for split in SPLITS for name in splits[split]]
    (root / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    for number, file in enumerate(("train.bin", "test.bin")):
        draw = random.Random(number)
        records = [bytes([0, label]) + draw.randbytes(3072) for label in range(100) for _ in range(PER_CLASS // 2)]
        (root / file).write_bytes(b"".join(records))


def mini_imagenet(root: Path) -> None:
    for split in SPLITS:
        folders(root / split, [f"{split}-{label}" for label in range(6)])


def cub(root: Path) -> None:
    splits = json.loads((DATA / "cub.json").read_text())
    folders(root / "images", [name for split in SPLITS for name in splits[split]])


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "cifar-100-binary": cifar,
    "miniimagenet": mini_imagenet,
    "CUB_200_2011": cub,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for name, write in LAYOUTS.items():
        write(root / name)
    (root / "store").mkdir()
    return root


def turned_down(command: list[str], models: int) -> list[str]:
    """The same command with narrow networks and small counts; what it names stays."""
    narrow = [re.sub(r"^(conv4|resnet\d+):\d+$", r"\1:2", word) for word in command]
    if command[:2] == ["pool", "build"]:
        narrow += shlex.split(f"--models {models} {SMALL_POOL}")
    return narrow


@pytest.mark.parametrize("recipe", PAPER)
def test_a_recipe_of_the_paper_runs_from_its_comment(
    recipe: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*LAYOUTS, "store"):
        (tmp_path / name).symlink_to(published / name)
    monkeypatch.chdir(tmp_path)
    *making, last = commands(recipe)
    assert last[:2] == ["run", recipe]
    for command in making:
        main(turned_down(command, models=2 if len(making) == 1 else 1))
    about = load_recipe(recipe)
    several = isinstance(about.evaluation.data, tuple)
    small = [*last[1:], *shlex.split(SMALL_RUN)]
    if recipe != "paper/cifar_fs":  # MAML on 200 episodes of 84 pixels would be most of the time
        small += ["--evaluation.validation", "None"]
    capsys.readouterr()

    main(["plan", *small, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["name"] == about.name
    assert {"recover", "meta-model", "scores"} <= {stage["stage"].split()[0] for stage in plan["stages"]}
    assert 0 < plan["minutes"] <= plan["minutes_whole"]
    assert not (tmp_path / "runs").exists(), "a plan makes nothing"

    main(["run", *small])
    folder = tmp_path / "runs" / about.name
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores["methods"]) == {"tgr", "untrained", "ensemble"}
    assert all(0 < row["shots"]["1"]["mean"] < 100 for row in scores["methods"].values())
    assert scores["methods"]["ensemble"]["models_at_inference"] == len(ModelPool.open(Path(about.pool)))
    assert set(scores["methods"]["tgr"].get("domains", {})) == (set(about.evaluation.data) if several else set())
    assert (folder / "report.html").is_file()


def test_the_pools_are_what_the_paper_says() -> None:
    assert [name.removeprefix("paper/") for name in PAPER] == [
        "cifar_fs", "cub", "miniimagenet", "multi_architecture", "multi_domain",
    ]  # fmt: skip
    for recipe in PAPER:
        for command in (command for command in commands(recipe) if command[:2] == ["pool", "build"]):
            flags = {word: after for word, after in pairwise(command) if word.startswith("--")}
            assert flags["--models"] == "100"
            assert flags["--epochs"] == ("100" if flags["--data"] == "cub" else "60")
            assert flags["--batch"] == "128"


@pytest.mark.parametrize("recipe", PAPER)
def test_the_settings_are_the_paper_s(recipe: str) -> None:
    about = load_recipe(recipe)
    method = about.method
    assert isinstance(method, TGR)
    assert isinstance(method.recovery, GeneratorRecovery)
    assert (method.recovery.steps, method.recovery.learning_rate, method.recovery.per_class) == (200, 1e-3, 30)
    assert (method.recovery.code, method.recovery.width, method.recovery.warm_steps) == (256, 64, 0)
    assert (method.groups, method.teachers, method.alpha, method.task_loss) == (5, 4, 1e-3, "classify")
    assert (method.replay, method.replay_tasks, method.learning_rate) == ("episodes", 16, 1e-3)
    assert method.learner == MAML(inner_steps=5, test_steps=10, inner_rate=0.01)
    assert (method.way, method.shot, method.query, method.width) == (5, 1, 15, 32)
    assert method.steps == (1000 if "multi" in recipe else 1200)
    evaluation = about.evaluation
    assert (evaluation.way, evaluation.shots, evaluation.query, evaluation.episodes) == (5, (1, 5), 15, 600)
