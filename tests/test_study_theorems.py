"""The study of the theorems: its terms against slow references, checks that can fail, and a whole run in small."""

import json
import math
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from metapool.base.store import Store, generator_for
from metapool.gradients import explicit_gradient, implicit_step
from metapool.interface.cli import main
from metapool.interface.studies import small_tasks, two_tasks
from metapool.interface.studies.study import write_study
from metapool.interface.studies.theorems import TheoremsStudy, answer_of, lines, resampled_means

Output = pytest.CaptureFixture[str]
SMALL = TheoremsStudy(seeds=3, halvings=2, alpha=0.01, draws=20, auxiliary=(20, 100), distances=(0.0, 1.0, 6.0))
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("theorems")
    folder = write_study("theorems", SMALL, Store(root / "store"), root / "runs")
    result: dict[str, Any] = json.loads((folder / "theorems.json").read_text())
    return {**result, "folder": folder, "store": root / "store"}


def test_the_hessians_constant_of_logistic_regression_holds() -> None:
    """σ'' is nowhere above its bound and reaches it; Hessians at two points differ by at most ρ times the distance."""
    z = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    chance = torch.sigmoid(z)
    second = chance * (1 - chance) * (1 - 2 * chance)
    assert float(second.abs().max()) == pytest.approx(small_tasks.STEEPEST, rel=1e-6)
    problem = small_tasks.problem("logistic", generator_for(0, "test"))
    assert problem.rho is not None
    (weight,) = (value.detach() for value in problem.params.values())
    for place, task in enumerate(zip(*problem.batches)):
        other = weight + 0.3 * torch.randn(weight.shape, generator=generator_for(place, "move"), dtype=torch.float64)
        loss = lambda w, task=task: problem.loss({"weight": w}, task)
        near, far = (torch.autograd.functional.hessian(loss, point) for point in (weight, other))
        assert torch.linalg.matrix_norm(near - far, 2) <= problem.rho * (weight - other).norm()
        assert torch.linalg.matrix_norm(near - far, 2) > 0


@pytest.mark.parametrize("case", small_tasks.CASES)
def test_remainders_are_those_of_the_definitions(case: str) -> None:
    problem, alpha = small_tasks.problem(case, generator_for(1, "test")), 0.01
    remainder = small_tasks.remainders(problem, [alpha])
    mean = small_tasks.flat(implicit_step(problem.loss, problem.params, problem.batches, 0.0)[0])
    step = small_tasks.flat(implicit_step(problem.loss, problem.params, problem.batches, alpha)[0])
    wanted = small_tasks.flat(explicit_gradient(problem.loss, problem.params, problem.batches, alpha))
    assert remainder["detached"] == pytest.approx([float((step - wanted).norm() / mean.norm())], rel=1e-6)
    assert remainder["regularizer"] == pytest.approx([float((wanted - mean).norm() / mean.norm())], rel=1e-6)
    assert (remainder["bound"][0] is None) == (case != "logistic")
    assert remainder["detached"] != remainder["regularizer"]


def test_learning_finds_the_minimum_over_the_ball() -> None:
    """Against scipy's constrained minimisation, one sample inside the ball and one at its edge."""
    inputs = two_tasks.points(generator_for(0, "test"))
    chance = torch.sigmoid(inputs @ two_tasks.task(0))
    drawn = two_tasks.draw(chance, [15, 2000], 1, generator_for(1, "test"))
    norms = []
    for sample in drawn.values():
        theta = two_tasks.learn(inputs, sample)
        value = lambda point, sample=sample: float(two_tasks.risk(inputs, torch.tensor(point)[None], sample))
        inside = {"type": "ineq", "fun": lambda point: two_tasks.RADIUS**2 - point @ point}
        slow = minimize(value, np.zeros(two_tasks.DIMENSION), constraints=inside, method="SLSQP", tol=1e-12)
        assert value(theta[0].numpy()) == pytest.approx(slow.fun, abs=1e-6)
        norms.append(float(theta.norm()))
    assert norms[0] == pytest.approx(two_tasks.RADIUS)
    assert norms[1] < two_tasks.RADIUS - 0.1
    with pytest.raises(ArithmeticError, match="within 2 iterations"):
        two_tasks.learn(inputs, drawn[15], most=2)


