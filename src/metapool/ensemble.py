"""What a practitioner does with a pool today: concatenate the features of all models, nearest centroid.

Chowdhury et al. 2021 ("Few-shot image classification: just use a library of pre-trained feature extractors and a simple
classifier", ICCV, arXiv 2101.00562). Features of every model are divided by their length (after standardising, if asked
to) and concatenated, so that no model outweighs another by its scale or its dimension.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.functional import half_precision, in_chunks
from metapool.base.images import InputSpec
from metapool.learners import centroid_logits
from metapool.pool import ModelPool, PretrainedModel

Moments = tuple[Tensor, Tensor]


class Ensemble:
    """Concatenated features of several models, nearest centroid.

    Args:
        models: the networks, all of which run for every image.
        moments: mean and deviation [D] of every model's features.
        average_over_models: answer with each model alone; logits then are [M, Q, K] (the mean single model).
        projection: float [D₁ + … + D_M, k], a linear map of the concatenated features.
    """

    KIND = "ensemble"

    def __init__(
        self,
        models: Sequence[PretrainedModel],
        moments: Sequence[Moments],
        *,
        average_over_models: bool = False,
        projection: Tensor | None = None,
    ) -> None:
        if average_over_models and projection is not None:
            raise ValueError("a projection mixes the models: none of them could answer alone")
        self.projection = projection
        self.models = list(models)
        self.moments = list(moments)
        self.average_over_models = average_over_models

    def encode(self, images: Tensor) -> Tensor:
        """Standardised, normalised features of all models, side by side, and projected.

        Args:
            images: float [N, C, H, W] in [0, 1].

        Returns:
            float [N, D₁ + … + D_M], or [N, k] with a projection.
        """
        parts = [model_features(m, images, moment) for m, moment in zip(self.models, self.moments)]
        features = torch.cat(parts, 1)
        return features if self.projection is None else features @ self.projection

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Nearest centroid.

        Args:
            support: float [S, D], encoded, or [E, S, D] of E episodes side by side.
            labels: int64 [S] in [0, K).
            query: float [Q, D] or [E, Q, D], encoded.

        Returns:
            float [Q, K] or [E, Q, K], with a first axis M when answering with each model alone.
        """
        if not self.average_over_models:
            return centroid_logits(support, labels, query, normalise=True)
        sizes = [len(mean) for mean, _ in self.moments]
        pairs = zip(support.split(sizes, -1), query.split(sizes, -1))
        return torch.stack([centroid_logits(s, labels, q, normalise=True) for s, q in pairs])

    @property
    def input(self) -> InputSpec:
        """The first model's; every model converts for itself."""
        return self.models[0].input

    @property
    def parameter_count(self) -> int:
        """Parameters of all models and of the projection."""
        total = sum(model.parameter_count for model in self.models)
        total += 0 if self.projection is None else self.projection.numel()
        return total // len(self.models) if self.average_over_models else total

    @property
    def models_at_inference(self) -> int:
        """Networks that run for one image."""
        return 1 if self.average_over_models else len(self.models)

    def save(self, folder: Path) -> None:
        """Writes the models as a pool, their moments, the projection and ``model.json``.

        Args:
            folder: an existing folder.
        """
        pool = ModelPool.create(folder / "pool", "ensemble")
        for model in self.models:
            pool.add(model)
        stored = {f"{k}.{i}": t for i, pair in enumerate(self.moments) for k, t in zip(("mean", "std"), pair)}
        if self.projection is not None:
            stored["projection"] = self.projection.contiguous()
        save_file(stored, folder / "moments.safetensors")
        about = {"kind": self.KIND, "version": 1, "average_over_models": self.average_over_models}
        (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Ensemble":
        """Reads what :meth:`save` wrote.

        Args:
            folder: where.

        Returns:
            The ensemble.

        Raises:
            MetapoolError: when a file is missing or broken.
        """
        try:
            average_over_models = bool(json.loads((folder / "model.json").read_text())["average_over_models"])
            stored = load_file(folder / "moments.safetensors")
            models = list(ModelPool.open(folder / "pool"))
            moments = [(stored[f"mean.{i}"], stored[f"std.{i}"]) for i in range(len(models))]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise MetapoolError(f"{folder} is no saved ensemble: {error}") from error
        return cls(models, moments, average_over_models=average_over_models, projection=stored.get("projection"))


def model_features(model: PretrainedModel, images: Tensor, moments: Moments) -> Tensor:
    """One model's features, standardised and of length 1.

    Args:
        model: the model.
        images: float [N, C, H, W] in [0, 1].
        moments: mean and deviation of its features, [D] each.

    Returns:
        float [N, D].
    """
    mean, std = moments
    return F.normalize((raw_features(model, images) - mean) / std, dim=1)


def raw_features(model: PretrainedModel, images: Tensor) -> Tensor:
    """One model's features as they are.

    Args:
        model: the model.
        images: float [N, C, H, W] in [0, 1].

    Returns:
        float [N, D].
    """

    def look(part: Tensor) -> Tensor:
        with half_precision():
            return model.features(part).float()

    return in_chunks(look, images, 128)
