"""Accuracies on episodes, intervals, paired differences, cost."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from metapool.base.images import LabelledImages
from metapool.episodes import Episodes, sample_episodes
from metapool.evaluate import Interval, Scores, evaluate, mean_interval, milliseconds_per_image, paired_difference
from metapool.learners import centroid_logits


class ByBrightness:
    """Nearest mean brightness; counts what it is asked."""

    parameter_count = 0
    models_at_inference = 1

    def __init__(self) -> None:
        self.encoded = 0
        self.threads: set[int] = set()

    def encode(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        self.threads.add(torch.get_num_threads())
        assert images.is_floating_point()
        return images.mean((1, 2, 3))

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        means = torch.stack([support[labels == label].mean() for label in range(int(labels.max()) + 1)])
        return -(query[:, None] - means).abs()

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class Voters(ByBrightness):
    """Leading axes: one voter is right, one always says class 0, one is always wrong."""

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        right = super().classify(support, labels, query)
        zero = torch.zeros_like(right)
        zero[:, 0] = 1
        return torch.stack([right, zero, -right])[:, None]


def bright_images(noise: int = 0) -> LabelledImages:
    labels = torch.arange(8).repeat_interleave(10)
    images = (25 * labels.view(-1, 1, 1, 1).expand(-1, 1, 3, 3)).clone()
    images += torch.randint(-noise, noise + 1, (80, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    return LabelledImages(images.clamp(0, 255).to(torch.uint8), labels, tuple("abcdefgh"))


def test_a_perfect_model_has_100_percent_and_each_image_is_encoded_once() -> None:
    images = bright_images()
    model = ByBrightness()
    scores = evaluate(model, images, sample_episodes(images, 5, 1, 5, 30, seed=0))
    assert scores.accuracies.shape == (30,)
    assert scores.interval == Interval(100.0, 100.0, 100.0)
    assert model.encoded == len(images)


def test_accuracy_is_the_share_of_queries_whose_largest_logit_is_right() -> None:
    images = bright_images(noise=30)
    episodes = sample_episodes(images, 5, 1, 5, 20, seed=0)
    model = ByBrightness()
    found = evaluate(model, images, episodes).accuracies
    brightness = (images.images.double() / 255).mean((1, 2, 3)).tolist()
    for index in range(20):
        centres = [brightness[int(row[0])] for row in episodes.support[index]]
        right = [
            min(range(5), key=lambda k: abs(brightness[int(image)] - centres[k])) == label
            for label, row in enumerate(episodes.query[index])
            for image in row
        ]
        assert found[index] == pytest.approx(sum(right) / 25, abs=0.041)  # one tie may fall either way
    assert 0.2 < found.mean() < 1.0


def test_leading_axes_are_averaged_over() -> None:
    images = bright_images()
    episodes = sample_episodes(images, 5, 1, 5, 10, seed=0)
    scores = evaluate(Voters(), images, episodes)
    np.testing.assert_allclose(scores.accuracies, (1 + 1 / 5 + 0) / 3)


def test_progress_every_hundred_episodes() -> None:
    images = bright_images()
    seen: list[tuple[str, int, int]] = []
    evaluate(ByBrightness(), images, sample_episodes(images, 2, 1, 1, 250, 0), lambda *told: seen.append(told))
    assert seen == [("evaluate", 100, 250), ("evaluate", 200, 250)]


def test_interval_is_student_s_t() -> None:
    values = np.random.default_rng(0).normal(60, 10, 12)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.ci95 == pytest.approx((high - low) / 2)
    normal = 1.96 * stats.sem(values)
    assert found.ci95 > 1.05 * normal, "few episodes need a wider interval than the normal one"


def test_one_value_has_no_length_and_equal_values_neither() -> None:
    assert mean_interval(np.array([40.0])) == Interval(40.0, 40.0, 40.0)
    assert mean_interval(np.full(5, 40.0)).ci95 == 0
    assert mean_interval(np.array([39.0, 41.0])).ci95 > 0


def test_scores_are_fractions_and_intervals_percent() -> None:
    assert Scores(np.array([0.5, 0.7])).interval.mean == pytest.approx(60.0)


def test_paired_difference_is_the_interval_of_the_differences() -> None:
    random = np.random.default_rng(0)
    hardness = random.normal(0.6, 0.1, 200)
    first, second = (Scores(hardness + shift + random.normal(0, 0.01, 200)) for shift in (0.01, 0.0))
    found = paired_difference(first, second)
    assert found == mean_interval(100 * (first.accuracies - second.accuracies))
    assert found.low > 0, "a difference of one point shows, since both saw the same episodes"
    assert first.interval.low < second.interval.high, "though the single intervals overlap"
    back = paired_difference(second, first)
    assert (back.mean, back.low, back.high) == (-found.mean, -found.high, -found.low)
    assert paired_difference(first, first) == Interval(0.0, 0.0, 0.0)


def test_paired_difference_needs_the_same_episodes() -> None:
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(Scores(np.zeros(3)), Scores(np.zeros(4)))


def test_time_is_measured_on_one_thread_and_threads_are_restored() -> None:
    torch.set_num_threads(2)
    model = ByBrightness()
    assert 0 < milliseconds_per_image(model, bright_images()) < 1000
    assert model.threads == {1}
    assert torch.get_num_threads() == 2


def test_episodes_may_have_one_query() -> None:
    images = bright_images()
    episodes = Episodes(torch.tensor([[[0], [79]]]), torch.tensor([[[1], [78]]]))
    assert evaluate(ByBrightness(), images, episodes).accuracies.tolist() == [1.0]


@pytest.mark.parametrize("voters", [False, True])
def test_episodes_side_by_side_are_episodes_one_by_one(voters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are compared many episodes at a time: chunks of any size give what each episode alone gives."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(10)
    images = LabelledImages(
        torch.randint(0, 256, (80, 1, 4, 4), generator=generator, dtype=torch.uint8), labels, tuple("abcdefgh")
    )
    episodes = sample_episodes(images, 5, 2, 5, 11, seed=0)

    class Pixels:
        asked: ClassVar[list[int]] = []

        def encode(self, images: Tensor) -> Tensor:
            return images.flatten(1)

        def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
            self.asked.append(support.dim())
            logits = centroid_logits(support, labels, query, normalise=True)
            return torch.stack([logits, -logits]) if voters else logits

    found: list[np.ndarray] = []
    for cached in (1, 35 * 16 * 3, 2**21):
        monkeypatch.setattr("metapool.evaluate._CACHED", cached)
        found.append(evaluate(Pixels(), images, episodes).accuracies)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[1], found[0])
    np.testing.assert_allclose(found[2], found[0])
    encoded = images.images.flatten(1) / 255
    for index in range(len(episodes)):
        support, query = encoded[episodes.support[index].flatten()], encoded[episodes.query[index].flatten()]
        logits = centroid_logits(support, episodes.support_labels, query, normalise=True)
        right = (logits.argmax(1) == episodes.query_labels).double().mean().item()
        wrong = (logits.argmin(1) == episodes.query_labels).double().mean().item()
        assert found[0][index] == pytest.approx((right + wrong) / 2 if voters else right)
    assert len(set(found[0])) > 1
    assert set(Pixels.asked) == {3}