def test_a_task_is_its_own_minimum_and_as_far_as_it_says() -> None:
    inputs = two_tasks.points(generator_for(0, "test"))
    for distance in (0.0, 1.0, 8.0):
        theta = two_tasks.task(distance)
        assert float((theta - two_tasks.task(0)).norm()) == pytest.approx(distance, abs=1e-6)
        assert float(theta.norm()) == pytest.approx(two_tasks.NORM)
        truth = two_tasks.expected(torch.sigmoid(inputs @ theta))
        torch.testing.assert_close(two_tasks.learn(inputs, truth)[0], theta, atol=1e-5, rtol=0)


def test_counts_are_the_images_one_by_one() -> None:
    """Risk and accuracy of counts are means over single images; a larger sample has all of a smaller one."""
    inputs = two_tasks.points(generator_for(0, "test"))
    chance = torch.sigmoid(inputs @ two_tasks.task(0))
    drawn = two_tasks.draw(chance, [5, 40], 3, generator_for(2, "test"))
    assert bool((drawn[40].total >= drawn[5].total).all())
    assert drawn[5].total.sum(1).tolist() == [5, 5, 5]
    theta = two_tasks.task(1.0)
    for row in range(3):
        losses = []
        for point, ones, total in zip(inputs, drawn[40].ones[row].tolist(), drawn[40].total[row].tolist()):
            score = float(point @ theta)
            losses += [math.log1p(math.exp(-score))] * int(ones) + [math.log1p(math.exp(score))] * int(total - ones)
        found = two_tasks.risk(inputs, theta.expand(3, -1), drawn[40])[row]
        assert float(found) == pytest.approx(sum(losses) / 40)
    right = sum(p if x @ theta > 0 else 1 - p for x, p in zip(inputs, chance.tolist())) / len(inputs)
    assert float(two_tasks.accuracy(inputs, theta[None], chance)) == pytest.approx(100 * right)
    far = two_tasks.draw(torch.sigmoid(inputs @ two_tasks.task(8.0)), [40], 3, generator_for(2, "test"))[40]
    torch.testing.assert_close(far.total, drawn[40].total, rtol=0, atol=0)
    assert not torch.equal(far.ones, drawn[40].ones)


def test_assumptions_of_the_bounds_hold() -> None:
    """K and K' at random points of the ball, and ζ for the deviations of many samples; half of each does not hold."""
    inputs = two_tasks.points(generator_for(0, "test"))
    generator = generator_for(3, "test")
    thetas = torch.randn(2000, two_tasks.DIMENSION, dtype=torch.float64, generator=generator)
    thetas = two_tasks.RADIUS * torch.nn.functional.normalize(thetas, dim=1)
    own, other = (torch.sigmoid(inputs @ two_tasks.task(distance)) for distance in (0.0, 0.5))
    gap = two_tasks.risk(inputs, thetas, two_tasks.expected(own)) - two_tasks.risk(
        inputs, thetas, two_tasks.expected(other)
    )
    assert float(gap.abs().max()) <= two_tasks.RADIUS / 4 * 0.5
    assert float(gap.abs().max()) > 0
    sample = two_tasks.draw(own, [50], 1, generator)[50]
    deviation = two_tasks.risk(inputs, thetas, sample) - two_tasks.risk(inputs, thetas, two_tasks.expected(own))
    assert float(deviation.abs().max()) <= two_tasks.variance_term(50, 0.05)
    assert float(deviation.abs().max()) > two_tasks.variance_term(50 * 200, 0.05)


def test_bounds_are_what_the_page_says() -> None:
    zeta = lambda images: 5 * (2 + math.sqrt(math.log(40) / 2)) / math.sqrt(images)
    assert two_tasks.variance_term(100, 0.05) == pytest.approx(zeta(100))
    assert two_tasks.bound_of_sum(50, 150, 2.0, 0.05) == pytest.approx(
        2 * (0.25 * zeta(50) + 0.75 * zeta(150)) + 2 * 0.75 * 0.25 * 2.0
    )
    assert two_tasks.bound_of_basic(50, 150, 2.0, 0.05) == pytest.approx(2 * zeta(200) + 2 * 0.75 * 1.25 * 2.0)
    assert two_tasks.bound_of_basic(50, 0, 7.0, 0.05) == pytest.approx(2 * zeta(50))


