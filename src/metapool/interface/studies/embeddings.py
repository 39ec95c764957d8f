"""What task embeddings tell apart: domains, architectures, groups."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from metapool.base.store import Store, generator_for, seed_for
from metapool.embed import TaskEmbeddings, dissimilarity, embed_bank
from metapool.group import group_models
from metapool.interface.figures.pools import coloured_maps
from metapool.interface.studies.pools import PoolsStudy
from metapool.interface.studies.resampling import silhouette_test
from metapool.interface.studies.study import Findings, Row

COLOURINGS = ("domain", "architecture", "group")


class EmbeddingsStudy(PoolsStudy):
    """Task embeddings in the plane, and whether models that share a trait lie together."""

    title: ClassVar[str] = "What do task embeddings tell apart: domains, architectures, groups?"
    source: ClassVar[str] = "TGR, section 4.1"
    named: ClassVar[tuple[str, ...]] = ("model",)

    projection: Literal["pca", "t-sne"] = "pca"
    """How embeddings come into the plane; the silhouettes do not depend on it."""
    seed: int = 0
    """Of groups, t-SNE and the permutations."""

    def measure(self, store: Store) -> Findings:
        """The plane, and the silhouette of every trait on the dissimilarities themselves.

        Args:
            store: finished stages.

        Returns:
            A row for each model.
        """
        method, pools, bank = self.opened(store)
        embeddings = embed_bank(bank, pools.input, method.probe, store)
        distances = dissimilarity(embeddings)
        smallest = min(method.teachers, len(bank))
        groups = group_models(distances, method.grouping, method.groups, smallest, self.seed)
        group_of = {model: f"group {number}" for number, group in enumerate(groups, start=1) for model in group}
        traits = {
            "domain": pools.domains,
            "architecture": pools.architectures,
            "group": [group_of[model] for model in range(len(bank))],
        }
        if self.projection == "pca":
            plane, explained = principal_plane(embeddings)
        else:
            plane, explained = neighbour_plane(distances, seed_for(self.seed, "t-sne")), None
        rows: list[Row] = [
            {
                "model": id,
                **{trait: labels[number] for trait, labels in traits.items()},
                "x": round(float(plane[number, 0]), 5),
                "y": round(float(plane[number, 1]), 5),
            }
            for number, id in enumerate(bank)
        ]
        found = {
            trait: silhouette_test(distances, labels, generator_for(self.seed, "study-embeddings", trait))
            for trait, labels in traits.items()
        }
        summary: dict[str, Any] = {"models": len(bank), "silhouettes": found, "explained_percent": explained}
        return Findings(rows, _answer(found, len(bank)), summary)

    def draw(self, findings: Findings) -> dict[str, str]:
        """The plane once for each trait in which the models differ, coloured by it.

        Args:
            findings: what :meth:`measure` gave.

        Returns:
            One SVG.
        """
        plane = np.array([[float(row["x"] or 0), float(row["y"] or 0)] for row in findings.rows])
        known = {trait: [str(row[trait]) for row in findings.rows] for trait in COLOURINGS}
        labels = {trait: names for trait, names in known.items() if len(set(names)) > 1} or known
        explained = findings.summary["explained_percent"]
        axes = (
            ("t-SNE 1", "t-SNE 2")
            if explained is None
            else tuple(f"component {number} ({share:.0f} %)" for number, share in enumerate(explained, start=1))
        )
        return {"": coloured_maps(plane, labels, (axes[0], axes[1]))}


def principal_plane(embeddings: TaskEmbeddings) -> tuple[NDArray[np.float64], list[float]]:
    """The first two principal components of task embeddings.

    Of every tensor the square root, scaled to length one, is taken: scale then says nothing, as in
    :func:`metapool.embed.dissimilarity`, and squared distances are those of Hellinger.

    Args:
        embeddings: Fisher diagonals by model id, M of them.

    Returns:
        Coordinates [M, 2], and the percent of the variance that each explains.
    """
    vectors = np.stack([_vector(task) for task in embeddings.values()])
    # The whole decomposition: no random numbers, and its signs are fixed by scikit-learn.
    fitted = PCA(2, svd_solver="full")
    plane = fitted.fit_transform(vectors)
    return plane, [round(100 * float(share), 2) for share in fitted.explained_variance_ratio_]


def neighbour_plane(distances: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """T-SNE (van der Maaten and Hinton 2008) of dissimilarities.

    Args:
        distances: [M, M].
        seed: of the start.

    Returns:
        [M, 2].
    """
    perplexity = min(30.0, max(2.0, (len(distances) - 1) / 3))
    fitted = TSNE(2, metric="precomputed", init="random", perplexity=perplexity, random_state=seed % 2**32)
    return np.asarray(fitted.fit_transform(distances), dtype=np.float64)


def _vector(task: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    roots = (value.double().flatten().sqrt() for value in task.values())
    return np.asarray(torch.cat([root / root.norm().clamp(min=1e-300) for root in roots]))


def _answer(found: dict[str, dict[str, float] | None], models: int) -> str:
    parts: list[str] = []
    for trait, result in found.items():
        if result is None:
            continue
        side = "above" if result["silhouette"] > result["chance"] else "below"
        clear = f"{side} chance" if result["p"] < 0.05 else "no different from chance"
        text = f"{trait} {result['silhouette']:.3f} ({clear}: {result['chance']:.3f}, p = {result['p']:.3f})"
        parts.append(text)
    told = [trait for trait in ("domain", "architecture") if (one := found[trait]) and _apart(one)]
    tells = " and ".join(told) if told else "neither domain nor architecture"
    return (
        f"Task embeddings of {models} models tell apart {tells}. Silhouette on dissimilarities: {', '.join(parts)}; "
        "two-sided permutation tests of 999 shuffles. Groups are made of the same dissimilarities, so theirs says what "
        "grouping does."
        if parts
        else f"All {models} models share domain, architecture and group: there is nothing to tell apart."
    )


def _apart(result: dict[str, float]) -> bool:
    return bool(result["p"] < 0.05 and result["silhouette"] > result["chance"])
