"""What the models of a group say of the group's images."""

import cases
import pytest
import torch

from metapool.bank import TaskBank, fit_bytes
from metapool.base.functional import half_precision
from metapool.base.images import commonest, to_float
from metapool.base.store import Store
from metapool.pool import ModelPool
from metapool.views import Views, ViewSettings, view_bank

GROUPS = [["d-conv4", "b-resnet10"], ["a-conv4", "c-conv4"]]
SPEC = cases.input_spec((1, 16, 16))


@pytest.fixture
def views(tiny_pool: ModelPool, tiny_bank: TaskBank, store: Store) -> list[Views]:
    return view_bank(tiny_pool, tiny_bank, GROUPS, SPEC, ViewSettings(copies=2, blends=1), store)


def test_first_come_the_recovered_images_in_the_order_of_the_group(views: list[Views], tiny_bank: TaskBank) -> None:
    for group, view in zip(GROUPS, views):
        images = torch.cat([fit_bytes(tiny_bank[id].images, SPEC) for id in group])
        labels = torch.cat([tiny_bank[id].labels for id in group])
        owner = torch.cat([torch.full((len(tiny_bank[id].labels),), index) for index, id in enumerate(group)])
        count = len(images)
        torch.testing.assert_close(view.images[:count], images, rtol=0, atol=0)
        assert view.images.dtype == torch.uint8
        assert len(view.images) == len(view.labels) == len(view.owner) == 4 * count
        for copy in range(3):
            part = slice(copy * count, (copy + 1) * count)
            torch.testing.assert_close(view.labels[part], labels, rtol=0, atol=0)
            torch.testing.assert_close(view.owner[part], owner, rtol=0, atol=0)
        assert set(view.labels[3 * count :].tolist()) == set(view.owner[3 * count :].tolist()) == {-1}
        assert not torch.equal(view.images[count : 2 * count], images), "copies are scaled and moved"
        assert not torch.equal(view.images[count : 2 * count], view.images[2 * count : 3 * count])


def test_every_model_of_the_group_and_no_other_looked_at_every_stored_image(
    views: list[Views], tiny_pool: ModelPool
) -> None:
    for group, view in zip(GROUPS, views):
        assert list(view.features) == list(view.logits) == group
        for id in group:
            model = tiny_pool.get(id)
            with torch.no_grad(), half_precision():
                features, logits = model.features_and_logits(to_float(view.images))
            assert view.features[id].dtype == view.logits[id].dtype == torch.float16
            torch.testing.assert_close(view.features[id].float(), features.float(), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(view.logits[id].float(), logits.float(), rtol=2e-2, atol=2e-2)
            shuffled = features.roll(1, 0).float()
            assert not torch.allclose(view.features[id].float(), shuffled, rtol=2e-2, atol=2e-2)


def test_small_copies_lie_on_a_plain_background(tiny_pool: ModelPool, tiny_bank: TaskBank, store: Store) -> None:
    def corners(scales: tuple[float, float]) -> torch.Tensor:
        settings = ViewSettings(copies=1, blends=1, scales=scales, shift=0)
        (view,) = view_bank(tiny_pool, tiny_bank, GROUPS[:1], SPEC, settings, store)
        count = len(view.images) // 3
        background = commonest(view.images[:count])
        assert (view.images[:count, 0, 0, 0] != background).any(), "recovered images fill their frame"
        return view.images[count:, 0, 0, 0] == background

    assert corners((0.5, 0.5)).all()
    assert not corners((1.0, 1.0)).all()


def test_neither_copies_nor_blends(tiny_pool: ModelPool, tiny_bank: TaskBank, store: Store) -> None:
    (view,) = view_bank(tiny_pool, tiny_bank, GROUPS[:1], SPEC, ViewSettings(copies=0, blends=0), store)
    assert len(view.images) == sum(len(tiny_bank[id].labels) for id in GROUPS[0])
    assert view.labels.min() == 0


def test_images_have_the_student_s_size(tiny_pool: ModelPool, tiny_bank: TaskBank, store: Store) -> None:
    spec = cases.input_spec((3, 20, 28))
    (view,) = view_bank(tiny_pool, tiny_bank, GROUPS[1:], spec, ViewSettings(copies=1, blends=0), store)
    assert tuple(view.images.shape[1:]) == (3, 20, 28)
    assert all(len(features) == len(view.images) for features in view.features.values())


def test_a_second_call_runs_no_model(
    views: list[Views], tiny_bank: TaskBank, store: Store, tiny_pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pool: ModelPool, id: str) -> None:
        raise AssertionError(f"{id} was opened")

    monkeypatch.setattr(ModelPool, "get", refuse)
    again = view_bank(tiny_pool, tiny_bank, GROUPS, SPEC, ViewSettings(copies=2, blends=1), store)
    for view, other in zip(views, again):
        torch.testing.assert_close(vars(other), vars(view), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="was opened"):
        view_bank(tiny_pool, tiny_bank, GROUPS, SPEC, ViewSettings(copies=2, blends=1, seed=1), store)


def test_settings_and_groups_make_other_views(
    views: list[Views], tiny_pool: ModelPool, tiny_bank: TaskBank, store: Store
) -> None:
    seeded = view_bank(tiny_pool, tiny_bank, GROUPS, SPEC, ViewSettings(copies=2, blends=1, seed=1), store)
    assert torch.equal(seeded[0].images[:24], views[0].images[:24])
    assert not torch.equal(seeded[0].images, views[0].images)
    regrouped = view_bank(tiny_pool, tiny_bank, [["d-conv4", "a-conv4"]], SPEC, ViewSettings(), store)
    assert list(regrouped[0].features) == ["d-conv4", "a-conv4"]
    assert len(regrouped[0].images) != len(views[0].images)


def test_a_model_in_two_groups_looks_at_the_images_of_each(
    tiny_pool: ModelPool, tiny_bank: TaskBank, store: Store
) -> None:
    groups = [["a-conv4", "b-resnet10"], ["a-conv4", "d-conv4"]]
    first, second = view_bank(tiny_pool, tiny_bank, groups, SPEC, ViewSettings(copies=0, blends=0), store)
    assert len(first.features["a-conv4"]) == len(first.images) == 20
    assert len(second.features["a-conv4"]) == len(second.images) == 28


def test_a_large_pool_shows_a_part_of_its_images(tiny_pool: ModelPool, tiny_bank: TaskBank, store: Store) -> None:
    ids = list(tiny_bank)
    settings = ViewSettings(copies=1, blends=2, most=45)
    view = view_bank(tiny_pool, tiny_bank, [ids], SPEC, settings, store)[0]
    assert len(view.images) == 44, "11 originals, as many copies, twice as many blends"
    every = [
        (owner, label.item(), image)
        for owner, id in enumerate(ids)
        for label, image in zip(tiny_bank[id].labels, fit_bytes(tiny_bank[id].images, SPEC))
    ]
    for image, owner, label in zip(view.images[:11], view.owner[:11], view.labels[:11]):
        assert any(torch.equal(image, i) and owner == o and label == n for o, n, i in every)
    assert {len(feature) for feature in view.features.values()} == {44}
    assert len(view.owner[:11].unique()) > 1, "drawn from all models, not the first ones"
    enough = ViewSettings(copies=1, blends=2, most=4 * len(every))
    assert len(view_bank(tiny_pool, tiny_bank, [ids], SPEC, enough, store)[0].images) == 4 * len(every)
