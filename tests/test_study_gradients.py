"""The study of gradient regularization: its own formulas, its answer both ways, and a whole run on a toy pool."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import studied
import torch
import torch.nn.functional as F
import toys
from torch import Tensor

from metapool.base.functional import Params
from metapool.gradients import Batch, describe
from metapool.interface.cli import main
from metapool.interface.recipe import Recipe
from metapool.interface.studies import gradients
from metapool.interface.studies.gradients import GradientsStudy, answer_of, changes
from metapool.interface.studies.single_steps import SingleStep, step_differences, step_seconds
from metapool.interface.studies.study import Row
from metapool.methods.tgr import TGR

Output = pytest.CaptureFixture[str]
ARGUMENTS = ["--models", "3", "--steps", "4", "--seeds", "2", "--alphas", "0.01", "0.5", "--halvings", "1"]


def smooth_step() -> SingleStep:
    """Three tasks of a smooth network in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    params = {"first": draw(4, 6).requires_grad_(), "second": draw(6, 3).requires_grad_()}

    def loss(params: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(torch.tanh(batch[0] @ params["first"]) @ params["second"], batch[1])

    return SingleStep(loss, None, params, (draw(3, 10, 4), torch.randint(3, (3, 10), generator=generator)))


def planted(factor: float, shift: float) -> list[Row]:
    """Three seeds of one task loss, in which α = 0.1 multiplies R and shifts the cosine, up to a little noise."""
    rows: list[Row] = []
    for seed in range(3):
        for alpha in (0.0, 0.1):
            noise = 1 + 0.001 * seed * alpha
            times, more = (factor * noise, shift * noise) if alpha else (1.0, 0.0)
            rows.append(
                {
                    **{"task_loss": "classify", "alpha": alpha, "seed": seed, "discrepancy": 2.0 * (seed + 1) * times},
                    **{"relative": 0.3 * times, "cosine": 0.2 + more, "loss": 1.0},
                }
            )
    return rows


def test_distances_are_those_of_the_definitions() -> None:
    """Against finite differences of L̄ and R, taken one number at a time."""
    step, alpha = smooth_step(), 0.05

    def objective(moved: Params, weight: float) -> float:
        found = [torch.autograd.grad(step.loss(moved, task), list(moved.values())) for task in zip(*step.batches)]
        vectors = torch.stack([torch.cat([part.flatten() for part in one]) for one in found])
        spread = (vectors - vectors.mean(0)).square().sum() / (2 * len(vectors))
        losses = torch.stack([step.loss(moved, task) for task in zip(*step.batches)])
        return float((losses.mean() + weight * spread).detach())

    def slope(weight: float) -> Tensor:
        found = []
        for name, value in step.params.items():
            for place in range(value.numel()):
                ends = []
                for sign in (1, -1):
                    moved = {n: v.detach().clone() for n, v in step.params.items()}
                    moved[name].view(-1)[place] += sign * 1e-5
                    ends.append(objective({n: v.requires_grad_() for n, v in moved.items()}, weight))
                found.append((ends[0] - ends[1]) / 2e-5)
        return torch.tensor(found, dtype=torch.float64)

    plain, regularized = slope(0.0), slope(alpha)
    expected = float((plain - regularized).norm() / regularized.norm())
    found = step_differences(step, [alpha, alpha / 2])
    assert found["none"][0] == pytest.approx(expected, rel=1e-4)
    assert found["implicit"][0] < found["none"][0] / 5
    assert found["implicit"][0] / found["implicit"][1] == pytest.approx(4, rel=0.1)
    assert found["attached to 2α"][0] / found["attached to 2α"][1] == pytest.approx(4, rel=0.1)
    assert found["attached"][0] / found["attached"][1] == pytest.approx(2, rel=0.1)
    assert found["attached"][0] > 3 * found["attached to 2α"][0]


def test_times_are_positive_and_of_all_steps() -> None:
    seconds = step_seconds(smooth_step(), 0.1, 2)
    assert list(seconds) == ["mean", "implicit", "attached", "explicit"]
    assert min(seconds.values()) > 0


def test_the_yardstick_of_r_is_the_mean_squared_length() -> None:
    vectors = [{"p": torch.tensor([3.0, 4.0], dtype=torch.float64)}, {"p": torch.tensor([0.0, 1.0])}]
    stats = describe(vectors, [1.0, 1.0])
    assert stats.squared_norm == pytest.approx((25 + 1) / 2)
    mean = torch.stack([vector["p"] for vector in vectors]).mean(0)
    assert stats.discrepancy == pytest.approx((stats.squared_norm - float(mean.square().sum())) / 2)
    assert stats.discrepancy < stats.squared_norm / 2


def test_changes_are_paired_over_seeds() -> None:
    found = changes(planted(0.5, 0.1))["classify"]["0.1"]
    assert found["discrepancy"]["mean"] == pytest.approx(-50, abs=0.1)
    assert found["cosine"]["mean"] == pytest.approx(0.1, abs=1e-3)
    # R itself triples from seed to seed: an interval that did not pair would be wide.
    assert found["discrepancy"]["high"] - found["discrepancy"]["low"] < 0.1
    logs = [math.log(0.5 * (1 + 0.0001 * seed)) for seed in range(3)]
    assert found["discrepancy"]["mean"] == pytest.approx(100 * math.expm1(sum(logs) / 3), rel=1e-9)


@pytest.mark.parametrize(
    ("factor", "shift", "says"),
    [
        (0.5, 0.1, ("lowers R", "raises the mean cosine")),
        (2.0, -0.1, ("raises R", "lowers the mean cosine")),
        (1.0, 0.0, ("does not measurably change R", "does not measurably change the mean cosine")),
    ],
)
def test_the_answer_is_made_of_the_numbers(factor: float, shift: float, says: tuple[str, str]) -> None:
    cost = {"classify": {"mean": 1.0, "implicit": 2.0, "attached": 5.0, "explicit": 3.5}}
    answer = answer_of({"changes": changes(planted(factor, shift)), "pairs": 3, "cost": cost})
    for part in (*says, "α = 0.1", "3 paired seeds", "2.0, 5.0 and 3.5 times (classify)"):
        assert part in answer


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    toys.striped_pool(root / "pool", toys.TRAINING.model_copy(update={"epochs": 1}))
    return root / "pool"


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the main recipe, one of seconds."""
    method = TGR(**{**toys.SMALL_TGR, "recovery": toys.HASTY})
    monkeypatch.setattr(gradients, "tgr_recipe", lambda name: (Recipe(method=method), method))


def test_on_a_toy_pool(pool: Path, small_recipe: None, tmp_path: Path, capsys: Output) -> None:
    arguments = ["--pool", str(pool), *ARGUMENTS, "--jobs", "1", "--store", str(tmp_path / "store")]
    main(["study", "gradients", *arguments, "--out", str(tmp_path / "runs")])
    folder = tmp_path / "runs" / "study-gradients"
    found: dict[str, Any] = json.loads((folder / "gradients.json").read_text())
    assert capsys.readouterr().out == f"{found['answer']}\n{folder}\n"
    assert len(found["rows"]) == 2 * 3 * 2
    for row in found["rows"]:
        assert 0 < row["relative"] < 0.5, "R is at most half of the mean squared length"
        assert -1 <= row["cosine"] <= 1
    table = {(row["task_loss"], row["alpha"], row["seed"]): row for row in found["rows"]}
    assert table["classify", 0.5, 0]["cosine"] != table["classify", 0.0, 0]["cosine"]
    for curves in found["summary"]["curves"].values():
        assert list(curves) == ["0", "0.01", "0.5"]
        # The first step sees the same weights and batches whatever the displacement; the last does not.
        first, last = ([found["cosine"][place] for found in curves.values()] for place in (0, -1))
        assert len(set(first)) == 1
        assert len(set(last)) == 3
    single = found["summary"]["single_steps"]
    assert single["alphas"] == [0.5, 0.25]
    assert all(interval["mean"] > 0 for interval in single["relational"]["implicit"])
    for name in ("gradients-classify", "gradients-relational", "gradients-steps"):
        assert (folder / f"{name}.svg").read_text().startswith("<svg xmlns")
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")}
    main(["study", "gradients", *arguments, "--out", str(tmp_path / "again")])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")} == built
    again = json.loads((tmp_path / "again" / "study-gradients" / "gradients.json").read_text())
    assert (again["rows"], again["summary"], again["answer"]) == (found["rows"], found["summary"], found["answer"])
    studied.check_sample(folder / "gradients.json", tmp_path / "store")


def test_wrong_settings_name_the_field(pool: Path, tmp_path: Path, capsys: Output) -> None:
    for arguments, says in (
        (["--seeds", "1"], "seeds Input should be greater than or equal to 2"),
        (["--alphas", "0.1", "0.1"], "alphas Value error, every displacement once"),
        (["--alphas", "-1"], "alphas.0 Input should be greater than 0"),
    ):
        with pytest.raises(SystemExit):
            main(["study", "gradients", "--pool", str(pool), *arguments, "--store", str(tmp_path / "store")])
        assert says in " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().err).split()).replace(": ", " ")
    assert not (tmp_path / "store").exists()
    assert GradientsStudy().alphas == (1e-3, 1e-2, 1e-1)
