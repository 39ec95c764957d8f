r"""DRO: a network that makes networks, fitted to the pool's weights under the worst small change of its input.

Our reconstruction of Wang, Wang, Shen, Suo, Song, Yu, Shen, Gao: "Meta-Learning without Data via Wasserstein
Distributionally-Robust Model Fusion", UAI 2022, PMLR 180, pages 2045-2055. No code was published, and we had only
the abstract: each model owns a learnt task embedding, a black-box network turns an embedding into a model, Wasserstein
robustness diversifies the embeddings, new tasks start from a sampled model. Here is the usual dual of such a problem
(Sinha et al., ICLR 2018, arXiv 1710.10571) with those parts; all constants are ours.

=================  ============================================  =============================
symbol             meaning                                       name here
=================  ============================================  =============================
:math:`W_i`        weights of model i, standardised, D numbers   ``Span.coordinates``
:math:`e_i`        its embedding                                 ``params["embeddings"]``
:math:`F_\phi`     fusion network                                ``fuse``
:math:`e'_i`       worst embedding near :math:`e_i`              ``moved``
γ, T, ρ            price, steps and rate of the inner problem    ``gamma``, ``ascent_*``
=================  ============================================  =============================

.. math:: \min_{\phi, e} \frac1M \sum_i \sup_{e'}
    \Big\{ \frac1D \|F_\phi(e') - W_i\|^2 - \gamma \|e' - e_i\|^2 \Big\}

is the dual of a Wasserstein ball around the law of :math:`(e_i, W_i)` in which only embeddings move. At the supremum
:math:`e' = e_i + \frac{1}{2\gamma} \nabla \frac1D \|F_\phi(e') - W_i\|^2`; ascent in units of 1/2γ goes there, is
stable for every large γ, and ends within O(1/γ) of :math:`e_i`. By Danskin's theorem the outer gradient is that at e',
held fixed. In the end :math:`W = F_\phi(e)`, e drawn from the normal distribution with the embeddings' moments.

All that M models can teach lies in the span of their deviations from their mean. F therefore gives coordinates in that
span, tensor by tensor: the loss is the same, and F for a ResNet-18 has 10⁵ parameters, not 10⁷.

Deviations from what the abstract says: one model is sampled, not one per task (metapool returns one); it answers by
prototypes, not by gradient steps (heads stay out, as labels differ); models do not arrive one after the other. Ours:
neurons are first aligned (``metapool/align.py``), since unlike orders have no meaningful mean; batch-norm statistics
are re-estimated on recovered images; of several architectures the best is kept; every step sees all models.

Cost of a step: ``ascent_steps`` + 1 passes of F for all models, some milliseconds; no image.
"""

import math
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.align import Span, alike, encoders_of, with_encoder
from metapool.bank import TaskBank
from metapool.base.functional import Params
from metapool.base.images import LabelledImages, to_float
from metapool.base.store import Key, Settings, States, Store, generator_for
from metapool.evaluate import few_shot_accuracy
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.pool import Access, ModelPool
from metapool.recover import AnyRecovery, GeneratorRecovery, recover_pool
from metapool.training import Training, training_key


def fuse(params: Params, embeddings: Tensor) -> Tensor:
    """The fusion network: one hidden layer, and a linear head for every weight tensor, side by side.

    Args:
        params: ``hidden.*`` and ``heads.*``.
        embeddings: float [M, m].

    Returns:
        float [M, R], coordinates of all tensors.
    """
    hidden = F.silu(F.linear(embeddings, params["hidden.weight"], params["hidden.bias"]))
    return F.linear(hidden, params["heads.weight"], params["heads.bias"])


