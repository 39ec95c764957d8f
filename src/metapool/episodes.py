"""Few-shot episodes as indices into labelled images: sampled by seed, stored with a hash."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.images import InputSpec, LabelledImages, digest_of_tensor, to_float
from metapool.base.store import digest_of, seed_for


@dataclass(frozen=True)
class Episodes:
    """E episodes of one way, shot and query number; class-major, so labels need no storing.

    Attributes:
        support: int64 [E, way, shot], indices of images.
        query: int64 [E, way, query], indices of images, none of them in the episode's support.
    """

    support: Tensor
    query: Tensor

    def __len__(self) -> int:
        return len(self.support)

    @property
    def way(self) -> int:
        """Classes of an episode."""
        return self.support.shape[1]

    @property
    def shot(self) -> int:
        """Support images of a class."""
        return self.support.shape[2]

    @property
    def support_labels(self) -> Tensor:
        """int64 [way * shot]."""
        return torch.arange(self.way).repeat_interleave(self.shot)

    @property
    def query_labels(self) -> Tensor:
        """int64 [way * query]."""
        return torch.arange(self.way).repeat_interleave(self.query.shape[2])

    def digest(self) -> str:
        """Hash of all indices.

        Returns:
            16 hexadecimal digits.
        """
        return digest_of([digest_of_tensor(self.support), digest_of_tensor(self.query)])


def sample_episodes(images: LabelledImages, way: int, shot: int, query: int, count: int, seed: int) -> Episodes:
    """Draws episodes: classes uniformly without replacement, then images of each without replacement.

    An episode has classes of one domain. Each domain has the episodes that it would have alone.

    Args:
        images: whose labels are used; classes with fewer than ``shot + query`` images are never drawn.
        way: classes of an episode.
        shot: support images of a class.
        query: query images of a class.
        count: E, of each domain.
        seed: of the draw; the same seed gives the same *queries* for every shot, as long as the same classes have
            enough images.

    Returns:
        The episodes, domain by domain.

    Raises:
        MetapoolError: when fewer than ``way`` classes of a domain have enough images.
    """
    labels = images.labels.numpy()
    members = [np.flatnonzero(labels == label) for label in range(len(images.classes))]
    parts: list[NDArray[np.int64]] = []
    for domain, own in images.by_domain().items():
        usable = [label for label in own if len(members[label]) >= shot + query]
        if len(usable) < way:
            raise MetapoolError(
                f"{domain}{': ' * bool(domain)}{way}-way {shot}-shot episodes with {query} queries need {way} classes "
                f"of {shot + query} images; {len(usable)} of {len(own)} classes have so many (lower way, shot or query)"
            )
        random = np.random.default_rng(seed_for(seed, "episodes"))
        drawn = np.empty((count, way, query + shot), dtype=np.int64)
        for episode in range(count):
            for position, label in enumerate(random.choice(usable, way, replace=False)):
                # A full permutation, cut afterwards, so that the queries do not depend on the number of shots.
                drawn[episode, position] = random.permutation(members[label])[: query + shot]
        parts.append(drawn)
    indices = torch.from_numpy(np.concatenate(parts))
    return Episodes(support=indices[:, :, query:].contiguous(), query=indices[:, :, :query].contiguous())


def draw_classes(
    labels: Tensor, classes: int, way: int, per_class: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One training draw: some classes, and images of each.

    Args:
        labels: int64 [N] in [0, classes).
        classes: number of classes.
        way: classes to draw, all when there are fewer.
        per_class: images of each, without replacement while they last.
        generator: of the draw.

    Returns:
        Indices int64 [way * per_class], class-major, and the drawn classes int64 [way].
    """
    chosen = torch.randperm(classes, generator=generator)[:way]
    rows: list[Tensor] = []
    for label in chosen:
        members = torch.where(labels == label)[0]
        order = torch.randperm(len(members), generator=generator)
        rows.append(members[order.repeat(-(-per_class // len(members)))[:per_class]])
    return torch.cat(rows), chosen


def draw_episodes(
    images: LabelledImages, input: InputSpec, way: int, per_class: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training episodes, classes drawn from all there are.

    Args:
        images: whose classes may come from different models.
        input: of the network that is to see them.
        way: classes of an episode, all when there are fewer.
        per_class: support and query images of a class.
        count: E.
        generator: of the draw.

    Returns:
        Normalised images float [E, way * per_class, C, H, W], class-major, and labels int64 [E, way * per_class].
    """
    way = min(way, len(images.classes))
    labels = torch.arange(way).repeat_interleave(per_class)
    drawn = [draw_classes(images.labels, len(images.classes), way, per_class, generator)[0] for _ in range(count)]
    return torch.stack([input.prepare(to_float(images.images[rows])) for rows in drawn]), labels.expand(count, -1)
