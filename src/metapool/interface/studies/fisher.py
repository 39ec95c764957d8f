"""Whether the dissimilarity of task embeddings tells how many classes two models share (figure 4 of TGR)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray

from metapool.base.errors import MetapoolError
from metapool.base.store import Store, generator_for
from metapool.embed import dissimilarity, embed_bank
from metapool.interface.figures.pools import OverlapPanel, by_architecture, by_overlap
from metapool.interface.recipe import training_images
from metapool.interface.studies.pools import Pools, open_pools, pool_cka
from metapool.interface.studies.resampling import (
    Estimate,
    alike,
    block_means,
    contrast,
    mean_of_pairs,
    rank_correlation,
)
from metapool.interface.studies.study import Findings, Row, Study, tgr_recipe
from metapool.interface.studies.training import trained_pool
from metapool.methods.tgr import TGR
from metapool.pool import ModelPool
from metapool.realdata.pretrain import PoolSettings

PLANTED = "planted"
MEASURES = {
    "dissimilarity": "dissimilarity of task embeddings",
    "cka_distance": "1 − CKA of features",
    "weight_distance": "distance of weights",
}
"""The paper's measure and its rivals: column and name."""


class FisherStudy(Study):
    """Dissimilarity, and two rivals, of all pairs of a pool; and of a pool whose classes overlap by plan."""

    title: ClassVar[str] = "Does the dissimilarity of task embeddings fall with shared classes?"
    source: ClassVar[str] = "TGR, figure 4"
    named: ClassVar[tuple[str, ...]] = ("pool", "first", "second")

    pools: tuple[str, ...] = ("icons-30",)
    """Shipped pools' names or folders, each measured by itself; none: the planted pool alone."""
    recipe: str = "main"
    """Recipe whose recovery and probe make the embeddings."""
    overlaps: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = (0, 1, 2, 3, 4, 5)
    """Classes that models of the planted pool share with its base models; none: no such pool is trained."""
    sets: int = pydantic.Field(default=5, ge=1)
    """Models of the planted pool for each overlap; the released study has 10."""
    way: int = pydantic.Field(default=5, ge=2)
    """Classes of a planted model, of the first twice as many of the data; the base models have the first ``way``."""
    architectures: tuple[str, ...] = pydantic.Field(default=("conv4:32", "resnet10:12"), min_length=1)
    """``name:width`` of planted models, taken in turn; there is a base model of each."""
    epochs: int = pydantic.Field(default=30, ge=1)
    """Passes over the training images of a planted model."""
    data: str = "icons"
    """What planted models learn from: a shipped domain (meta-train classes), or a folder or CSV file of images."""
    images: int = pydantic.Field(default=600, ge=4)
    """Recovered images that all models look at for CKA, about."""
    seed: int = 0
    """Of the planted pool, the order of images and the bootstrap."""

    @pydantic.model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if not self.pools and not self.overlaps:
            raise ValueError("name pools or overlaps: without both there is nothing to measure")
        if self.overlaps and max(self.overlaps) > self.way:
            raise ValueError(f"overlaps: models of {self.way} classes share {self.way} at most, not {self.overlaps}")
        return self

    def sample(self) -> Self:
        """The pools alone: no planted one has to be trained.

        Returns:
            The study, cut down.
        """
        return self.model_copy(update={"overlaps": ()}) if self.pools else self

    def measure(self, store: Store) -> Findings:
        """All measures of all pairs, and their rank correlations with the number of shared classes.

        Args:
            store: finished stages.

        Returns:
            A row for each pair of a pool.
        """
        _, method = tgr_recipe(self.recipe)
        opened = {pools.domains[0]: pools for pools in (open_pools([name]) for name in self.pools)}
        if self.overlaps:
            opened[PLANTED] = Pools({PLANTED: self._planted(store)})
        rows: list[Row] = []
        summary: dict[str, Any] = {}
        sentences: list[str] = []
        for name, pools in opened.items():
            measures = self._measures(pools, method, store)
            rows += _rows(name, pools, measures)
            found = self._found(name, pools, measures)
            summary[name] = {
                "models": len(pools.entries),
                "pairs": len(pools.entries) * (len(pools.entries) - 1) // 2,
                **{key: {part: one.rounded() for part, one in parts.items()} for key, parts in found.items()},
            }
            sentences.append(_answer(name, len(pools.entries), found))
        return Findings(rows, f"{' '.join(sentences)} 95 % intervals by resampling models.", summary)

    def draw(self, findings: Findings) -> dict[str, str]:
        """For each pool the measures by overlap, and the dissimilarity by the architectures of a pair.

        Args:
            findings: what :meth:`measure` gave.

        Returns:
            Two SVGs for each pool.
        """
        figures: dict[str, str] = {}
        for pool in findings.summary:
            about = findings.summary[pool]
            pairs = [row for row in findings.rows if row["pool"] == pool]
            panels = [
                OverlapPanel(
                    name,
                    np.array([int(row["overlap"] or 0) for row in pairs]),
                    np.array([np.nan if row[column] is None else float(row[column] or 0) for row in pairs]),
                    np.array([bool(row["same_architecture"]) for row in pairs]),
                    about[f"{column}_by_overlap_same"],
                    about[f"{column}_by_overlap_different"],
                )
                for column, name in MEASURES.items()
            ]
            figures[f"{pool}-overlap"] = by_overlap(f"Pairs of {pool} by shared classes", panels)
            figures[f"{pool}-architectures"] = by_architecture(
                f"Dissimilarity in {pool} by architectures",
                about["dissimilarity_by_architectures"],
            )
        return figures

    def _measures(self, pools: Pools, method: TGR, store: Store) -> dict[str, NDArray[np.float64]]:
        bank = pools.recover(method, store)
        return {
            "dissimilarity": dissimilarity(embed_bank(bank, pools.input, method.probe, store)),
            "cka_distance": 1 - pool_cka(pools, bank, self.images, 100, self.seed, store),
            "weight_distance": weight_distances(pools),
        }

    def _found(
        self, name: str, pools: Pools, measures: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, dict[str, Estimate]]:
        """Rank correlations with overlap, the effect of architecture, and means by both."""
        same, known = alike(pools.architectures), [set(entry.classes) for entry in pools.entries.values()]
        everything, overlap = np.ones_like(same), pools.overlaps.astype(np.float64)
        jaccard = np.array([[len(one & other) / len(one | other) for other in known] for one in known])
        defined = {column: np.isfinite(measure) for column, measure in measures.items()}

        def resamples() -> torch.Generator:  # the same for all, so that measures are compared on equal terms
            return generator_for(self.seed, "study-fisher", name)

        def correlations(other: NDArray[np.float64], among: NDArray[np.bool_]) -> dict[str, Estimate]:
            return {
                column: rank_correlation(measure, other, among & defined[column], resamples())
                for column, measure in measures.items()
            }

        return {
            "spearman_overlap": correlations(overlap, everything),
            "spearman_jaccard": correlations(jaccard, everything),
            "spearman_overlap_one_architecture": correlations(overlap, same),
            "different_less_same_architecture": {
                column: contrast(measure, ~same & defined[column], same, resamples())
                for column, measure in measures.items()
            },
            "dissimilarity_by_architectures": block_means(
                measures["dissimilarity"], pools.architectures, everything, resamples()
            ),
            **{
                f"{column}_by_overlap_{kind}": {
                    str(shared): mean
                    for shared in range(int(overlap.max()) + 1)
                    if (mean := mean_of_pairs(measures[column], among & (overlap == shared), resamples())).measured
                }
                for column in measures
                for kind, among in (("same", same & defined[column]), ("different", ~same & defined[column]))
            },
        }

    def _planted(self, store: Store) -> ModelPool:
        """A pool of models whose classes overlap with those of the base models as planned."""
        images = training_images(self.data, 32, 3)
        if len(images.classes) < 2 * self.way:
            raise MetapoolError(
                f"data: planted sets of {self.way} classes need {2 * self.way} classes; {self.data} has "
                f"{len(images.classes)}"
            )
        plan = planted_sets(self.way, self.overlaps, self.sets, self.seed)
        wanted = {
            f"base-{number}": (name, tuple(range(self.way))) for number, name in enumerate(self.architectures)
        } | {
            id: (self.architectures[turn % len(self.architectures)], tuple(classes))
            for turn, (id, classes) in enumerate(plan.items())
        }
        return trained_pool(images, wanted, PoolSettings(epochs=self.epochs), store, self.seed)


