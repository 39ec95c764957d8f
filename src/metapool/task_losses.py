"""What the meta-model is to do on one model's task, as losses of its outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def relational_loss(features: Tensor, cosines: Tensor, temperature: float) -> Tensor:
    r"""How unlike the student's neighbourhoods are to a teacher's: :math:`\mathrm{mean}_a\, \mathrm{KL}(p_a \| q_a)`.

    :math:`p_a = \mathrm{softmax}_b(c_{ab} / \tau)` and :math:`q_a = \mathrm{softmax}_b(\cos(z_a, z_b) / \tau)` over all
    other images :math:`b \ne a` of the batch: whom an image resembles, near ones above all, since few-shot answers
    hang on them. Needs no label space in common with the teacher (relational distillation, here in the form of
    Passalis and Tefas 2018, arXiv 1803.10837, "probabilistic knowledge transfer", with a temperature).

    Args:
        features: the student's, float [B, D], B ≥ 3.
        cosines: the teacher's cosines between the same images, float [B, B].
        temperature: τ > 0.

    Returns:
        A scalar ≥ 0; 0 when all neighbourhoods agree.
    """
    directions = F.normalize(features, dim=1)
    wanted, found = (_neighbours(c, temperature) for c in (cosines, directions @ directions.T))
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def _neighbours(cosines: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [B, B - 1] of every other image."""
    count = len(cosines)
    others = ~torch.eye(count, dtype=torch.bool)
    return F.log_softmax(cosines[others].view(count, count - 1) / temperature, 1)


def released_classify_loss(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    r"""What TGR's released code takes for :func:`classify_loss`: a divergence of probabilities where logarithms belong.

    Cross-entropy plus :math:`\frac{1}{BK} \sum_{b,k} p_{bk} (\log p_{bk} - q_{bk})` with the teacher's probabilities p
    and the student's q (methods/maml.py, line 85): linear in q, so that its gradient is a few percent of the other's.

    Args:
        logits: the student's, float [B, K].
        labels: int64 [B].
        teacher: the teacher's logits over the same classes, float [B, K].

    Returns:
        A scalar.
    """
    taught = teacher.softmax(1)
    return F.cross_entropy(logits, labels) + (taught * (taught.log() - logits.softmax(1))).mean()


def classify_loss(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy to the recovered label plus :func:`distillation_loss`, per image (TGR, section 3.3).

    Args:
        logits: the student's, float [B, K].
        labels: int64 [B].
        teacher: the teacher's logits over the same classes, float [B, K].

    Returns:
        A scalar.
    """
    return F.cross_entropy(logits, labels) + distillation_loss(logits, teacher)


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean of :math:`\mathrm{KL}(\mathrm{softmax}(t) \| \mathrm{softmax}(s))` over images.

    Args:
        logits: s, the student's, float [B, K].
        teacher: t, the teacher's over the same classes, float [B, K].

    Returns:
        A scalar ≥ 0; 0 where the answers agree.
    """
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(teacher, 1), log_target=True, reduction="batchmean")
