"""Recoveries side by side: what is measured of them, and a sheet of seconds."""

from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import studied
import torch
import toys

from metapool.blackbox import ZeroOrderRecovery
from metapool.interface.figures import recovered_sheet
from metapool.interface.figures.pools import SheetRow, contact_sheet
from metapool.interface.studies import recoveries as module
from metapool.interface.studies.recoveries import judged, ways
from metapool.methods.free import FREE
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import GeneratorRecovery, PixelRecovery

HASTY = {
    "recipe's generator": toys.HASTY,
    "pixels": PixelRecovery(per_class=2, steps=2),
    "meta-generator": FREE(
        visit=GeneratorRecovery(per_class=2, steps=2, code=8, width=4, shift=1), teachers=2, steps=10, warm_up=0.1
    ),
    "answers alone": ZeroOrderRecovery(steps=2, directions=2, code=8, width=4, shift=1),
    "untrained generator": GeneratorRecovery(per_class=2, steps=0, code=8, width=4),
}


def test_every_recovery_has_a_row() -> None:
    found = ways(toys.HASTY)
    assert found["recipe's generator"] is toys.HASTY
    paper = found["paper's generator"]
    assert isinstance(paper, GeneratorRecovery)
    assert (paper.steps, paper.learning_rate, paper.width, paper.code, paper.per_class) == (200, 1e-3, 64, 256, 30)
    assert paper.weights.batch_norm == 1
    control = found["untrained generator"]
    assert isinstance(control, GeneratorRecovery)
    assert (control.steps, control.width) == (0, toys.HASTY.width)
    assert set(HASTY) < set(found)


def test_what_is_judged(fitted_model: PretrainedModel) -> None:
    data = cases.toy_images(classes=3, per_class=5, shape=(1, 16, 16), seed=3)
    task = judged(fitted_model, data.images, data.labels, 4, 1.5)
    assert torch.bincount(task.labels).tolist() == [4, 4, 4]
    torch.testing.assert_close(task.images[:4], data.images[:4])
    assert task.record["agreement"] == 100
    assert task.record["seconds"] == 1.5
    wrong = judged(fitted_model, data.images, (data.labels + 1) % 3, 4, 0.0)
    assert wrong.record["agreement"] == 0
    assert wrong.record["cross_entropy"] > task.record["cross_entropy"] + 1
    noise = torch.randint(256, data.images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert judged(fitted_model, noise, data.labels, 4, 0.0).record["batch_norm"] > 2 * task.record["batch_norm"]


def test_a_sheet_has_its_images_and_says_which_are_real() -> None:
    images = np.zeros((3, 1, 16, 16), dtype=np.uint8)
    row = SheetRow("real images", "a <note>", recovered_sheet(images), real=True)
    assert row.size == (3 * 34 - 2, 32)
    svg = contact_sheet("of “a”", [SheetRow("pixels", "", recovered_sheet(images[:2])), row])
    assert svg.count("data:image/png;base64,") == 2
    assert "a &lt;note&gt;" in svg
    assert svg.count("<line") == 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recoveries")


@pytest.fixture(scope="module")
def flags(root: Path, tiny_pool: ModelPool) -> list[object]:
    data = toys.write_images(root / "images", cases.toy_images(classes=4, per_class=6, shape=(1, 16, 16), seed=9))
    own = ["--pool", tiny_pool.path, "--recipe", studied.recipe(root), "--data", data]
    return [*own, "--models", 2, "--images", 3, "--label", "pattern-1"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ways", lambda recipe: HASTY)


@pytest.fixture
def result(root: Path, flags: list[object], hasty: None) -> dict[str, Any]:
    return studied.study(root, "recoveries", *flags)


def test_every_recovery_of_every_model_is_measured(result: dict[str, Any], root: Path) -> None:
    rows = {(row["recovery"], row["model"]): row for row in result["rows"]}
    assert set(rows) == {(name, id) for name in (*HASTY, "real images") for id in ("a-conv4", "b-resnet10")}
    assert [row["recovery"] for row in result["rows"]][-2:] == ["real images"] * 2
    assert all(row["real"] == (row["recovery"] == "real images") for row in result["rows"])
    assert all(row["images"] == 3 * (3 if row["model"] == "a-conv4" else 2) for row in result["rows"])
    assert rows["real images", "a-conv4"]["agreement"] == 100
    assert rows["real images", "a-conv4"]["batch_norm"] < rows["untrained generator", "a-conv4"]["batch_norm"]
    assert all(row["seconds"] > 0 for row in result["rows"] if not row["real"])
    mean = result["summary"]["recoveries"]["pixels"]["batch_norm"]
    own = [rows["pixels", id]["batch_norm"] for id in ("a-conv4", "b-resnet10")]
    assert mean["mean"] == pytest.approx(np.mean(own), abs=1e-3)
    assert mean["low"] < mean["mean"] < mean["high"]
    svg = studied.figures(root, "recoveries")["recoveries.svg"]
    assert svg.count("<image") == 6
    assert "real images (not recovered)" in svg
    assert "pattern-1" in svg


def test_the_second_call_makes_nothing(root: Path, flags: list[object], result: dict[str, Any]) -> None:
    before = studied.made(root)
    assert studied.study(root, "recoveries", *flags) == result
    assert studied.made(root) == before
    without = studied.study(root, "recoveries", *flags, "--data", "None")
    assert "real images" not in without["summary"]["sheets"]
    studied.check_sample(root / "runs" / "study-recoveries" / "recoveries.json", root / "store")
    assert studied.made(root) == before


def test_the_answer_follows_the_numbers() -> None:
    def row(name: str, model: str, distance: float) -> dict[str, Any]:
        return {"recovery": name, "model": model, "agreement": 90.0, "batch_norm": distance, "cross_entropy": 0.1,
                "seconds": 1.0}  # fmt: skip

    clear = [row("a", m, d) for m, d in (("x", 1.0), ("y", 1.1))] + [
        row("b", m, d) for m, d in (("x", 9.0), ("y", 9.1))
    ]
    answer = module._answer(clear, ["a", "b"], 2)
    assert answer.startswith("a comes clearly closest to the models' batch-norm statistics, by 8.0 [8.0, 8.0] before b")
    unclear = [row("a", m, d) for m, d in (("x", 3.0), ("y", 1.1))] + [
        row("b", m, d) for m, d in (("x", 1.0), ("y", 2.1))
    ]
    assert module._answer(unclear, ["a", "b"], 2).startswith("b comes closest, though not clearly, to")


def test_mistakes_are_one_line(
    root: Path, flags: list[object], hasty: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, wrong in (
        (["--label", "tree"], "label: model 'a-conv4' knows pattern-0, pattern-1, pattern-2, not 'tree'"),
        (["--data", "icons"], "data: icons has no images of class 'pattern-0'"),
    ):
        with pytest.raises(SystemExit):
            studied.study(root, "recoveries", *flags, *more)
        assert wrong in capsys.readouterr().err