def planted_sets(way: int, overlaps: tuple[int, ...], sets: int, seed: int) -> dict[str, list[int]]:
    """Class sets that share a given number of classes with the first ``way``; the others come from the next ``way``.

    Args:
        way: classes of a set.
        overlaps: numbers of shared classes, each at most ``way``.
        sets: for each overlap.
        seed: of the draw.

    Returns:
        Labels in ascending order, by the model's id.
    """
    found: dict[str, list[int]] = {}
    for overlap in overlaps:
        for number in range(sets):
            id = f"overlap-{overlap}-{number}"
            generator = generator_for(seed, "planted", id)
            shared = torch.randperm(way, generator=generator)[:overlap]
            others = way + torch.randperm(way, generator=generator)[: way - overlap]
            found[id] = sorted(torch.cat([shared, others]).tolist())
    return found


def weight_distances(pools: Pools) -> NDArray[np.float64]:
    r"""How far apart the weights of two models of one architecture are, whatever their scale.

    :math:`\| w_i / \|w_i\| - w_j / \|w_j\| \| / \sqrt 2` over all parameters of the encoder: 0 for equal directions, 1
    for orthogonal ones.

    Args:
        pools: the models.

    Returns:
        float64 [M, M]; NaN for pairs of different architectures.
    """
    kinds = alike(pools.architectures)
    distances = np.full(kinds.shape, np.nan)
    weights = [_direction(pools, id) for id in pools.entries]
    for i, j in np.argwhere(kinds):
        if weights[i].shape == weights[j].shape:
            distances[i, j] = float((weights[i] - weights[j]).norm()) / 2**0.5
    return distances


