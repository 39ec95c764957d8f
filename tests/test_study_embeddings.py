"""What task embeddings tell apart: planes and silhouettes of planted embeddings, and a study of seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studied
import torch
from sklearn.metrics import silhouette_score

from metapool.base.store import Store, generator_for
from metapool.interface.studies import embeddings as module
from metapool.interface.studies.embeddings import EmbeddingsStudy, neighbour_plane, principal_plane
from metapool.interface.studies.resampling import silhouette, silhouette_test
from metapool.pool import ModelPool


def planted(seed: int, clusters: int = 2, each: int = 6) -> dict[str, dict[str, torch.Tensor]]:
    """Fisher diagonals of two tensors; models of a cluster agree about which weights matter."""
    generator = torch.Generator().manual_seed(seed)
    patterns = [{name: torch.rand(20, generator=generator) ** 4 for name in ("a", "b")} for _ in range(clusters)]
    return {
        f"model-{number}": {
            name: value * (0.8 + 0.4 * torch.rand(20, generator=generator))
            for name, value in patterns[number % clusters].items()
        }
        for number in range(clusters * each)
    }


def test_the_principal_plane_separates_what_is_apart_at_any_scale() -> None:
    tasks = planted(0)
    plane, explained = principal_plane(tasks)
    assert plane.shape == (12, 2)
    assert (plane[0::2, 0] > 0).all() != (plane[1::2, 0] > 0).all(), "the first component is the clusters"
    assert 50 < explained[0] < 100
    scaled = {
        id: {name: (1 + number) * value for name, value in task.items()}
        for number, (id, task) in enumerate(tasks.items())
    }
    np.testing.assert_allclose(principal_plane(scaled)[0], plane, atol=1e-6)
    assert abs(principal_plane(planted(1))[0] - plane).max() > 0.01


def test_the_principal_plane_is_that_of_the_singular_vectors() -> None:
    tasks = planted(3)
    roots = [torch.cat([v.double().sqrt() / v.double().sum().sqrt() for v in task.values()]) for task in tasks.values()]
    vectors = torch.stack(roots).numpy()
    left, values, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    plane, explained = principal_plane(tasks)
    np.testing.assert_allclose(abs(plane), abs(left[:, :2] * values[:2]), atol=1e-9)
    assert explained[0] == pytest.approx(100 * values[0] ** 2 / (values**2).sum(), abs=0.01)


def test_neighbours_stay_neighbours() -> None:
    labels = np.arange(12) % 2
    distances = np.where(labels[:, None] == labels, 0.1, 0.9) - 0.1 * np.eye(12)
    plane = neighbour_plane(distances, seed=0)
    centres = [plane[labels == label].mean(0) for label in (0, 1)]
    spread = max(np.linalg.norm(plane[labels == label] - centres[label], axis=1).max() for label in (0, 1))
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    np.testing.assert_array_equal(plane, neighbour_plane(distances, seed=0))
    assert abs(plane - neighbour_plane(distances, seed=1)).max() > 0


def test_silhouette_and_its_p() -> None:
    labels = ["a", "b"] * 6
    numbers = np.arange(12) % 2
    rng = np.random.default_rng(0)
    noise = rng.random((12, 12)) * 0.1
    apart = np.where(numbers[:, None] == numbers, 0.1, 0.9) + noise + noise.T
    np.fill_diagonal(apart, 0)
    found = silhouette_test(apart, labels, generator_for(0, "test"))
    assert found is not None
    assert found["silhouette"] > 0.7
    assert found["p"] <= 0.01
    assert found["chance"] < 0.1
    nothing = rng.random((12, 12))
    nothing = (nothing + nothing.T) * (1 - np.eye(12))
    found = silhouette_test(nothing, labels, generator_for(0, "test"))
    assert found is not None
    assert found["p"] > 0.05
    assert silhouette_test(apart, ["a"] * 12, generator_for(0, "test")) is None
    assert silhouette_test(apart, list(map(str, range(12))), generator_for(0, "test")) is None


@pytest.mark.parametrize("labels", ["ababababab", "aabbbccccc", "abbbbbbbbb"])
def test_silhouette_is_that_of_scikit_learn(labels: str) -> None:
    distances = np.random.default_rng(0).random((10, 10))
    distances = (distances + distances.T) * (1 - np.eye(10))
    expected = silhouette_score(distances, np.array(list(labels)), metric="precomputed")
    assert silhouette(distances, list(labels)) == pytest.approx(float(expected), abs=1e-12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def flags(root: Path, tiny_pool: ModelPool) -> list[object]:
    other = studied.renamed(tiny_pool, root / "other", "other")
    return ["--pools", tiny_pool.path, other, "--recipe", studied.recipe(root)]


@pytest.fixture(scope="module")
def result(root: Path, flags: list[object]) -> dict[str, Any]:
    return studied.study(root, "embeddings", *flags)


def test_every_model_has_a_row(result: dict[str, Any], root: Path) -> None:
    assert [row["model"].split("/")[0] for row in result["rows"]] == ["tiny"] * 4 + ["other"] * 4
    assert {row["architecture"] for row in result["rows"]} == {"conv4:8", "conv4:6", "resnet10:8"}
    assert result["summary"]["silhouettes"]["domain"]["p"] > 0.05, "the two domains are the same models"
    assert "tell apart neither" in result["answer"] or "tell apart architecture" in result["answer"]
    svg = studied.figures(root, "embeddings")["embeddings.svg"]
    assert all(text in svg for text in ("by domain", "by architecture", "component 1 ("))
    assert {row["group"] for row in result["rows"]} == {"group 1"}
    assert "by group" not in svg, "a colour that all have says nothing"


def test_the_second_call_makes_nothing_and_t_sne_needs_nothing_new(
    result: dict[str, Any], root: Path, flags: list[object]
) -> None:
    before = studied.made(root)
    assert studied.study(root, "embeddings", *flags) == result
    other = studied.study(root, "embeddings", *flags, "--projection", "t-sne")
    assert other["summary"]["silhouettes"] == result["summary"]["silhouettes"]
    assert other["rows"] != result["rows"]
    assert "t-SNE 1" in studied.figures(root, "embeddings")["embeddings.svg"]
    assert studied.made(root) == before


def test_the_answer_follows_the_numbers(
    result: dict[str, Any], root: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = EmbeddingsStudy(pools=(str(flags[1]), str(flags[2])), recipe=str(root / "tiny.yaml"))
    tasks = planted(0, each=4)
    by_domain = [*list(tasks.values())[0::2], *list(tasks.values())[1::2]]
    answers = []
    for some in (by_domain, list(planted(5, clusters=8, each=1).values())):
        monkeypatch.setattr(module, "embed_bank", lambda *_, some=some: {str(n): task for n, task in enumerate(some)})
        answers.append(study.measure(Store(root / "store")).answer)
    assert "tell apart domain. " in answers[0]
    assert "tell apart neither domain nor architecture" in answers[1]
