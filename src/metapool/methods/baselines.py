"""Honest rivals: what a practitioner would do with the pool without any meta-training.

None is a paper's method, but for the ensemble (metapool/ensemble.py names its paper). Where a baseline has to choose,
it chooses on validation classes when they are given, else on recovered images.

Cost: recovery where features are standardised, whitened or pruned, or batch norm is estimated anew; then a pass of the
models over the images, and some episodes where there is something to choose; no training.
"""

from typing import ClassVar, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.functional import moments, running_statistics, whitening
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import build
from metapool.base.store import Settings, Store, generator_for
from metapool.ensemble import Ensemble, Moments, model_features, raw_features
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate, few_shot_accuracy
from metapool.learners import FewShotModel, ProtoNet, centroid_logits
from metapool.meta_model import MetaModel
from metapool.pool import Access, ModelPool, PretrainedModel
from metapool.recover import AnyRecovery, GeneratorRecovery, recover_pool


class _Baseline(Settings):
    """What all baselines share."""

    paper: ClassVar[str] = "honest baseline"
    needs: ClassVar[Access] = "weights"
    version: ClassVar[int] = 2
    recovery: AnyRecovery = GeneratorRecovery()
    """How the bank is made that statistics are estimated and models chosen on."""
    standardise: bool = False
    """Standardise features by their moments on recovered images before they are divided by their length: a point worse
    on validation classes (docs/lab-notes.md)."""
    bank_images: int = pydantic.Field(default=1000, ge=10)
    """Recovered images that moments and statistics are estimated on."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> TaskBank:
        """Recovers the bank; the seed plays no part."""
        return recover_pool(pool, self.recovery, store)

    def _drawn(self, bank: TaskBank, pool: ModelPool, seed: int) -> Tensor:
        """Recovered images that moments and statistics are estimated on."""
        images = bank.labelled("distinct", pool.input).images
        drawn = torch.randperm(len(images), generator=generator_for(seed, "moments"))[: self.bank_images]
        return to_float(images[drawn])

    def _ensemble(self, pool: ModelPool, store: Store, seed: int) -> Ensemble:
        """All models; only features that are standardised need a bank, and it is a part of their cost."""
        images = torch.zeros(2, *pool.input.shape)
        if self.standardise:
            images = self._drawn(self.prepare(pool, store, seed), pool, seed)
        models = list(pool)
        return Ensemble(models, [self._moments(model, images) for model in models])

    def _moments(self, model: PretrainedModel, images: Tensor) -> Moments:
        mean, std = moments(raw_features(model, images))
        return (mean, std) if self.standardise else (torch.zeros_like(mean), torch.ones_like(std))

    def _recovered(self, pool: ModelPool, store: Store, seed: int) -> LabelledImages:
        """Recovered images whose labels hold across models: classes of one name are one class."""
        return self.prepare(pool, store, seed).labelled("by-name", pool.input)


class Untrained(_Baseline):
    """A network with its initial weights: what the architecture alone gives."""

    needs: ClassVar[Access] = "nothing"
    name: Literal["untrained"] = "untrained"
    """Which method this is."""
    width: int = pydantic.Field(default=64, ge=1, le=512)
    """Of the Conv4."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Initialises, and estimates the batch-norm statistics on the bank.

        Args:
            pool: gives the input size.
            store: for the bank.
            seed: of the weights.
            validation: not used.

        Returns:
            The model.
        """
        images = self._drawn(self.prepare(pool, store, seed), pool, seed)
        input, first = pool.input, pool.manifest.models[0].network
        shape = {"channels": input.channels, "height": input.height, "image_width": input.width}
        spec = first.model_copy(update={"architecture": "conv4", "width": self.width, **shape})
        network = build(spec, generator_for(seed, "untrained"))
        statistics = running_statistics(network, {}, input.prepare(images))
        network.load_state_dict({**network.state_dict(), **statistics})
        return MetaModel(network, spec, ProtoNet(normalise=True), input)


class BestSingle(_Baseline):
    """The one pool model whose features do best on validation episodes (on recovered ones when there are none)."""

    name: Literal["best-single"] = "best-single"
    """Which method this is."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Chooses.

        Args:
            pool: the models.
            store: for the bank.
            seed: of the episodes.
            validation: meta-validation images.

        Returns:
            The chosen model.
        """
        ensemble = self._ensemble(pool, store, seed)
        images = validation or self._recovered(pool, store, seed)
        singles = [Ensemble([m], [moments]) for m, moments in zip(ensemble.models, ensemble.moments)]
        return max(singles, key=lambda single: few_shot_accuracy(single, images, seed))


class MeanSingle(_Baseline):
    """Each pool model alone; accuracies are averaged over the models."""

    name: Literal["mean-single"] = "mean-single"
    """Which method this is."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Standardises features on the bank, when asked to.

        Args:
            pool: the models.
            store: for the bank.
            seed: of the images drawn.
            validation: not used.

        Returns:
            All models, each answering alone.
        """
        ensemble = self._ensemble(pool, store, seed)
        return Ensemble(ensemble.models, ensemble.moments, average_over_models=True)


class EnsembleAll(_Baseline):
    """The concatenated features of all models, or of ``size`` of them chosen on recovered data."""

    name: Literal["ensemble"] = "ensemble"
    """Which method this is."""
    size: int | None = pydantic.Field(default=None, ge=1)
    """Models to keep (greedy forward selection on recovered episodes); all when not given."""
    whiten: float = pydantic.Field(default=0.0, ge=0, le=1)
    """How far the concatenated features are whitened by their second moment on recovered images; 0 leaves it out."""
    dimensions: int = pydantic.Field(default=1024, ge=1)
    """Directions that whitening keeps, the strongest."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Standardises features on the bank, prunes and whitens, each when asked to.

        Args:
            pool: the models.
            store: for the bank.
            seed: of the images and episodes drawn.
            validation: not used: a practitioner who prunes has no data.

        Returns:
            The ensemble.
        """
        ensemble = self._ensemble(pool, store, seed)
        size = min(self.size or len(pool), len(pool))
        if size == len(pool) and not self.whiten:
            return ensemble
        recovered = self._recovered(pool, store, seed)
        if size < len(pool):
            kept = _choose_greedily(ensemble, recovered, size, seed)
            ensemble = Ensemble([ensemble.models[i] for i in kept], [ensemble.moments[i] for i in kept])
        if self.whiten:
            features = ensemble.encode(to_float(recovered.images))
            ensemble.projection = whitening(features, self.whiten, self.dimensions)
        return ensemble


class Average(_Baseline):
    """Mean of the parameters of all models of one architecture; statistics re-estimated on the bank."""

    needs: ClassVar[Access] = "weights of one architecture"
    name: Literal["average"] = "average"
    """Which method this is."""

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> FewShotModel:
        """Averages each architecture's models and keeps the best average.

        Args:
            pool: the models.
            store: for the bank.
            seed: of the images and episodes drawn.
            validation: meta-validation images, to choose the architecture; recovered ones when absent.

        Returns:
            The averaged network.
        """
        images = self._drawn(self.prepare(pool, store, seed), pool, seed)
        groups: dict[str, list[str]] = {}
        for entry in pool.manifest.models:
            encoder = entry.network.model_copy(update={"classes": 1})
            groups.setdefault(encoder.digest(), []).append(entry.id)
        averages: list[Ensemble] = []
        for ids in groups.values():
            merged = pool.get(ids[0])
            states = [pool.get(id).network.state_dict() for id in ids]
            alike = [name for name in states[0] if not name.startswith("head.") and states[0][name].is_floating_point()]
            mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in alike}
            statistics = running_statistics(merged.network, mean, merged.input.prepare(images))
            merged.network.load_state_dict({**states[0], **mean, **statistics})
            averages.append(Ensemble([merged], [self._moments(merged, images)]))
        chosen_on = validation or self._recovered(pool, store, seed)
        return max(averages, key=lambda average: few_shot_accuracy(average, chosen_on, seed))


class _Encoded:
    """Features computed before, as a model: lets a selection try many subsets without running a network."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def encode(self, images: Tensor) -> Tensor:
        return self.features

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        return centroid_logits(support, labels, query, normalise=True)


def _choose_greedily(ensemble: Ensemble, images: LabelledImages, size: int, seed: int) -> list[int]:
    """Adds, one at a time, the model that raises accuracy on recovered episodes most."""
    floats = to_float(images.images)
    parts = [model_features(m, floats, moments) for m, moments in zip(ensemble.models, ensemble.moments)]
    episodes = sample_episodes(images, min(5, len(images.classes)), 1, 5, 100, seed)
    kept: list[int] = []
    while len(kept) < size:
        rest = [index for index in range(len(parts)) if index not in kept]
        accuracy = [
            evaluate(_Encoded(torch.cat([parts[i] for i in [*kept, new]], 1)), images, episodes).interval.mean  # type: ignore[call-overload]
            for new in rest
        ]
        kept.append(rest[int(np.argmax(accuracy))])
    return sorted(kept)