def test_the_table_shows_both_theorems(found: dict[str, Any]) -> None:
    tanh, logistic = (lines(found["rows"], "4.1", case) for case in ("tanh", "logistic"))
    for ratio, low, high in tanh["ratio"].values():
        assert low <= ratio <= high
        assert ratio == pytest.approx(4, rel=0.01)
    assert "bound" not in tanh
    for alpha, (mean, _, _) in logistic["detached"].items():
        assert 0 < mean < logistic["bound"][alpha][0]
    assert found["summary"]["power"]["tanh"]["detached"]["mean"] == pytest.approx(2, abs=0.01)
    assert found["summary"]["power"]["tanh"]["attached to α"]["mean"] == pytest.approx(1, abs=0.02)
    near, far = (lines(found["rows"], "3.2", "100 images")["gain"][at][0] for at in (0.0, 6.0))
    assert near > 1
    assert far < -1
    parts = lines(found["rows"], "3.2", "100 images")
    for at in (0.0, 1.0, 6.0):
        total = parts["variance"][at][0] + parts["bias"][at][0]
        assert parts["risk together"][at][0] == pytest.approx(total, abs=1e-5)
    assert parts["bias"][0.0][0] == pytest.approx(0, abs=1e-6)


def test_a_second_call_takes_all_from_the_store(found: dict[str, Any], tmp_path: Path, capsys: Output) -> None:
    built = {path: path.stat().st_mtime_ns for path in found["store"].rglob("made.json")}
    arguments = shlex.split(found["command"])[1:]
    main([*arguments, "--jobs", "1", "--store", str(found["store"]), "--out", str(tmp_path)])
    assert {path: path.stat().st_mtime_ns for path in found["store"].rglob("made.json")} == built
    for name in ("theorems.json", "theorems.csv", "theorems.svg", "theorems-gain.svg", "theorems-risk.svg"):
        again = (tmp_path / "study-theorems" / name).read_bytes()
        assert again == (found["folder"] / name).read_bytes()
    assert capsys.readouterr().out.startswith(found["answer"])


def test_bounds_can_be_broken(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a variance term a thousand times too small, measurements are above their bound, and the answer says so."""
    assert found["summary"]["bound_of_risk"]["above"] == {"alone": 0, "together": 0, "of both": 0}
    assert "no measurement is above its bound" in found["answer"]
    honest = two_tasks.variance_term
    monkeypatch.setattr(two_tasks, "variance_term", lambda images, delta: honest(images, delta) / 1000)
    findings = SMALL.measure(Store(found["store"]))
    above = findings.summary["bound_of_risk"]["above"]
    assert above["alone"] > 0
    assert f"{sum(above.values())} measurements are above their bound" in findings.answer


def test_the_answer_follows_the_numbers(found: dict[str, Any]) -> None:
    summary = json.loads(json.dumps(found["summary"]))
    assert ", as theorem 4.1 says" in answer_of(summary)
    summary["power"]["tanh"]["detached"] = {"mean": 1.0, "low": 0.9, "high": 1.1}
    assert "power 1.00 (0.90 to 1.10) of α where the loss is smooth, not as theorem 4.1 says" in answer_of(summary)
    summary["gain"]["100"] = {"helps_until": None, "hurts_from": None}
    assert "raises accuracy at no distance and it never hurts" in answer_of(summary)


def test_resampling_is_of_whole_problems() -> None:
    """Means lie between the extremes, spread as the standard error says, and keep the columns of a problem together."""
    values = np.random.default_rng(0).normal(size=(50, 1)) * np.array([[1.0, 2.0]])
    means = resampled_means(values, "test")
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0])
    assert float(means[:, 0].std()) == pytest.approx(float(values[:, 0].std() / math.sqrt(50)), rel=0.15)
    assert not np.array_equal(means, resampled_means(values, "other"))


def test_the_committed_page_and_figures_show_the_committed_numbers() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "update_theorems.py"))
    page = (ROOT / "docs" / "theorems.md").read_text()
    assert tool["page"]() == page
    assert "| power, detached |" in page
    for name in runpy.run_path(str(ROOT / "tools" / "update_studies.py"))["figures"]("theorems"):
        assert f"(studies/{name})" in page
