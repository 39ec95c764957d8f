"""A whole method: the concatenated features of the models that ``pool.json`` says are most accurate.

    python examples/add_a_method.py

It keeps all promises that ``check_method`` asks of a method, then fits on the first three models of the shipped pool
and prints its accuracy on twenty episodes, too few to mean anything; a minute at most. CONTRIBUTING.md says how such a
class becomes a method that recipes can name.

Cost: one pass of the kept models over some recovered images; no training.
"""

import tempfile
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
import torch

from metapool.bank import TaskBank
from metapool.base.functional import moments
from metapool.base.images import LabelledImages, to_float
from metapool.base.store import Settings, Store, generator_for
from metapool.check import check_method
from metapool.ensemble import Ensemble, raw_features
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.interface.recipe import evaluation_images, open_pool
from metapool.methods import load_model
from metapool.pool import Access, ModelPool
from metapool.recover import AnyRecovery, GeneratorRecovery, recover_pool


class MostAccurate(Settings):
    """The ``size`` most accurate models by their makers' word, features side by side, nearest centroid."""

    paper: ClassVar[str] = "honest baseline"
    needs: ClassVar[Access] = "weights"
    version: ClassVar[int] = 1
    name: Literal["most-accurate"] = "most-accurate"
    """Which method this is."""
    recovery: AnyRecovery = GeneratorRecovery()
    """How the bank is made on which features are standardised."""
    size: int = pydantic.Field(default=5, ge=1)
    """Models to keep."""
    bank_images: int = pydantic.Field(default=1000, ge=10)
    """Recovered images that the moments are estimated on."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> TaskBank:
        """Recovers the bank: the whole pool's, so that all methods share it."""
        return recover_pool(pool, self.recovery, store)

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> Ensemble:
        """Chooses by ``pool.json``; a model of unknown accuracy comes last.

        Args:
            pool: the models.
            store: keeps the bank.
            seed: of the images drawn.
            validation: not used.

        Returns:
            The chosen models as one few-shot learner.
        """
        ranked = sorted(pool.manifest.models, key=lambda entry: -(entry.accuracy or 0.0))
        models = [pool.get(entry.id) for entry in ranked[: self.size]]
        bank = self.prepare(pool, store, seed)
        images = bank.labelled("distinct", models[0].input).images
        drawn = torch.randperm(len(images), generator=generator_for(seed, "most-accurate"))[: self.bank_images]
        return Ensemble(models, [moments(raw_features(model, to_float(images[drawn]))) for model in models])


def main() -> None:
    """Checks, fits, saves, loads, scores."""
    check_method(MostAccurate(recovery=GeneratorRecovery(per_class=6, steps=5, width=8, shift=1), size=2))
    print("it keeps every promise of a method")
    pool = open_pool("icons-30")[:3]
    quick = GeneratorRecovery(per_class=6, steps=20, width=8)
    with tempfile.TemporaryDirectory() as folder:
        model = MostAccurate(recovery=quick, size=2).fit(pool, Store(Path(folder) / "store"), seed=0)
        saved = Path(folder) / "model"
        saved.mkdir()
        model.save(saved)
        loaded = load_model(saved)
        images = evaluation_images("icons", "test", loaded.input)
        episodes = sample_episodes(images, way=5, shot=1, query=15, count=20, seed=0)
        interval = evaluate(loaded, images, episodes).interval
    print(f"kept {', '.join(kept.id for kept in model.models)}")
    print(f"{len(episodes)} episodes, 5-way 1-shot: {interval.mean:.1f} ± {interval.ci95:.1f} %")


if __name__ == "__main__":
    main()