def robust_objective(params: Params, moved: Tensor, span: Span, gamma: float) -> Tensor:
    r"""What the inner problem raises and the outer lowers: :math:`\frac1D \|F(e') - W_i\|^2 - \gamma \|e' - e_i\|^2`.

    Args:
        params: of the fusion network, and ``embeddings``.
        moved: e', float [M, m].
        span: the models.
        gamma: γ.

    Returns:
        float [M].
    """
    misfit = (fuse(params, moved) - span.coordinates).square() @ span.shares
    return misfit - gamma * (moved - params["embeddings"]).square().sum(1)


def ascend(params: Params, moved: Tensor, span: Span, gamma: float, rate: float, steps: int) -> Tensor:
    r"""The inner problem: :math:`e' \leftarrow e' + \frac{\rho}{2\gamma} \nabla [\text{robust objective}](e')`.

    Args:
        params: of the fusion network, and ``embeddings``; not changed.
        moved: e' to start from, float [M, m].
        span: the models.
        gamma: γ.
        rate: ρ; with 1 a step solves for e' where the loss is linear.
        steps: T.

    Returns:
        e', detached.
    """
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(robust_objective(params, moved, span, gamma).sum(), moved)
        moved = moved + rate / (2 * gamma) * slope
    return moved.detach()


def draw_embedding(embeddings: Tensor, generator: torch.Generator) -> Tensor:
    r"""An e of the moments of the M that there are: :math:`\bar e + \frac{1}{\sqrt{M-1}} \sum_i z_i (e_i - \bar e)`."""
    deviations = embeddings - embeddings.mean(0)
    noise = torch.randn(len(embeddings), generator=generator, dtype=embeddings.dtype)
    return embeddings.mean(0) + noise @ deviations / math.sqrt(max(len(embeddings) - 1, 1))