def _direction(pools: Pools, id: str) -> torch.Tensor:
    parameters = [value for name, value in pools.get(id).network.named_parameters() if not name.startswith("head.")]
    flat = torch.cat([value.detach().flatten() for value in parameters]).double()
    direction: torch.Tensor = flat / flat.norm()
    return direction


def _rows(pool: str, pools: Pools, measures: Mapping[str, NDArray[np.float64]]) -> list[Row]:
    ids, architectures = list(pools.entries), pools.architectures
    known = [set(entry.classes) for entry in pools.entries.values()]
    rows: list[Row] = []
    for i, j in zip(*np.triu_indices(len(ids), 1)):
        shared = len(known[i] & known[j])
        row: dict[str, Any] = {
            "pool": pool,
            "first": ids[i],
            "second": ids[j],
            "architecture_first": architectures[i],
            "architecture_second": architectures[j],
            "same_architecture": architectures[i] == architectures[j],
            "overlap": shared,
            "jaccard": round(shared / len(known[i] | known[j]), 4),
        }
        for column, measure in measures.items():
            value = float(measure[i, j])
            row[column] = round(value, 5) if np.isfinite(value) else None
        rows.append(row)
    return rows


def _answer(name: str, models: int, found: Mapping[str, Mapping[str, Estimate]]) -> str:
    every, same = found["spearman_overlap"], found["spearman_overlap_one_architecture"]
    main = every["dissimilarity"]
    if not main.measured:
        return f"{name} ({models} models): class overlap does not vary enough to say anything."
    verdict = {-1: "falls with shared classes", 1: "rises with shared classes", 0: "does not clearly follow overlap"}
    text = f"{name} ({models} models): dissimilarity {verdict[main.sign]}, rank correlation {main}"
    if (rival := every["cka_distance"]).measured:
        text += f"; of 1 − CKA {rival}"
    if (weights := same["weight_distance"]).measured:
        text += f"; within one architecture {same['dissimilarity']}, of weights {weights}"
    effect = found["different_less_same_architecture"]["dissimilarity"]
    if effect.measured:
        how = {1: "less alike", -1: "more alike", 0: "not clearly less alike"}[effect.sign]
        text += (
            f". Pairs of different architectures are {how}: by {effect.value:.3f} [{effect.low:.3f}, {effect.high:.3f}]"
        )
    return f"{text}."
