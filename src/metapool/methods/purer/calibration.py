"""ICFIL, our reconstruction: an encoder calibrated for one episode, by images inverted out of the adapted network."""

from pathlib import Path
from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool.base.errors import MetapoolError
from metapool.base.functional import Params, call, params_of
from metapool.base.images import to_float
from metapool.base.store import Settings, generator_for
from metapool.meta_model import MetaModel
from metapool.pool import PretrainedModel
from metapool.recover import PixelRecovery


def contrastive_loss(real: Tensor, labels: Tensor, pseudo: Tensor, pseudo_labels: Tensor, temperature: float) -> Tensor:
    r"""Supervised contrastive loss between two kinds of features (Khosla et al. 2020, arXiv 2004.11362, equation 2).

    The mean over images a of one kind of :math:`-\frac{1}{|P_a|} \sum_{p \in P_a} \log \frac{\exp(\cos(z_a, z_p) /
    \tau)}{\sum_b \exp(\cos(z_a, z_b) / \tau)}`, where b are all images of the other kind and P_a those of a's class.

    Args:
        real: float [S, D].
        labels: int64 [S] in [0, K).
        pseudo: float [P, D].
        pseudo_labels: int64 [P], the same classes.
        temperature: τ > 0.

    Returns:
        A scalar: the average of that of the real and that of the pseudo images.
    """
    cosines = F.normalize(real, dim=1) @ F.normalize(pseudo, dim=1).T / temperature
    same = (labels.unsqueeze(1) == pseudo_labels).to(cosines.dtype)
    likely = [(cosines.log_softmax(dim) * same).sum(dim) / same.sum(dim) for dim in (0, 1)]
    return -(likely[0].mean() + likely[1].mean()) / 2


class Calibration(Settings):
    """Of ICFIL."""

    recovery: PixelRecovery = PixelRecovery(per_class=5, steps=30, learning_rate=0.1)
    """How pseudo support images come out of the network adapted to an episode."""
    steps: int = pydantic.Field(default=5, ge=1)
    """Steps of the encoder on the contrastive loss."""
    rate: float = pydantic.Field(default=0.01, gt=0)
    """Learning rate of these steps."""
    temperature: float = pydantic.Field(default=0.1, gt=0)
    """Of the contrastive loss."""


class Adapted(nn.Module):
    """A network with the prototypes of an episode as its head: a classifier like those of the pool."""

    def __init__(self, model: MetaModel, support: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.network, self.learner, self.labels = model.network, model.learner, labels
        with torch.no_grad():
            self.prototypes = self.network.features(support)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        return self.learner.classify(self.network, {}, self.prototypes, self.labels, self.network.features(images))


class Calibrated:
    """A meta-model whose encoder is calibrated for every episode (ICFIL, our reconstruction); no query sees another.

    Args:
        model: answers by prototypes.
        calibration: how.
    """

    KIND = "purer-icfil"
    models_at_inference = 1

    def __init__(self, model: MetaModel, calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        self.input, self.parameter_count = model.input, model.parameter_count

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W], normalised: every episode has features of its own."""
        return self.input.prepare(images)

    def classify(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits [Q, K] of encoded queries, by the encoder that is calibrated on the support alone."""
        network, learner = self.model.network, self.model.learner
        with torch.enable_grad():
            params = self.calibrated(support, labels)
        with torch.no_grad():
            statistics = dict(network.named_buffers())
            known, asked = (learner.encode(network, params, statistics, images) for images in (support, query))
            return learner.classify(network, params, known, labels, asked)

    def calibrated(self, support: Tensor, labels: Tensor) -> Params:
        """The encoder's parameters after some steps on the contrastive loss of support and inverted images."""
        network, settings = self.model.network, self.calibration
        names = [str(label) for label in range(int(labels.max()) + 1)]
        adapted = PretrainedModel("adapted", Adapted(self.model, support, labels), self.input, names)
        pseudo = settings.recovery.recover(adapted, generator_for(settings.recovery.seed, "purer", "calibrate"))
        images = torch.cat([support, self.input.prepare(to_float(pseudo.images))])
        params, statistics = params_of(network.encoder), dict(network.encoder.named_buffers())
        for _ in range(settings.steps):
            features = call(network.encoder, params, images, statistics=statistics)
            real, inverted = features[: len(support)], features[len(support) :]
            loss = contrastive_loss(real, labels, inverted, pseudo.labels, settings.temperature)
            found = torch.autograd.grad(loss, list(params.values()))
            params = {name: value - settings.rate * part for (name, value), part in zip(params.items(), found)}
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
        return {f"encoder.{name}": value for name, value in params.items()}

    def save(self, folder: Path) -> None:
        """Writes the meta-model into a folder of its own, and ``model.json``."""
        (folder / "meta-model").mkdir()
        self.model.save(folder / "meta-model")
        about = _About(kind="purer-icfil", calibration=self.calibration)
        (folder / "model.json").write_text(about.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Calibrated":
        """Reads what :meth:`save` wrote.

        Args:
            folder: where.

        Returns:
            The model.

        Raises:
            MetapoolError: when a file is missing or does not fit.
        """
        try:
            about = _About.model_validate_json((folder / "model.json").read_text())
        except (OSError, ValueError) as error:
            raise MetapoolError(f"{folder} is no saved calibrated model: {error}") from error
        return cls(MetaModel.load(folder / "meta-model"), about.calibration)


class _About(Settings):
    kind: Literal["purer-icfil"]
    version: Literal[1] = 1
    calibration: Calibration
