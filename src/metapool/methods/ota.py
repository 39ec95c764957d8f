r"""OTA: layer-wise model fusion by optimal transport, and its mean as a few-shot learner.

Singh, Jaggi: "Model Fusion via Optimal Transport", NeurIPS 2020, arXiv 1910.05653. Data-free meta-learning takes it as
a rival (Hu et al., PURER, CVPR 2023): fuse the pool's models, then adapt the result to new tasks.

==============  ===========================================  ==================================
symbol          meaning                                      name here
==============  ===========================================  ==================================
:math:`W^i_l`   weights of layer l of model i                ``align.encoder_of``
:math:`\hat W`  the same, inputs aligned one layer before    ``own`` in ``align.align``
C               distances between neurons                    ``cost`` there
P, T            transport plan and n P, a permutation        ``plans`` there
s               weight of a model in the mean, 1/K           ``average``
==============  ===========================================  ==================================

.. math:: \hat W_l = W_l T_{l-1}, \quad T_l = n \arg\min_P \langle P, C(\hat W_l, W^1_l)\rangle, \quad
    \tilde W_l = T_l^\top \hat W_l, \qquad \bar W_l = \frac1K \sum_i \tilde W^i_l

Every model is aligned to the first of its group, models that differ in their heads only (``metapool/align.py``).

Deviations from the published code, each for a reason: more than two models, by the plain mean (the code fuses two);
biases and batch norm, which it does not know, reorder with their neuron, and are folded into the weights to measure
distances (a neuron is what it computes); a residual stream has one plan, the stem's or the shortcut's (the mean of two
plans, as there, is no permutation); the exact plan only, not Sinkhorn's (layers are at most some hundred neurons wide);
the last layer is not transported: that would permute labels, which models of unlike classes do not share; so there is
no common head to fine-tune, and the result answers by prototypes. Batch-norm statistics are re-estimated on recovered
images, since averaging shrinks activations, and of several architectures the one that does best is kept. Models of a
group may normalise images by unlike constants; the first one's are used.

Cost: no training. One assignment problem per layer and model: less than a second for ten ResNet-18.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch

from metapool.align import alike, encoders_of, with_encoder
from metapool.bank import TaskBank
from metapool.base.functional import Params
from metapool.base.images import LabelledImages, to_float
from metapool.base.store import Settings, Store, generator_for
from metapool.evaluate import few_shot_accuracy
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.pool import Access, ModelPool
from metapool.recover import AnyRecovery, GeneratorRecovery, recover_pool
from metapool.training import training_key


def average(encoders: list[Params]) -> Params:
    r"""The fused weights, :math:`\bar W = \frac1K \sum_i \tilde W^i`.

    Args:
        encoders: K aligned encoders.

    Returns:
        Their mean, by name.
    """
    return {name: torch.stack([encoder[name] for encoder in encoders]).mean(0) for name in encoders[0]}


def spread(encoders: list[Params]) -> float:
    r"""How far models lie from the first: the mean of :math:`\|W^i - W^1\| / \|W^1\|` over i > 1, of convolutions.

    Args:
        encoders: K of one shape.

    Returns:
        0 for equal models, :math:`\sqrt 2` for independent ones of one norm; 0 for a single one.
    """
    first, *others = (torch.cat([v.flatten() for v in encoder.values() if v.dim() > 1]) for encoder in encoders)
    return sum(float((other - first).norm() / first.norm()) for other in others) / max(len(others), 1)


class OTA(Settings):
    """Models of one architecture, neuron by neuron matched to the first, and averaged."""

    paper: ClassVar[str] = "Singh and Jaggi, NeurIPS 2020, arXiv 1910.05653"
    needs: ClassVar[Access] = "weights of one architecture"
    version: ClassVar[int] = 1

    name: Literal["ota"] = "ota"
    """Which method this is."""
    recovery: AnyRecovery = GeneratorRecovery()
    """How the bank is made that statistics are estimated on and, without validation classes, architectures chosen."""
    bank_images: int = pydantic.Field(default=1000, ge=10)
    """Recovered images that batch-norm statistics are estimated on."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> TaskBank:
        """The stage that opens models of the pool in workers of its own: recovery."""
        return recover_pool(pool, self.recovery, store)

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """Fuses the models of each architecture and keeps the best result.

        Args:
            pool: the models.
            store: keeps the bank and the result.
            seed: of the images and episodes drawn; the fusion has nothing random.
            validation: meta-validation images, to choose the architecture; recovered ones when absent.

        Returns:
            The fused network; its history has one record per architecture.
        """
        groups = alike(pool)
        bank = self.prepare(pool, store, seed)
        key = training_key(self, seed, validation, pool=pool.digest(), bank=bank.digest())
        build = partial(self._build, pool, groups, bank, seed, validation)
        return MetaModel.load(store.artifact("meta-model", key, build))

    def _build(
        self,
        pool: ModelPool,
        groups: list[list[str]],
        bank: TaskBank,
        seed: int,
        validation: LabelledImages | None,
        folder: Path,
    ) -> None:
        input = pool.input
        images = bank.labelled("distinct", input).images
        drawn = torch.randperm(len(images), generator=generator_for(seed, "ota", "statistics"))[: self.bank_images]
        chosen_on = validation or bank.labelled("by-name", input)
        fused: list[tuple[float, MetaModel]] = []
        records: list[Mapping[str, Any]] = []
        for ids in groups:
            models = [pool.get(id) for id in ids]
            encoders = encoders_of(models, aligned=True)
            record = {
                "method": self.name,
                "step": len(records),
                "models": ids,
                "spread": spread(encoders_of(models, aligned=False)),
                "aligned_spread": spread(encoders),
            }
            first = models[0]
            assert first.spec is not None
            network = with_encoder(first, average(encoders), to_float(images[drawn]))
            candidate = MetaModel(network, first.spec, ProtoNet(normalise=True), first.input)
            accuracy = few_shot_accuracy(candidate, chosen_on, seed)
            records.append({**record, "validation": accuracy})
            fused.append((accuracy, candidate))
        _, best = max(fused, key=lambda pair: pair[0])
        best.history = records
        best.save(folder)
