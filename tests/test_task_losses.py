"""Losses of one task against loops over images and classes."""

import pytest
import torch
import torch.nn.functional as F

from metapool.task_losses import classify_loss, relational_loss


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_classify_is_cross_entropy_plus_divergence_from_the_teacher() -> None:
    logits, teacher, labels = seeded(6, 4), seeded(6, 4, seed=1), torch.tensor([0, 1, 2, 3, 0, 1])
    total = 0.0
    for image in range(6):
        p, q = F.softmax(teacher[image], 0), F.softmax(logits[image], 0)
        total += -torch.log(q[labels[image]]).item()
        total += sum((p[k] * torch.log(p[k] / q[k])).item() for k in range(4))
    assert classify_loss(logits, labels, teacher).item() == pytest.approx(total / 6)
    own = classify_loss(teacher, labels, teacher)
    torch.testing.assert_close(own, F.cross_entropy(teacher, labels))
    assert classify_loss(logits, labels, teacher) > F.cross_entropy(logits, labels)


def test_classify_does_not_see_a_constant_added_to_the_teacher_s_logits() -> None:
    logits, teacher, labels = seeded(6, 4), seeded(6, 4, seed=1), torch.arange(6) % 4
    shifted = classify_loss(logits, labels, teacher + seeded(6, 1, seed=2))
    torch.testing.assert_close(shifted, classify_loss(logits, labels, teacher))
    assert not torch.allclose(classify_loss(logits, labels, 2 * teacher), shifted)


def test_relational_is_the_mean_divergence_between_neighbourhoods() -> None:
    features, wanted, temperature = seeded(5, 3), seeded(5, 5, seed=1), 0.3
    divergences = []
    for a in range(5):
        others = [b for b in range(5) if b != a]
        cosines = torch.stack([F.cosine_similarity(features[a], features[b], dim=0) for b in others])
        p = torch.distributions.Categorical(logits=wanted[a, others] / temperature)
        q = torch.distributions.Categorical(logits=cosines / temperature)
        divergences.append(torch.distributions.kl_divergence(p, q))
    expected = torch.stack(divergences).mean()
    torch.testing.assert_close(relational_loss(features, wanted, temperature), expected)
    assert not torch.isclose(relational_loss(features, wanted, 2 * temperature), expected)


def test_relational_is_zero_for_the_teacher_s_geometry_however_turned_or_scaled() -> None:
    features = seeded(8, 4)
    directions = F.normalize(features, dim=1)
    rotation = torch.linalg.qr(seeded(4, 4, seed=1)).Q
    loss = relational_loss(3 * features @ rotation, directions @ directions.T, 0.1)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    assert relational_loss(features * torch.tensor([5.0, 1, 1, 1]), directions @ directions.T, 0.1) > 0.01
    assert relational_loss(features + 7, directions @ directions.T, 0.1) > 0.01
