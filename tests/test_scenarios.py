"""Pools of several domains: joined, one input for all, episodes within a domain, and results that show each of them."""

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import check_results
import numpy as np
import pytest
import torch
import toys
from PIL import Image

from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec, LabelledImages
from metapool.base.store import Store
from metapool.episodes import sample_episodes
from metapool.evaluate import Scores, evaluate, few_shot_accuracy, mean_interval, paired_difference
from metapool.interface.cli import main
from metapool.interface.compare import compare, table_of
from metapool.interface.recipe import Evaluation, Recipe, recipe_text, scored_images, validation_images
from metapool.methods import load_model
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.pool.join import join_pools
from metapool.realdata.pretrain import build_pool

ROOT = Path(__file__).parent.parent


def two_domains() -> LabelledImages:
    """Six classes of one domain before four of another, the second's images darker."""
    first, second = (cases.toy_images(classes, 9, (1, 16, 16), seed=classes, first=classes) for classes in (6, 4))
    return LabelledImages(
        torch.cat([first.images, second.images // 2]),
        torch.cat([first.labels, second.labels + 6]),
        tuple(f"a/{name}" for name in first.classes) + tuple(f"b/{name}" for name in second.classes),
        ("a",) * 6 + ("b",) * 4,
    )


# One input for all models ---------------------------------------------------------------------------------------------


def test_the_input_of_a_pool_holds_all_its_models(tiny_pool: ModelPool) -> None:
    inputs = {entry.id: entry.input for entry in tiny_pool.manifest.models}
    assert tiny_pool[:2].input == inputs["a-conv4"], "models of one shape: the first"
    assert tiny_pool.input.shape == (3, 16, 16), "most channels, commonest size"
    assert tiny_pool.input.mean == inputs["c-conv4"].mean, "normalised like the first model of so many channels"
    assert tiny_pool[1:3].input.shape == (3, 16, 16), "of equally common sizes the first"
    assert tiny_pool[2:].input.shape == (3, 32, 32)


# Joined pools ---------------------------------------------------------------------------------------------------------


def test_a_joined_pool_has_all_models_as_they_were(tiny_pool: ModelPool, tmp_path: Path) -> None:
    other = ModelPool.create(tmp_path / "other", "other")
    model = tiny_pool[0]
    model.licence, model.provenance = "CC0-1.0", "by hand"
    other.add(model)
    joined = join_pools([tiny_pool, other], tmp_path / "both")
    assert joined.manifest.name == "both"
    assert joined.ids == ["tiny-a-conv4", "b-resnet10", "c-conv4", "d-conv4", "other-a-conv4"]
    digests = [pool.model_digest(id) for pool in (tiny_pool, other) for id in pool.ids]
    assert [joined.model_digest(id) for id in joined.ids] == digests, "what results depend on has not changed"
    last = joined[-1]
    assert (last.licence, last.provenance) == ("CC0-1.0", "by hand")
    images = cases.smooth_images(2, (1, 16, 16))
    torch.testing.assert_close(last(images), tiny_pool[0](images), rtol=0, atol=0)


def test_a_pool_that_cannot_be_joined_leaves_nothing(tiny_pool: ModelPool, tmp_path: Path) -> None:
    with pytest.raises(MetapoolError, match="'tiny-a-conv4' would stand twice"):
        join_pools([tiny_pool, tiny_pool], tmp_path / "twice")
    shutil.copytree(tiny_pool.path, tmp_path / "broken")
    (tmp_path / "broken" / "c-conv4.safetensors").write_bytes(b"cut")
    with pytest.raises(MetapoolError, match="SHA-256"):
        join_pools([ModelPool.open(tmp_path / "broken")], tmp_path / "joined")
    with pytest.raises(MetapoolError, match="at least one pool"):
        join_pools([], tmp_path / "joined")
    with pytest.raises(MetapoolError, match="already holds a pool"):
        join_pools([tiny_pool], tmp_path / "broken")
    assert not (tmp_path / "twice").exists()
    assert not (tmp_path / "joined").exists()


# Episodes and scores --------------------------------------------------------------------------------------------------


def test_episodes_stay_in_a_domain_and_are_those_it_has_alone() -> None:
    images = two_domains()
    both = sample_episodes(images, 3, 2, 4, 7, seed=5)
    for number, (labels, first) in enumerate(((range(6), 0), (range(6, 10), 54))):
        alone = sample_episodes(replace(images.select(labels), domains=()), 3, 2, 4, 7, seed=5)
        part = slice(7 * number, 7 * number + 7)
        torch.testing.assert_close(both.support[part], alone.support + first)
        torch.testing.assert_close(both.query[part], alone.query + first)
    mixed = sample_episodes(replace(images, domains=()), 3, 2, 4, 7, seed=5)
    assert any(len({int(label) // 6 for label in images.labels[rows].flatten()}) > 1 for rows in mixed.support)
    with pytest.raises(MetapoolError, match=r"^b: 5-way .* 4 of 4 classes"):
        sample_episodes(images, 5, 2, 4, 7, seed=5)
    assert images.fewest_classes == 4


def test_domains_are_part_of_the_images() -> None:
    images = two_domains()
    assert images.by_domain() == {"a": [0, 1, 2, 3, 4, 5], "b": [6, 7, 8, 9]}
    assert images.select([7, 0]).domains == ("b", "a")
    assert images.take(torch.tensor([3])).domains == images.domains
    assert images.digest() != replace(images, domains=()).digest()


def test_the_mean_over_domains_has_the_interval_of_a_stratified_sample() -> None:
    random = np.random.default_rng(0)
    parts = {"easy": random.normal(0.9, 0.02, 400), "hard": random.normal(0.3, 0.04, 400)}
    scores = Scores.of(np.concatenate(list(parts.values())), tuple(parts))
    own = {name: score.interval for name, score in scores.domains.items()}
    assert scores.interval.mean == pytest.approx((own["easy"].mean + own["hard"].mean) / 2)
    # What a stratified mean of two independent halves has: half the root of the squared widths' sum.
    assert scores.interval.ci95 == pytest.approx(np.hypot(own["easy"].ci95, own["hard"].ci95) / 2, rel=0.1)
    assert mean_interval(100 * scores.every).ci95 > 5 * scores.interval.ci95, "one heap of all episodes says less"
    assert Scores.of(parts["easy"], ("easy",)).domains == {}
    better = Scores.of(np.concatenate([parts["easy"], parts["hard"] + 0.2]), tuple(parts))
    assert paired_difference(better, scores).mean == pytest.approx(10)


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``grey`` and ``red``, folders of images, and ``pool`` of models of both, those of the second larger."""
    root = tmp_path_factory.mktemp("world")
    training = toys.TRAINING.model_copy(update={"models": 2, "epochs": 2})
    images = toys.stripes(toys.POOL_KINDS, 12)
    red = replace(images, images=torch.cat([images.images, images.images // 3, images.images // 3], 1))
    red = replace(red, images=red.images.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :24, :24])
    pools = [
        build_pool(part, training, Store(root / "store", threads=1), root / name, name=name, seed=0, licence=name)
        for name, part in (("grey-pool", images), ("red-pool", red))
    ]
    join_pools(pools, root / "pool")
    for split, kinds, count in (("test", toys.NEW_KINDS, 9), ("val", toys.POOL_KINDS[:4], 6)):
        toys.write_images(root / "grey" / split, toys.stripes(kinds, count, seed=7))
        for file in (root / "grey" / split).rglob("*.png"):
            copy = root / "red" / file.relative_to(root / "grey")
            copy.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.open(file)
            Image.merge("RGB", (grey, grey.point(lambda v: v // 3), grey.point(lambda v: v // 3))).save(copy)
    return root


def recipe_of(world: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "both",
        "pool": str(world / "pool"),
        "method": TGR(**{**toys.SMALL_TGR, "recovery": toys.HASTY, "steps": 2, "check_every": 2}),
        "compare": ("untrained", "ensemble"),
        "evaluation": Evaluation(
            data=(str(world / "grey"), str(world / "red")), way=3, shots=(1, 3), query=4, episodes=12
        ),
        "jobs": 1,
        "out": str(world / "runs"),
        "store": str(world / "run-store"),
    }
    return Recipe(**{**fields, **changes})


def test_several_data_sets_stand_side_by_side_as_the_meta_model_sees_them(world: Path) -> None:
    input = InputSpec(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    evaluation = recipe_of(world).evaluation
    names = [str(world / "grey"), str(world / "red")]
    images = scored_images(evaluation, input)
    assert images.images.shape == (72, 3, 16, 16)
    assert list(images.by_domain().items()) == [(names[0], [0, 1, 2, 3]), (names[1], [4, 5, 6, 7])]
    assert images.classes[0].startswith(names[0] + "/")
    checked = validation_images(evaluation, input)
    assert checked is not None
    assert list(checked.by_domain()) == names
    alone = evaluation.model_copy(update={"data": (names[1],)})
    assert scored_images(alone, input).domains == (), "one data set is no matter of domains"
    shutil.copytree(world / "grey" / "test", world / "whole", dirs_exist_ok=True)
    partly = evaluation.model_copy(update={"data": (names[1], str(world / "whole"))})
    only = validation_images(partly, input)
    assert only is not None
    assert set(only.classes) == {path.name for path in (world / "red" / "val").iterdir()}, "what has such classes"


def test_every_data_set_has_its_own_folder() -> None:
    evaluation = Evaluation(data=("icons", "cub", "cifar_fs"), root=("", "birds", "things"))
    assert [evaluation.root_of(name) for name in evaluation.data] == [None, "birds", "things"]
    assert Evaluation(data="cub", root="birds").root_of("cub") == "birds"


@pytest.fixture(scope="module")
def ran(world: Path) -> Path:
    (world / "both.yaml").write_text(recipe_text(recipe_of(world)))
    main(["run", str(world / "both.yaml")])
    return world / "runs" / "both"


def test_a_run_shows_each_domain_and_their_mean(ran: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = json.loads((ran / "scores.json").read_text())
    names = [str(world / "grey"), str(world / "red")]
    assert scores["episodes"]["n"] == 12
    for row in scores["methods"].values():
        assert list(row["domains"]) == names
        for shot in ("1", "3"):
            alone = [row["domains"][name][shot]["mean"] for name in names]
            assert row["shots"][shot]["mean"] == pytest.approx(sum(alone) / 2, abs=2e-3)
    assert any(
        row["domains"][names[0]]["1"]["mean"] != row["domains"][names[1]]["1"]["mean"]
        for row in scores["methods"].values()
    )
    main(["run", str(world / "both.yaml")])
    printed = capsys.readouterr().out
    assert all(f"of {name}:" in printed for name in names)
    page = (ran / "report.html").read_text()
    assert "means over 2 domains" in page
    assert all(f"{name}<br>3-shot" in page for name in names)
    model = load_model(ran / "model")
    assert model.input.shape == (3, 16, 16)
    images = scored_images(recipe_of(world).evaluation, model.input)
    again = evaluate(model, images, sample_episodes(images, 3, 1, 4, 12, 0)).interval.mean
    assert scores["methods"]["tgr"]["shots"]["1"]["mean"] == pytest.approx(again, abs=1e-3)
    assert 0 < few_shot_accuracy(model, images, 0, 3) < 100, "validation draws within domains too"


def test_a_comparison_shows_each_domain_too(ran: Path, world: Path) -> None:
    result = json.loads(compare(recipe_of(world), ["untrained"], 2).read_text())
    for row in result["methods"].values():
        for shot in ("1", "3"):
            alone = [domain[shot] for domain in row["domains"].values()]
            assert row["shots"][shot]["mean"] == pytest.approx(sum(one["mean"] for one in alone) / 2, abs=2e-3)
            assert len(alone[0]["seeds"]) == 2
    table = table_of(result)
    assert "Means over 2 domains" in table
    assert f"| method | {world / 'grey'}, 1-shot |" in table
    single = {name: {k: v for k, v in row.items() if k != "domains"} for name, row in result["methods"].items()}
    assert "domain" not in table_of({**result, "methods": single})


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_of_results_says_what_runs_wrote(ran: Path, tmp_path: Path) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "update_results.py"))
    tool["take"](ran, tmp_path)
    scores = json.loads((ran / "scores.json").read_text())
    page = tool["page"](tmp_path)
    own, *domains = (line for line in page.splitlines() if line.startswith("| **tgr** |"))
    row = scores["methods"]["tgr"]["shots"]["1"]
    assert f"| {row['mean']:.1f} ± {row['ci95']:.1f} |" in own
    assert len(domains) == 1, "a table of its own for domains"
    (rival,) = (line for line in page.splitlines() if line.startswith("| untrained |") and " to " in line)
    (gap,) = (gap for gap in scores["paired"] if {gap["a"], gap["b"]} == {"tgr", "untrained"} and gap["shot"] == 1)
    sign = 1 if gap["a"] == "tgr" else -1
    assert f"| {sign * gap['mean']:+.1f} (" in rival
    turned = json.loads((ran / "scores.json").read_text())
    for one in turned["paired"]:
        one |= {"a": one["b"], "b": one["a"], "mean": -one["mean"], "low": -one["high"], "high": -one["low"]}
    (place,) = (tmp_path / "scenarios").iterdir()
    (place / "scores.json").write_text(json.dumps(turned))
    assert tool["page"](tmp_path) == page, "whichever way round a difference was taken"
    assert "Not run yet: `main`" in page
    with pytest.raises(MetapoolError, match=r"run\.json is missing"):
        tool["take"](tmp_path / "nowhere", tmp_path)


def test_the_committed_page_of_results_is_that_of_the_committed_runs() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "update_results.py"))
    assert tool["page"](ROOT / "benchmarks" / "results") == (ROOT / "docs" / "results.md").read_text()


def test_results_check_computes_equal_rows_once(tiny_pool: ModelPool, world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world).model_dump(mode="json")
    table = {"ensemble": {"shots": {"1": {"mean": 12.5}, "3": {"mean": 12.5}}}}
    first = list(check_results.rows_of_methods("first", recipe, table, tmp_path))
    before = check_results.accuracies.cache_info().misses
    again = list(check_results.rows_of_methods("second", {**recipe, "method": {"name": "tgr"}}, table, tmp_path))
    assert check_results.accuracies.cache_info().misses == before
    assert [what for what, *_ in first] == ["first: ensemble, 1-shot", "first: ensemble, 3-shot"]
    assert [row[1:] for row in first] == [row[1:] for row in again]
    assert all(20 < now < 100 for _, _, now, _ in first)
