"""Losses of one task against loops over images and classes."""

import math

import pytest
import torch
import torch.nn.functional as F

from metapool.task_losses import classify_loss, distillation_loss, relational_loss, released_classify_loss


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


def test_a_student_that_sees_no_difference_pays_what_the_teacher_knows() -> None:
    """All cosines are 1 then, so every neighbourhood is uniform: log(B - 1) minus the entropy of the teacher's."""
    features, wanted = torch.ones(6, 3, dtype=torch.float64).requires_grad_(), seeded(6, 6)
    found = relational_loss(features, wanted, 0.2)
    rows = torch.stack([wanted[a, [b for b in range(6) if b != a]] for a in range(6)])
    entropy = torch.distributions.Categorical(logits=rows / 0.2).entropy().mean()
    torch.testing.assert_close(found, math.log(5) - entropy)
    assert found > 0
    ignorant = relational_loss(features, torch.zeros_like(wanted), 0.2)
    torch.testing.assert_close(ignorant, torch.zeros_like(ignorant))
    found.backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_how_near_an_image_is_to_itself_does_not_matter() -> None:
    features, wanted = seeded(6, 3), seeded(6, 6, seed=1)
    own = wanted + torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(relational_loss(features, own, 0.2), relational_loss(features, wanted, 0.2))
    assert not torch.isclose(relational_loss(features, own.roll(1, 1), 0.2), relational_loss(features, wanted, 0.2))


def test_classify_is_what_torch_distributions_say() -> None:
    logits, teacher, labels = seeded(7, 5, seed=3), seeded(7, 5, seed=4), torch.arange(7) % 5
    student, wanted = (torch.distributions.Categorical(logits=values) for values in (logits, teacher))
    divergence = torch.distributions.kl_divergence(wanted, student)
    expected = (divergence - student.log_prob(labels)).mean()
    torch.testing.assert_close(classify_loss(logits, labels, teacher), expected)
    turned = (torch.distributions.kl_divergence(student, wanted) - student.log_prob(labels)).mean()
    assert (classify_loss(logits, labels, teacher) - turned).abs() > 0.05, "the teacher comes first"


def test_gradients_are_those_of_finite_differences() -> None:
    features, cosines = seeded(5, 3).requires_grad_(), seeded(5, 5, seed=1)
    logits, teacher, labels = seeded(4, 3).requires_grad_(), seeded(4, 3, seed=1), torch.tensor([0, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda value: relational_loss(value, cosines, 0.3), (features,))
    assert torch.autograd.gradcheck(lambda value: classify_loss(value, labels, teacher), (logits,))


def test_the_released_divergence_is_linear_in_the_student_and_pulls_far_less() -> None:
    logits, labels, teacher = seeded(6, 4).requires_grad_(), torch.arange(6) % 4, 3 * seeded(6, 4, seed=1)
    taught, found = teacher.softmax(1), logits.softmax(1)
    total = sum(
        float(p * (math.log(p) - q)) for rows in zip(taught, found) for p, q in zip(*(row.tolist() for row in rows))
    )
    expected = F.cross_entropy(logits, labels) + total / 24
    torch.testing.assert_close(released_classify_loss(logits, labels, teacher), expected)
    pulls = [
        torch.autograd.grad(loss(logits, labels, teacher) - F.cross_entropy(logits, labels), logits)[0].norm()
        for loss in (released_classify_loss, classify_loss)
    ]
    assert pulls[0] < 0.15 * pulls[1]


def test_distillation_is_the_divergence_of_the_student_from_the_teacher() -> None:
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = teacher.softmax(1), student.softmax(1)
    slow = sum(float(p[i, k]) * math.log(float(p[i, k] / q[i, k])) for i in range(5) for k in range(3)) / 5
    assert distillation_loss(student, teacher).item() == pytest.approx(slow)
    assert distillation_loss(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-12)
    assert distillation_loss(teacher, student).item() != pytest.approx(slow, rel=1e-3)
