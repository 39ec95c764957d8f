"""Accuracy on stored episodes with intervals, paired differences, and the cost of an answer."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from metapool.base.images import LabelledImages, to_float
from metapool.base.store import Progress, silent
from metapool.episodes import Episodes, sample_episodes
from metapool.learners import FewShotModel


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, in percent.

    Attributes:
        mean: the mean.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def ci95(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Scores:
    """Accuracy of one model on every episode.

    Attributes:
        accuracies: float64 [E], fractions in [0, 1]; of several domains the mean over them, episode number by episode
            number. As episodes of a number are drawn in each domain for itself, the interval of these means is that of
            a stratified sample: differences between domains do not widen it.
        domains: of every domain alone; empty where there is but one.
    """

    accuracies: NDArray[np.float64]
    domains: Mapping[str, "Scores"] = field(default_factory=dict)

    @classmethod
    def of(cls, accuracies: NDArray[np.float64], domains: Sequence[str]) -> "Scores":
        """From the accuracies on all episodes.

        Args:
            accuracies: float64 [D · E], fractions in [0, 1], domain by domain.
            domains: D names, or none for one domain.

        Returns:
            The scores.
        """
        if len(domains) < 2:
            return cls(accuracies)
        parts = accuracies.reshape(len(domains), -1)
        return cls(parts.mean(0), {name: cls(part) for name, part in zip(domains, parts)})

    @property
    def every(self) -> NDArray[np.float64]:
        """float64 [D · E], what :meth:`of` takes."""
        return np.concatenate([part.accuracies for part in self.domains.values()] or [self.accuracies])

    @property
    def interval(self) -> Interval:
        """Mean accuracy in percent."""
        return mean_interval(100 * self.accuracies)


def mean_interval(values: NDArray[np.float64]) -> Interval:
    """Mean and 95 % interval by Student's t.

    Args:
        values: float64 [E], E ≥ 2 (one value has no interval: its ends are the value).

    Returns:
        The interval.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, mean, mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


@overload
def evaluate(
    model: FewShotModel, images: LabelledImages, episodes: Episodes, progress: Progress = silent
) -> Scores: ...


@overload
def evaluate(
    model: FewShotModel, images: LabelledImages, episodes: Mapping[int, Episodes], progress: Progress = silent
) -> dict[int, Scores]: ...


def evaluate(
    model: FewShotModel,
    images: LabelledImages,
    episodes: Episodes | Mapping[int, Episodes],
    progress: Progress = silent,
) -> Scores | dict[int, Scores]:
    """Accuracy on every episode; every image is encoded once, whatever the number of episodes it stands in.

    Args:
        model: the model. Logits may carry leading axes [V, …]; accuracies are then averaged over them.
        images: what the episodes index.
        episodes: the episodes, or several sets of them by name.
        progress: called now and then.

    Returns:
        The accuracies, by name when the episodes have names.
    """
    encoded, domains = model.encode(to_float(images.images)), tuple(images.by_domain())
    if isinstance(episodes, Episodes):
        return Scores.of(_accuracies(model, encoded, episodes, progress), domains)
    return {name: Scores.of(_accuracies(model, encoded, some, progress), domains) for name, some in episodes.items()}


def _accuracies(model: FewShotModel, encoded: Tensor, episodes: Episodes, progress: Progress) -> NDArray[np.float64]:
    supports, queries = episodes.support.flatten(1), episodes.query.flatten(1)
    # Vectors are compared many episodes at a time, as many as stay in the cache; images have an inner loop each.
    size = (supports.shape[1] + queries.shape[1]) * encoded[0].numel()
    chunk = max(1, _CACHED // size) if encoded.dim() == 2 else 1
    accuracies: list[Tensor] = []
    for start in range(0, len(episodes), chunk):
        support, query = encoded[supports[start : start + chunk]], encoded[queries[start : start + chunk]]
        if encoded.dim() == 2:
            logits = model.classify(support, episodes.support_labels, query)
        else:
            logits = model.classify(support[0], episodes.support_labels, query[0])
        correct = (logits.argmax(-1) == episodes.query_labels).double().mean(-1)
        accuracies.append(correct.view(-1, len(support)).mean(0))
        done = start + len(support)
        if done // 100 > start // 100:
            progress("evaluate", done, len(episodes))
    every: NDArray[np.float64] = torch.cat(accuracies).numpy()
    return every


def few_shot_accuracy(model: FewShotModel, images: LabelledImages, seed: int, episodes: int = 200) -> float:
    """How good a candidate is: 5-way 1-shot, five queries a class, on images that are there to choose by.

    Args:
        model: the candidate.
        images: of validation classes, or recovered ones; never those that results are reported on.
        seed: of the episodes; the same ones for every candidate.
        episodes: number of episodes, of every domain.

    Returns:
        Mean accuracy in percent.
    """
    drawn = sample_episodes(images, min(5, images.fewest_classes), 1, 5, episodes, seed)
    return evaluate(model, images, drawn).interval.mean


_CACHED = 2**21  # numbers


def paired_difference(first: Scores, second: Scores) -> Interval:
    """Mean difference ``first − second`` over the same episodes, in percent points.

    Args:
        first: accuracies of one model.
        second: accuracies of another on the same episodes.

    Returns:
        The interval; above zero means that the first is better.

    Raises:
        ValueError: when the numbers of episodes differ.
    """
    if len(first.accuracies) != len(second.accuracies):
        raise ValueError("paired scores need the same episodes")
    return mean_interval(100 * (first.accuracies - second.accuracies))


def milliseconds_per_image(model: FewShotModel, images: LabelledImages, way: int = 5, repeats: int = 5) -> float:
    """Time to answer one query on one thread: its encoding and its share of classifying, support known.

    Args:
        model: the model.
        images: some images; a few dozen are used.
        way: classes of the made-up episode.
        repeats: the median is taken over so many.

    Returns:
        Milliseconds per query image, in batches of 50; of one answer, where a model gives several.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        picked = to_float(images.images[torch.arange(50 + way) % len(images)])
        support = model.encode(picked[:way])
        times: list[float] = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            logits = model.classify(support, torch.arange(way), model.encode(picked[way:]))
            times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    answers = logits.shape[0] if logits.dim() == 3 else 1
    return 1000 * statistics.median(times[1:]) / len(picked[way:]) / answers