class DRO(Settings):
    """Our reconstruction: a distributionally robust network of the pool's weights, and one model drawn from it."""

    paper: ClassVar[str] = "Wang et al., UAI 2022, PMLR 180 (our reconstruction)"
    needs: ClassVar[Access] = "weights of one architecture"
    version: ClassVar[int] = 1

    name: Literal["dro"] = "dro"
    """Which method this is."""
    recovery: AnyRecovery = GeneratorRecovery()
    """How the bank is made that statistics are estimated on and, without validation classes, architectures chosen."""
    bank_images: int = pydantic.Field(default=1000, ge=10)
    """Recovered images that batch-norm statistics are estimated on."""
    align: bool = True
    """Whether neurons are first put in the order of the first model's."""
    dimension: int = pydantic.Field(default=32, ge=1)
    """Of an embedding, m."""
    hidden: int = pydantic.Field(default=128, ge=1)
    """Units of the fusion network."""
    gamma: float = pydantic.Field(default=0.1, gt=0)
    """Price of moving an embedding, γ; with a large one F is fitted to the embeddings themselves."""
    ascent_steps: int = pydantic.Field(default=5, ge=0)
    """Steps of the inner problem, T."""
    ascent_rate: float = pydantic.Field(default=0.5, gt=0, le=1)
    """Length of those steps, ρ."""
    noise: float = pydantic.Field(default=0.1, ge=0)
    """Deviation of what is added to an embedding before the ascent, for which a perfect fit has no slope."""
    sample: Literal["draw", "mean"] = "draw"
    """Whether the model is drawn from the embeddings' distribution or made of their mean."""
    steps: int = pydantic.Field(default=300, ge=1)
    """Steps of Adam on the embeddings and φ."""
    learning_rate: float = pydantic.Field(default=3e-3, gt=0)
    """Of Adam; it falls to a hundredth along half a cosine."""
    check_every: int = pydantic.Field(default=100, ge=1)
    """Steps between checkpoints."""

    def prepare(self, pool: ModelPool, store: Store, seed: int) -> TaskBank:
        """The stage that opens models of the pool in workers of its own: recovery."""
        return recover_pool(pool, self.recovery, store)

    def fit(self, pool: ModelPool, store: Store, seed: int, validation: LabelledImages | None = None) -> MetaModel:
        """Fits a fusion network to each architecture's models, makes a model of each, and keeps the best.

        Args:
            pool: the models.
            store: keeps the bank, the checkpoints and the result.
            seed: of everything random.
            validation: meta-validation images, to choose the architecture; recovered ones when absent.

        Returns:
            The fused network, with the record of its fusion network's training.
        """
        groups = alike(pool)
        bank = self.prepare(pool, store, seed)
        key = training_key(self, seed, validation, pool=pool.digest(), bank=bank.digest())
        build = partial(self._build, pool, groups, bank, store, seed, validation, key)
        return MetaModel.load(store.artifact("meta-model", key, build))

    def _build(
        self,
        pool: ModelPool,
        groups: list[list[str]],
        bank: TaskBank,
        store: Store,
        seed: int,
        validation: LabelledImages | None,
        key: Key,
        folder: Path,
    ) -> None:
        spans = [Span.of(encoders_of([pool.get(id) for id in ids], aligned=self.align)) for ids in groups]
        trained = self._train(spans, store, seed, key)
        input = pool.input
        images = bank.labelled("distinct", input).images
        drawn = torch.randperm(len(images), generator=generator_for(seed, "dro", "statistics"))[: self.bank_images]
        chosen_on = validation or bank.labelled("by-name", input)
        best = -1.0
        for ids, span, training in zip(groups, spans, trained):
            first, params = pool.get(ids[0]), training.kept()
            embedding = params["embeddings"].mean(0)
            if self.sample == "draw":
                embedding = draw_embedding(params["embeddings"], generator_for(seed, "dro", "draw", ids[0]))
            encoder = span.weights(fuse(params, embedding[None])[0])
            network = with_encoder(first, encoder, to_float(images[drawn]))
            assert first.spec is not None
            model = MetaModel(network, first.spec, ProtoNet(normalise=True), first.input, training.records)
            accuracy = training.records[-1]["validation"] = few_shot_accuracy(model, chosen_on, seed)
            if accuracy > best:
                best = accuracy
                model.save(folder)

    def _train(self, spans: list[Span], store: Store, seed: int, key: Key) -> list[Training]:
        """A fusion network for every group, side by side in one checkpointed loop."""
        trained = [
            Training(self._initial(span, generator_for(seed, "dro", "initialise")), self.steps, self.learning_rate, 0)
            for span in spans
        ]
        state = States(**{str(group): training for group, training in enumerate(trained)})
        for step in store.steps("meta-train", key, state, self.steps, self.check_every):
            for group, (span, training) in enumerate(zip(spans, trained)):
                record = self._take(training, span, generator_for(seed, "dro", "step", str(step), str(group)))
                training.records.append({"method": self.name, "step": step, "group": group, **record})
        return trained

    def _initial(self, span: Span, generator: torch.Generator) -> Params:
        models, outputs = span.coordinates.shape
        params = {
            "embeddings": 0.1**0.5 * torch.randn(models, self.dimension, generator=generator),
            "hidden.weight": (2 / self.dimension) ** 0.5
            * torch.randn(self.hidden, self.dimension, generator=generator),
            "hidden.bias": torch.zeros(self.hidden),
            "heads.weight": torch.zeros(outputs, self.hidden),  # so that F begins with the plain mean
            "heads.bias": torch.zeros(outputs),
        }
        return {name: value.requires_grad_() for name, value in params.items()}

    def _take(self, training: Training, span: Span, generator: torch.Generator) -> dict[str, float]:
        """One step of Adam at the worst embeddings."""
        params, embeddings = training.params, training.params["embeddings"].detach()
        start = embeddings + self.noise * torch.randn(embeddings.shape, generator=generator)
        moved = ascend(params, start, span, self.gamma, self.ascent_rate, self.ascent_steps)
        loss = robust_objective(params, moved, span, self.gamma).mean()
        training.descend(dict(zip(params, torch.autograd.grad(loss, list(params.values())))))
        return {"loss": loss.item(), "displacement": (moved - embeddings).norm(dim=1).mean().item()}
