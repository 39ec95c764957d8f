"""The robust fusion network: coordinates, the inner ascent, Danskin's gradient, draws; the method."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import toys
from torch import Tensor

from metapool.align import Span, encoder_of, encoders_of
from metapool.base.errors import MetapoolError
from metapool.base.functional import Params
from metapool.base.images import LabelledImages, to_float
from metapool.base.networks import build
from metapool.base.store import Store
from metapool.episodes import sample_episodes
from metapool.evaluate import evaluate
from metapool.meta_model import MetaModel
from metapool.methods import load_model
from metapool.methods.dro import DRO, ascend, draw_embedding, fuse, robust_objective
from metapool.pool import ModelPool

MODELS, DIMENSION, HIDDEN = 4, 3, 6
SMALL = DRO(recovery=toys.HASTY, bank_images=50, dimension=4, hidden=8, gamma=1.0, steps=7, check_every=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoders(count: int = MODELS) -> list[Params]:
    """Conv4 encoders in float64, every number random."""
    spec = cases.network_spec("conv4", (1, 16, 16), 2, width=3)
    found = [encoder_of(build(spec, torch.Generator().manual_seed(seed)).double()) for seed in range(count)]
    return [{n: v + normal(*v.shape, seed=9 + seed) ** 2 for n, v in e.items()} for seed, e in enumerate(found)]


SPAN = Span.of(encoders())


def network(scale: float = 0.25, seed: int = 1) -> Params:
    """A fusion network with embeddings, in float64; small heads, so that γ = 5 outweighs the curvature."""
    outputs = SPAN.coordinates.shape[1]
    params = {
        "embeddings": normal(MODELS, DIMENSION, seed=seed),
        "hidden.weight": normal(HIDDEN, DIMENSION, seed=seed + 1),
        "hidden.bias": normal(HIDDEN, seed=seed + 2),
        "heads.weight": scale * normal(outputs, HIDDEN, seed=seed + 3),
        "heads.bias": normal(outputs, seed=seed + 4),
    }
    return {name: value.requires_grad_() for name, value in params.items()}


def misfit(params: Params) -> Tensor:
    """Plain regression: the slow, obvious loss."""
    made = fuse(params, params["embeddings"])
    squares = [(row - target).square() for row, target in zip(made, SPAN.coordinates)]
    return torch.stack([(square * SPAN.shares).sum() for square in squares])


# Coordinates ----------------------------------------------------------------------------------------------------------


def test_coordinates_give_the_models_back() -> None:
    found = [SPAN.weights(row) for row in SPAN.coordinates]
    truth = [{n: v for n, v in encoder.items() if ".running_" not in n} for encoder in encoders()]
    torch.testing.assert_close(found, truth)
    assert not torch.allclose(found[0]["encoder.0.0.weight"], truth[1]["encoder.0.0.weight"])
    mean = SPAN.weights(torch.zeros_like(SPAN.coordinates[0]))
    torch.testing.assert_close(mean, {n: sum(e[n] for e in truth) / torch.tensor(4.0).double() for n in truth[0]})


def test_distances_of_coordinates_are_distances_of_standardised_weights() -> None:
    """So the loss on coordinates is the loss on all weights, for whatever a fusion network puts out."""
    states, made = encoders(), fuse(network(), normal(1, DIMENSION))[0].detach()
    weights = SPAN.weights(made)
    slow = torch.zeros(MODELS, dtype=torch.float64)
    for name in weights:
        rows = torch.stack([state[name] for state in states])
        deviation = (rows - rows.mean(0)).square().mean().sqrt()
        slow += torch.stack([((weights[name] - row) / deviation).square().sum() for row in rows])
    size = sum(value.numel() for value in weights.values())
    fast = (made - SPAN.coordinates).square() @ SPAN.shares
    torch.testing.assert_close(fast, slow / size)
    assert not torch.allclose(fast, slow.flip(0) / size)
    assert size > SPAN.coordinates.shape[1], "and it is cheaper"


def test_standardised_weights_have_unit_deviation() -> None:
    ones = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close((SPAN.coordinates.square() @ SPAN.shares).mean(), ones)
    for part in SPAN.coordinates.split([len(basis) for basis in SPAN.basis.values()], 1):
        torch.testing.assert_close(part.square().sum(1).mean(), ones)
    assert SPAN.shares.max() > 2 * SPAN.shares.min()


def test_one_model_and_equal_models_have_a_span() -> None:
    for count in (1, 2):
        span = Span.of(encoders(1) * count)
        assert span.coordinates.abs().max() == 0
        weights = span.weights(span.coordinates[0] + 1)
        assert all(torch.isfinite(value).all() for value in weights.values())


# The robust objective -------------------------------------------------------------------------------------------------


def test_the_objective_is_the_fit_less_the_price_of_the_way() -> None:
    params, moved = network(), normal(MODELS, DIMENSION, seed=20)
    found = robust_objective(params, moved, SPAN, 0.7)
    for i in range(MODELS):
        hidden = torch.nn.functional.silu(params["hidden.weight"] @ moved[i] + params["hidden.bias"])
        made = params["heads.weight"] @ hidden + params["heads.bias"]
        slow = ((made - SPAN.coordinates[i]) ** 2 * SPAN.shares).sum() - 0.7 * (
            (moved[i] - params["embeddings"][i]) ** 2
        ).sum()
        torch.testing.assert_close(found[i], slow)
    assert not torch.allclose(found, robust_objective(params, moved, SPAN, 0.8))
    torch.testing.assert_close(robust_objective(params, params["embeddings"], SPAN, 0.7), misfit(params))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 20.0])
def test_every_ascent_step_raises_the_objective(gamma: float) -> None:
    params = network()
    moved = params["embeddings"].detach()
    values = [robust_objective(params, moved, SPAN, gamma)]
    for _ in range(6):
        moved = ascend(params, moved, SPAN, gamma, 0.1, 1)
        values.append(robust_objective(params, moved, SPAN, gamma))
    assert all((after > before).all() for before, after in pairwise(values))
    down = ascend(params, params["embeddings"].detach(), SPAN, gamma, -0.1, 1)
    assert (robust_objective(params, down, SPAN, gamma) < values[0]).all()


def test_the_worst_embedding_solves_its_equation() -> None:
    """e' = e + ∇ misfit(e') / 2γ, after many steps; not after one."""
    params, gamma = network(), 5.0

    def rest(steps: int) -> Tensor:
        moved = ascend(params, params["embeddings"].detach(), SPAN, gamma, 0.5, steps).requires_grad_()
        loss = ((fuse(params, moved) - SPAN.coordinates).square() @ SPAN.shares).sum()
        (slope,) = torch.autograd.grad(loss, moved)
        return moved - params["embeddings"] - slope / (2 * gamma)

    torch.testing.assert_close(rest(200), torch.zeros(MODELS, DIMENSION).double(), rtol=0, atol=1e-10)
    assert rest(1).abs().max() > 1e-4


def test_a_high_price_is_plain_regression() -> None:
    """Displacement and robust excess fall as 1/γ."""
    params = network()
    embeddings = params["embeddings"].detach()

    def robust(gamma: float) -> tuple[Tensor, Tensor, Params]:
        moved = ascend(params, embeddings + 0.1, SPAN, gamma, 1.0, 8)
        value = robust_objective(params, moved, SPAN, gamma)
        gradient = torch.autograd.grad(value.mean(), list(params.values()))
        return moved - embeddings, value - misfit(params), dict(zip(params, gradient))

    (far, much, _), (near, little, gradient) = robust(1e4), robust(2e4)
    torch.testing.assert_close(near, far / 2, rtol=1e-2, atol=0)
    torch.testing.assert_close(little, much / 2, rtol=1e-2, atol=0)
    plain = dict(zip(params, torch.autograd.grad(misfit(params).mean(), list(params.values()))))
    torch.testing.assert_close(gradient, plain, rtol=2e-3, atol=1e-4)
    displaced, _, other = robust(1.0)
    assert displaced.norm() > 100 * near.norm()
    assert not torch.allclose(other["heads.weight"], plain["heads.weight"], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["embeddings", "hidden.weight", "heads.weight", "heads.bias"])
def test_the_gradient_at_the_worst_embedding_is_that_of_the_supremum(name: str) -> None:
    """Danskin: by finite differences of a value whose inner problem is solved anew each time."""
    params, gamma = network(), 5.0
    direction = normal(*params[name].shape, seed=30)

    def supremum(shift: float, steps: int = 300) -> Tensor:
        there = {**params, name: params[name].detach() + shift * direction}
        moved = ascend({n: v.detach() for n, v in there.items()}, there["embeddings"].detach(), SPAN, gamma, 0.5, steps)
        return robust_objective(there, moved, SPAN, gamma).mean()

    slow = (supremum(1e-5) - supremum(-1e-5)) / 2e-5

    def derivative(steps: int) -> Tensor:
        moved = ascend(params, params["embeddings"].detach(), SPAN, gamma, 0.5, steps)
        (gradient,) = torch.autograd.grad(robust_objective(params, moved, SPAN, gamma).mean(), params[name])
        return (gradient * direction).sum()

    torch.testing.assert_close(derivative(300), slow.detach(), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(derivative(0), slow, rtol=1e-3), "companion: the gradient of plain regression is another"


def test_embeddings_are_drawn_from_their_own_normal_distribution() -> None:
    embeddings, generator = normal(MODELS, DIMENSION), torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_embedding(embeddings, generator) for _ in range(20_000)])
    torch.testing.assert_close(drawn.mean(0), embeddings.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.T.cov(), embeddings.T.cov(), rtol=0, atol=0.06)
    assert not torch.allclose(embeddings.T.cov(), torch.eye(DIMENSION).double(), atol=0.2)
    torch.testing.assert_close(draw_embedding(embeddings[:1], generator), embeddings[0], rtol=0, atol=0)


# The method -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPool, Store]:
    root = tmp_path_factory.mktemp("dro")
    return toys.striped_pool(root / "pool"), Store(root / "store", threads=1)


def bits(model: MetaModel) -> dict[str, Tensor]:
    return dict(model.network.state_dict())


def test_same_seed_same_bits_other_seed_other_bits(stripes: tuple[ModelPool, Store], store: Store) -> None:
    first = SMALL.fit(*stripes, seed=0)
    torch.manual_seed(1234)
    torch.testing.assert_close(bits(SMALL.fit(stripes[0], store, 0)), bits(first), rtol=0, atol=0)
    other = SMALL.fit(*stripes, seed=1)
    assert not torch.allclose(bits(other)["encoder.0.0.weight"], bits(first)["encoder.0.0.weight"])


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_killed_and_resumed_it_ends_with_the_same_bits(
    stop: int, stripes: tuple[ModelPool, Store], store: Store, tmp_path: Path, tiny_pool: ModelPool
) -> None:
    pool = stripes[0] if stop != 4 else tiny_pool  # of four architectures all four go on
    unbroken = SMALL.fit(pool, Store(tmp_path / "unbroken", threads=1), 0)
    seen: list[int] = []

    def die(kind: str, done: int, total: int) -> None:
        if kind == "meta-train":
            seen.append(done)
            if len(seen) == stop:
                raise KeyboardInterrupt

    store.progress = die
    with pytest.raises(KeyboardInterrupt):
        SMALL.fit(pool, store, 0)
    resumed = SMALL.fit(pool, store, 0)
    assert seen == [*range(1, stop + 1), *range(stop - stop % 2 + 1, 8)], "no step before the checkpoint is taken again"
    torch.testing.assert_close(bits(resumed), bits(unbroken), rtol=0, atol=0)
    assert resumed.history == unbroken.history
    assert [record["step"] for record in resumed.history] == list(range(7))


def test_it_learns_to_make_the_models_of_the_pool(stripes: tuple[ModelPool, Store]) -> None:
    history = SMALL.model_copy(update={"steps": 200, "noise": 0.0, "hidden": 32}).fit(*stripes, seed=0).history
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    short = SMALL.fit(*stripes, seed=0).history
    assert short[-1]["loss"] > 0.3 * short[0]["loss"]


def test_a_lower_price_moves_embeddings_farther(stripes: tuple[ModelPool, Store]) -> None:
    cheap, dear = (SMALL.model_copy(update={"gamma": gamma}).fit(*stripes, seed=0).history for gamma in (1.0, 100.0))
    # At first F is constant: there is no slope yet, and what is left of the noise is the same.
    assert cheap[0]["displacement"] == pytest.approx(dear[0]["displacement"], rel=1e-4)
    assert all(a["displacement"] > b["displacement"] for a, b in zip(cheap[3:], dear[3:]))


def test_every_step_has_noise_of_its_own(stripes: tuple[ModelPool, Store]) -> None:
    noisy, quiet = (
        SMALL.model_copy(update={"ascent_steps": 0, "noise": noise}).fit(*stripes, seed=0).history
        for noise in (0.1, 0.0)
    )
    assert len({record["displacement"] for record in noisy}) == 7
    assert {record["displacement"] for record in quiet} == {0.0}


def test_settings_decide(stripes: tuple[ModelPool, Store]) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"align": False},
        {"sample": "mean"},
        {"gamma": 10.0},
        {"ascent_steps": 0},
        {"noise": 0.0},
    ]
    fits = [bits(SMALL.model_copy(update=change).fit(*stripes, seed=0))["encoder.0.0.weight"] for change in changes]
    for i, one in enumerate(fits):
        assert all(not torch.equal(one, other) for other in fits[:i]), changes[i]


def test_the_model_lies_in_the_span_of_the_pool_s(stripes: tuple[ModelPool, Store]) -> None:
    pool, store = stripes
    found = bits(SMALL.fit(pool, store, 0))
    span = Span.of(encoders_of(list(pool), aligned=True))
    for name, basis in span.basis.items():
        away, rows = (found[name] - span.mean[name]).flatten().double(), basis.flatten(1).double()
        inside = torch.linalg.lstsq(rows.T, away, driver="gelsd").solution @ rows
        torch.testing.assert_close(inside, away, rtol=1e-3, atol=1e-4)
    stranger = replace(span, mean={n: v + 1 for n, v in span.mean.items()})
    assert not torch.allclose(stranger.weights(span.coordinates[0])["encoder.0.0.weight"], found["encoder.0.0.weight"])


def test_of_unlike_architectures_the_best_is_kept_and_answers_alike_when_loaded(
    tiny_pool: ModelPool, store: Store, toy_images: LabelledImages, tmp_path: Path
) -> None:
    model = SMALL.fit(tiny_pool, store, 0, toy_images)
    accuracy = model.history[-1]["validation"]
    episodes = sample_episodes(toy_images, 5, 1, 5, 200, 0)
    assert evaluate(model, toy_images, episodes).interval.mean == accuracy
    alone = [SMALL.fit(tiny_pool[i : i + 1], store, 0, toy_images).history[-1]["validation"] for i in range(4)]
    assert min(alone) < accuracy
    assert model.spec == tiny_pool[model.history[0]["group"]].spec
    model.save(tmp_path)
    loaded = load_model(tmp_path)
    images = to_float(toy_images.images[:40:2])
    torch.testing.assert_close(loaded.encode(images), model.encode(images), rtol=0, atol=0)


def test_beats_chance_on_new_classes(stripes: tuple[ModelPool, Store]) -> None:
    images = toys.stripes(toys.NEW_KINDS, 25, seed=5)
    episodes = sample_episodes(images, 4, 1, 5, 200, 0)
    method = DRO(recovery=toys.RECOVERY, bank_images=50, dimension=8, hidden=32, gamma=1.0, steps=100)
    model = method.fit(*stripes, seed=0)
    assert evaluate(model, images, episodes).interval.low > 25 + 10
    wrong = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mixed = LabelledImages(images.images[wrong], images.labels, images.classes)
    assert 15 < evaluate(model, mixed, episodes).interval.mean < 35


def test_bad_use_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(MetapoolError, match="the pool has no models"):
        SMALL.fit(ModelPool.create(tmp_path / "empty", "empty"), store, 0)
    with pytest.raises(ValueError, match="gamma"):
        DRO(gamma=0)
    with pytest.raises(ValueError, match="ascent_rate"):
        DRO(ascent_rate=1.5)
