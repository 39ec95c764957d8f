"""A saved model in use: scores on new classes, labels by a few examples."""

from pathlib import Path

import pytest
import torch
import toys
from PIL import Image
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.functional import moments
from metapool.base.images import to_float
from metapool.ensemble import Ensemble, raw_features
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.interface.recipe import evaluation_images
from metapool.interface.use import class_probabilities, evaluate_saved, predict
from metapool.learners import ANIL, MAML, ProtoNet
from metapool.methods import load_model
from metapool.pool import ModelPool

LEARNERS = {
    "protonet": ProtoNet(normalise=True),
    "maml": MAML(test_steps=5, inner_rate=0.1),
    "anil": ANIL(test_steps=20, inner_rate=0.5),
}


def picture(path: Path, drawn: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    """Half dark, half bright: ``left``, ``right``, ``top`` or ``bottom`` is bright."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    box = {
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width, height),
        "top": (0, 0, width, height // 2),
        "bottom": (0, height // 2, width, height),
    }[drawn]
    image = Image.new("RGB", size, (20, 10, 30))
    image.paste((240, 250, 230), box)
    image.convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def support(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes with 3, 1, 2 and 1 examples, of many sizes, modes and formats."""
    root = tmp_path_factory.mktemp("support")
    for number, (size, mode) in enumerate([((16, 16), "L"), ((40, 30), "RGB"), ((90, 70), "P")]):
        picture(root / "left" / f"{number}.png", "left", size, mode)
    picture(root / "right" / "one.jpg", "right", (64, 64))
    picture(root / "top" / "a.webp", "top")
    picture(root / "top" / "b.bmp", "top", (20, 60))
    picture(root / "ünten ☂" / "only one.GIF", "bottom", mode="P")
    return root


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("queries")
    for drawn in ("top", "left", "bottom", "right"):
        picture(root / f"{drawn}.png", drawn, (50, 44))
    picture(root / "deeper" / "left.jpeg", "left")
    (root / "notes.txt").write_text("no image")
    return root


# Prediction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
def test_labels_of_images_of_any_size_colour_and_format(
    learner: str, support: Path, queries: Path, tmp_path: Path
) -> None:
    found = predict(toys.saved_model(tmp_path / "model", LEARNERS[learner]), support, [queries])
    files = [Path(answer["file"]) for answer in found]
    assert files == sorted(file for file in queries.rglob("*") if file.suffix in {".png", ".jpeg"})
    for answer in found:
        assert set(answer) == {"file", "class", "probability", "all"}
        assert list(answer["all"]) == ["left", "right", "top", "ünten ☂"]
        assert sum(answer["all"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["probability"] == max(answer["all"].values()) == answer["all"][answer["class"]]
    if learner == "protonet":
        named = {"bottom": "ünten ☂"}
        assert [answer["class"] for answer in found] == [named.get(file.stem, file.stem) for file in files]


def test_files_and_folders_in_the_order_given(support: Path, queries: Path, tmp_path: Path) -> None:
    model = toys.saved_model(tmp_path / "model")
    given = [queries / "top.png", queries / "deeper", queries / "left.png"]
    found = predict(model, support, given)
    assert [answer["file"] for answer in found] == [
        str(queries / "top.png"),
        str(queries / "deeper" / "left.jpeg"),
        str(queries / "left.png"),
    ]
    alone = predict(model, support, [queries / "top.png"])
    assert alone[0]["class"] == found[0]["class"]
    assert alone[0]["all"] == pytest.approx(found[0]["all"], abs=1e-4), "an answer does not depend on other queries"


def test_two_classes_are_enough_and_more_change_the_answer(support: Path, queries: Path, tmp_path: Path) -> None:
    model = toys.saved_model(tmp_path / "model")
    for name in ("left", "right"):
        picture(tmp_path / "two" / name / "1.png", name)
    few = predict(model, tmp_path / "two", [queries / "left.png"])[0]
    many = predict(model, support, [queries / "left.png"])[0]
    assert few["class"] == many["class"] == "left"
    assert list(few["all"]) == ["left", "right"]
    assert few["probability"] > many["probability"]


def test_what_cannot_be_predicted(support: Path, queries: Path, tmp_path: Path) -> None:
    model = toys.saved_model(tmp_path / "model")
    picture(tmp_path / "one" / "only" / "1.png", "left")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    for message, given in {
        "holds one class, 'only'": (model, tmp_path / "one", [queries]),
        "none: expected a sub-folder of images": (model, tmp_path / "none", [queries]),
        "nowhere: expected a folder": (model, tmp_path / "nowhere", [queries]),
        "nowhere.png: no such image or folder": (model, support, [queries / "nowhere.png"]),
        "none holds no images": (model, support, [queries, tmp_path / "none"]),
        "broken.png: not a readable image": (model, support, [tmp_path / "broken.png"]),
        "--query: at least one": (model, support, []),
        "nothing holds no saved model": (tmp_path / "nothing", support, [queries]),
    }.items():
        with pytest.raises(MetapoolError, match=message):
            predict(*given)


class Fixed:
    """Answers with the logits it was given."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def encode(self, images: Tensor) -> Tensor:
        assert images.is_floating_point()
        assert images.max() <= 1
        return images

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        return self.logits


def test_probabilities_are_the_softmax_and_their_mean_over_models() -> None:
    images = torch.full((3, 1, 4, 4), 255, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2])
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    one = class_probabilities(Fixed(logits[0]), images, labels, images)  # type: ignore[arg-type]
    torch.testing.assert_close(one, logits[0].exp() / logits[0].exp().sum(1, keepdim=True))
    both = class_probabilities(Fixed(logits), images, labels, images)  # type: ignore[arg-type]
    torch.testing.assert_close(both, (logits.exp() / logits.exp().sum(2, keepdim=True)).mean(0))
    torch.testing.assert_close(both.sum(1), torch.ones(3))
    assert not torch.allclose(both, logits.mean(0).softmax(1))


@pytest.mark.parametrize("average", [False, True])
def test_an_ensemble_predicts_too(
    average: bool, tiny_pool: ModelPool, support: Path, queries: Path, tmp_path: Path
) -> None:
    models = list(tiny_pool)
    images = to_float(toys.stripes(range(4), 5).images)
    ensemble = Ensemble(models, [moments(raw_features(m, images)) for m in models], average_over_models=average)
    ensemble.save(tmp_path)
    found = predict(tmp_path, support, [queries])
    assert [Path(answer["file"]).stem == answer["class"] for answer in found].count(True) >= 3
    assert all(sum(answer["all"].values()) == pytest.approx(1, abs=1e-5) for answer in found)


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_a_score_is_that_of_the_same_episodes(tmp_path: Path) -> None:
    data = str(toys.write_images(tmp_path / "data", toys.stripes(toys.NEW_KINDS, 12)))
    folder = toys.saved_model(tmp_path / "model")
    found = evaluate_saved(folder, data, way=3, shot=2, query=4, episodes=25, seed=6)
    model = load_model(folder)
    images = evaluation_images(data, "test", model.input)
    drawn = sample_episodes(images, 3, 2, 4, 25, 6)
    interval = evaluate(model, images, drawn).interval
    assert found == {
        "model": str(folder),
        "data": data,
        "way": 3,
        "shot": 2,
        "query": 4,
        "episodes": 25,
        "seed": 6,
        "hash": drawn.digest(),
        "mean": round(interval.mean, 3),
        "ci95": round(interval.ci95, 3),
    }
    assert found["mean"] > 100 / 3
    other = evaluate_saved(folder, data, way=3, shot=2, query=4, episodes=25, seed=7)
    assert other["hash"] != found["hash"]
    assert evaluate_saved(folder, data, way=3, shot=2, query=4, episodes=1, seed=6)["ci95"] == 0


def test_a_folder_with_splits_is_scored_on_its_test_classes(tmp_path: Path) -> None:
    toys.write_images(tmp_path / "data" / "test", toys.stripes((0, 1), 3))
    toys.write_images(tmp_path / "data" / "train", toys.stripes((2, 3, 4), 3))
    model = toys.saved_model(tmp_path / "model")
    evaluate_saved(model, str(tmp_path / "data"), way=2, shot=1, query=2, episodes=2, seed=0)
    with pytest.raises(MetapoolError, match="need 3 classes of 3 images; 2 of 2 classes"):
        evaluate_saved(model, str(tmp_path / "data"), way=3, shot=1, query=2, episodes=2, seed=0)


def test_a_benchmark_is_scored_from_its_root(tmp_path: Path) -> None:
    toys.write_images(tmp_path / "mini" / "test", toys.stripes((0, 1, 2), 3))
    model = toys.saved_model(tmp_path / "model")
    asked = {"way": 3, "shot": 1, "query": 2, "episodes": 3, "seed": 0}
    found = evaluate_saved(model, "mini_imagenet", **asked, root=str(tmp_path / "mini"))
    assert found["data"] == "mini_imagenet"
    with pytest.raises(MetapoolError, match="mini_imagenet is not shipped: give the folder"):
        evaluate_saved(model, "mini_imagenet", **asked)


@pytest.mark.parametrize("field", ["way", "shot", "query", "episodes"])
def test_numbers_too_small_are_named(field: str, tmp_path: Path) -> None:
    asked = {"way": 2, "shot": 1, "query": 1, "episodes": 1, "seed": 0, field: -1}
    with pytest.raises(MetapoolError, match=f"--{field} -1: at least"):
        evaluate_saved(tmp_path, "icons", **asked)
