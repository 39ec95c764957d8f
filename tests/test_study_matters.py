"""Whether the parts of TGR matter: the kinds of images, what several seeds say, and a whole study in small."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import studied
import torch
from scipy import stats
from toys import study_recipe

from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec, LabelledImages
from metapool.base.store import Store, generator_for
from metapool.evaluate import Interval, Scores
from metapool.interface.cli import main
from metapool.interface.recipe import open_pool, training_images
from metapool.interface.studies.inputs import KINDS, bank_of, noise, real_images, strokes
from metapool.interface.studies.matters import MattersStudy, verdict
from metapool.interface.studies.trials import gap_over_episodes, gap_over_seeds, in_words, over_seeds
from metapool.pool import ModelPool
from metapool.recover import GeneratorRecovery

GREY = InputSpec(channels=1, height=16, width=20, mean=(0.5,), std=(0.3,))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_recipe(tmp_path_factory.mktemp("study"))


def flags(recipe: Path, root: Path) -> list[str]:
    small = ["--models", "3", "--seeds", "2", "--steps", "2", "--replay-steps", "1", "--strengths", "0.001"]
    places = ["--store", str(root / "store"), "--out", str(root / "runs"), "--jobs", "1"]
    return ["study", "matters", "--recipe", str(recipe), *small, *places]


def test_a_whole_study(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(recipe, tmp_path))
    folder = tmp_path / "runs" / "study-matters"
    first = (folder / "matters.json").read_bytes()
    result = json.loads(first)
    variants = {(row["question"], row["replay"], row["variant"]) for row in result["rows"]}
    assert {name for question, _, name in variants if question == "images"} == set(KINDS)
    assert ("groups", "without replay", "random") in variants
    assert ("regularization", "with replay", "α = 0") in variants
    assert len(result["rows"]) == 2 * len(variants) == 2 * (5 + 6 + 4 + 3)
    own = [row for row in result["rows"] if row["variant"] in {"recovered", "dissimilar", "α = 0.001", "relational"}]
    assert {row["difference"] for row in own} == {0.0}, "the claimed variant is the reference"
    assert any(row["difference"] for row in result["rows"])
    assert result["answer"] in capsys.readouterr().out
    for asked in ("recovery", "grouping", "gradient regularization"):
        assert f"Does {asked} matter?" in result["answer"]
    drawn = ElementTree.parse(folder / "matters.svg").getroot()
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert "drawn strokes" in (folder / "matters.svg").read_text()

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")}
    main(flags(recipe, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("made.json")} == made
    assert (folder / "matters.json").read_bytes() == first
    studied.check_sample(folder / "matters.json", tmp_path / "store")


def test_mistakes_are_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MetapoolError, match="models: the pool has 3, not 12"):
        MattersStudy(recipe=str(recipe)).measure(Store(tmp_path))
    other = tmp_path / "other.yaml"
    other.write_text("method: {name: ensemble}\n")
    with pytest.raises(MetapoolError, match="a recipe of tgr was expected, not of ensemble"):
        MattersStudy(recipe=str(other)).measure(Store(tmp_path))
    with pytest.raises(ValueError, match="every strength once"):
        MattersStudy(strengths=(0.1, 0.1))
    with pytest.raises(SystemExit):
        main([*flags(recipe, tmp_path), "--seeds", "1"])
    assert "seeds" in capsys.readouterr().err


def test_the_answer_follows_the_intervals() -> None:
    up, none, down = Interval(2.0, 1.0, 3.0), Interval(0.5, -1.0, 2.0), Interval(-2.0, -3.0, -1.0)
    assert verdict([up, up]) == "Yes"
    assert verdict([up, none]) == "In part"
    assert verdict([none, none]) == "No difference is seen"
    assert verdict([none, down]) == "No, it is worse"
    assert verdict([up, down]) == "No, it is in part worse"
    assert in_words(none) == "+0.5 (-1.0 to +2.0)"


def test_intervals_are_over_what_they_say() -> None:
    random = np.random.default_rng(0)
    first, second = ([Scores(random.random(40)) for _ in range(4)] for _ in range(2))
    means = np.array([[100 * run.accuracies.mean() for run in runs] for runs in (first, second)])
    by_seed = stats.ttest_rel(*means)
    found, reference = gap_over_seeds(first, second), by_seed.confidence_interval(0.95)
    np.testing.assert_allclose([found.mean, found.low, found.high], [(means[0] - means[1]).mean(), *reference])
    alone = stats.ttest_1samp(means[0], 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([over_seeds(first).low, over_seeds(first).high], [alone.low, alone.high])
    each = [100 * np.mean([run.accuracies for run in runs], axis=0) for runs in (first, second)]
    among, reference = gap_over_episodes(first, second), stats.ttest_rel(*each).confidence_interval(0.95)
    np.testing.assert_allclose([among.low, among.high], [reference.low, reference.high])
    assert abs(among.low - found.low) > 0.1, "episodes are not seeds"


def test_noise_shows_nothing_and_strokes_are_dark_on_light() -> None:
    drawn = strokes(40, GREY, generator_for(0, "a"))
    assert drawn.shape == (40, 1, 16, 20)
    assert drawn.dtype == torch.uint8
    torch.testing.assert_close(drawn, strokes(40, GREY, generator_for(0, "a")))
    assert not torch.equal(drawn, strokes(40, GREY, generator_for(0, "b")))
    assert (drawn > 128).double().mean() > 0.6
    assert bool((drawn.flatten(1).amin(1) < 128).all()), "every drawing shows something"
    colour = GREY.model_copy(update={"channels": 3, "mean": (0.5,) * 3, "std": (0.3,) * 3})
    torch.testing.assert_close(strokes(2, colour, generator_for(0, "a")), drawn[:2].expand(-1, 3, -1, -1).contiguous())

    def alike(images: torch.Tensor) -> float:
        """Correlation of neighbouring pixels."""
        pairs = torch.stack([images[..., :-1].flatten(), images[..., 1:].flatten()]).double()
        return torch.corrcoef(pairs)[0, 1].item()

    assert abs(alike(noise(40, GREY, generator_for(0, "a")))) < 0.05
    assert alike(drawn) > 0.4


def test_banks_of_all_kinds_have_one_shape(tiny_pool: ModelPool, tmp_path: Path) -> None:
    names = sorted({name for entry in tiny_pool.manifest.models for name in entry.classes})
    images = torch.randint(256, (5 * len(names), 1, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    real = LabelledImages(images, torch.arange(len(names)).repeat(5), tuple(names))
    store, recovery = Store(tmp_path / "store"), GeneratorRecovery(per_class=7, steps=1, code=8, width=4)
    banks = {kind: bank_of(kind, tiny_pool, recovery, real, store) for kind in KINDS}
    assert len({bank.digest() for bank in banks.values()}) == len(KINDS)
    for id in tiny_pool.ids:
        model = tiny_pool.get(id)
        for kind, bank in banks.items():
            task = bank[id]
            assert task.images.shape == (7 * len(model.classes), *model.input.shape), kind
            assert torch.bincount(task.labels).tolist() == [7] * len(model.classes)
            with torch.no_grad():
                torch.testing.assert_close(task.logits, model(task.images.float() / 255), rtol=1e-3, atol=1e-3)
    with pytest.raises(MetapoolError, match="the data has no class"):
        bank_of("real images", tiny_pool, recovery, real.select(range(len(names) - 1)), Store(tmp_path / "other"))


def test_real_images_are_of_the_models_own_classes(recipe: Path) -> None:
    model = open_pool(str(recipe.parent / "pool"))[0]
    real = training_images(str(recipe.parent / "images"), 16, 1)
    drawn = real_images(model, real, 15, generator_for(0, "real")).view(len(model.classes), 15, -1)
    for name, own in zip(model.classes, drawn):
        known = real.images[real.labels == real.classes.index(name)].flatten(1)
        found = [bool((known == image).all(1).any()) for image in own]
        assert all(found)
        assert len(own.unique(dim=0)) == len(known) == 12, "all of them, and some of them twice"
    assert not bool((known == drawn[0][0]).all(1).any()), "an image of another class is not found"
