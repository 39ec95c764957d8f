"""Input specs, conversions and augmentations of images."""

import cases
import pytest
import torch

from metapool.base.errors import MetapoolError
from metapool.base.images import (
    InputSpec,
    LabelledImages,
    augment,
    commonest,
    convert_channels,
    digest_of_tensor,
    place,
    shift,
    to_bytes,
    to_float,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# InputSpec ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5, 0.5)}, "3 numbers each"),
        ({"std": (0.5,)}, "3 numbers each"),
        ({"std": (0.5, 0.0, 0.5)}, "positive"),
        ({"std": (0.5, -1.0, 0.5)}, "positive"),
        ({"channels": 0}, "channels"),
        ({"height": 0}, "height"),
        ({"width": 5000}, "width"),
        ({"depth": 3}, "depth"),
    ],
)
def test_impossible_input_spec_is_refused(change: dict[str, object], message: str) -> None:
    good = {"channels": 3, "height": 8, "width": 6, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    assert InputSpec.model_validate(good).shape == (3, 8, 6)
    with pytest.raises(ValueError, match=message):
        InputSpec.model_validate(good | change)


def test_prepare_normalises_each_channel_by_its_own_numbers() -> None:
    spec = InputSpec(channels=2, height=3, width=4, mean=(0.5, 0.25), std=(0.5, 0.1))
    images = torch.rand(5, 2, 3, 4, dtype=torch.float64)
    prepared = spec.prepare(images)
    torch.testing.assert_close(prepared[:, 0], (images[:, 0] - 0.5) / 0.5)
    torch.testing.assert_close(prepared[:, 1], (images[:, 1] - 0.25) / 0.1)
    assert not torch.equal(prepared, images)


@pytest.mark.parametrize("present", [(1, 16, 16), (3, 16, 16), (1, 40, 9), (3, 5, 50), (4, 16, 16)])
@pytest.mark.parametrize("wanted", [(1, 16, 16), (1, 20, 28)])
def test_fit_takes_any_size_and_channels(present: cases.Shape, wanted: cases.Shape) -> None:
    images = torch.rand(2, *present)
    fitted = cases.input_spec(wanted).fit(images)
    assert tuple(fitted.shape) == (2, *wanted)
    assert fitted.min() >= 0
    assert fitted.max() <= 1 + 1e-6


def test_fit_leaves_what_fits_alone_and_keeps_a_constant_image_constant() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert cases.input_spec((3, 8, 8)).fit(images) is images
    grey = torch.full((1, 1, 7, 9), 0.3)
    torch.testing.assert_close(cases.input_spec((3, 16, 16)).fit(grey), torch.full((1, 3, 16, 16), 0.3))


# Channels and bytes ---------------------------------------------------------------------------------------------------


def test_grey_to_colour_and_back_is_the_same_grey() -> None:
    grey = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(convert_channels(convert_channels(grey, 3), 1), grey)


def test_colour_to_grey_is_luma_not_the_mean() -> None:
    colour = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    expected = 0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2]
    torch.testing.assert_close(convert_channels(colour, 1)[:, 0], expected)
    assert not torch.allclose(convert_channels(colour, 1)[:, 0], colour.mean(1))


def test_channels_that_cannot_be_converted_are_an_error() -> None:
    with pytest.raises(MetapoolError, match="2 channels into 3"):
        convert_channels(torch.rand(1, 2, 4, 4), 3)


def test_bytes_to_float_and_back_is_exact() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(to_bytes(to_float(every)), every, rtol=0, atol=0)


def test_bytes_are_rounded_not_cut_and_clamped() -> None:
    assert to_bytes(torch.tensor([-1.0, 0.0, 0.9 / 255, 254.6 / 255, 1.0, 7.0])).tolist() == [0, 0, 1, 255, 255, 255]


# Augmentations --------------------------------------------------------------------------------------------------------


def test_shift_moves_each_image_by_its_own_whole_offset_with_borders_repeated() -> None:
    images = torch.rand(20, 2, 9, 7)
    moved = shift(images, 2, seeded())
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    offsets = set()
    for image, candidate in zip(moved, padded):
        places = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(image, candidate[:, row : row + 9, column : column + 7])
        ]
        assert len(places) == 1
        offsets.add(places[0])
    assert len(offsets) > 5, "every image has an offset of its own"


def test_no_shift_is_the_identity_and_draws_nothing() -> None:
    images, generator = torch.rand(3, 1, 5, 5), seeded()
    state = generator.get_state()
    assert shift(images, 0, generator) is images
    assert torch.equal(generator.get_state(), state)


def test_shift_is_differentiable() -> None:
    images = torch.rand(3, 1, 5, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: shift(x, 1, seeded()), images)


def test_augment_without_zoom_and_shift_is_the_identity() -> None:
    images = torch.rand(3, 2, 8, 6)
    torch.testing.assert_close(augment(images, 0, 0.0, seeded()), images)
    assert not torch.allclose(augment(images, 2, 0.2, seeded()), images)


def test_augment_stays_in_range_repeats_by_seed_and_treats_images_apart() -> None:
    images = torch.rand(1, 1, 8, 8).expand(6, -1, -1, -1)
    first = augment(images, 2, 0.3, seeded(1))
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
    torch.testing.assert_close(augment(images, 2, 0.3, seeded(1)), first, rtol=0, atol=0)
    assert not torch.allclose(augment(images, 2, 0.3, seeded(2)), first)
    assert len({digest_of_tensor(image) for image in first}) == 6


def test_augment_moves_by_at_most_the_pixels_asked_for() -> None:
    ramp = torch.arange(32.0).expand(50, 1, 32, 32)  # an image whose value is its column
    moved = augment(ramp, 3, 0.0, seeded()) - ramp
    inner = moved[..., 8:24].abs()
    assert inner.max() <= 3 + 1e-3
    assert inner.max() > 2


# LabelledImages -------------------------------------------------------------------------------------------------------


def test_select_relabels_in_the_order_given() -> None:
    data = cases.toy_images(4, 3, (1, 16, 16), seed=0)
    part = data.select([2, 0])
    assert part.classes == ("pattern-2", "pattern-0")
    assert part.labels.tolist() == [1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(part.images[part.labels == 0], data.images[data.labels == 2], rtol=0, atol=0)
    assert len(part) == 6


def test_digest_sees_images_labels_and_names() -> None:
    data = cases.toy_images(2, 2, (1, 16, 16), seed=0)
    changed = data.images.clone()
    changed[0, 0, 0, 0] ^= 1
    digests = {
        data.digest(),
        LabelledImages(changed, data.labels, data.classes).digest(),
        LabelledImages(data.images, data.labels.flip(0), data.classes).digest(),
        LabelledImages(data.images, data.labels, ("x", "y")).digest(),
    }
    assert len(digests) == 4
    copy = LabelledImages(data.images.clone(), data.labels.clone(), data.classes)
    assert copy.digest() == data.digest()


def test_tensor_digest_sees_type_and_shape_not_strides() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert digest_of_tensor(tensor) == digest_of_tensor(tensor.T.contiguous().T)
    others = [tensor.view(3, 2), tensor.double(), tensor.to(torch.int32), tensor + 1]
    assert len({digest_of_tensor(value) for value in [tensor, *others]}) == 5


def test_place_at_full_size_is_the_identity() -> None:
    images, white = torch.rand(3, 2, 9, 7, generator=seeded()), torch.ones(2)
    torch.testing.assert_close(place(images, (1.0, 1.0), 0, white, seeded()), images)
    assert not torch.allclose(place(images, (0.5, 1.0), 0, white, seeded()), images)


def test_place_keeps_the_picture_and_surrounds_it_by_the_background() -> None:
    """At half the size, ink is a quarter: mean differences from the background scale with the area."""
    images, background = 0.5 * torch.rand(4, 2, 32, 32, generator=seeded()), torch.tensor([1.0, 0.75])
    half = place(images, (0.5, 0.5), 0, background, seeded())
    behind = background.view(2, 1, 1)
    torch.testing.assert_close((half - behind).mean((2, 3)) * 4, (images - behind).mean((2, 3)))
    torch.testing.assert_close(half[..., :7, :], behind.expand(4, 2, 7, 32))
    assert not torch.allclose(half[..., 9:23, 9:23], behind.expand(4, 2, 14, 14))
    moved = place(images, (0.5, 0.5), 4, background, seeded())
    torch.testing.assert_close((moved - behind).mean((2, 3)) * 4, (images - behind).mean((2, 3)), rtol=0.02, atol=0)
    assert not torch.allclose(moved, half)


def test_place_draws_each_size_apart_and_repeats_by_seed() -> None:
    ink = torch.zeros(200, 1, 32, 32)
    first = place(ink, (0.4, 0.8), 0, torch.ones(1), seeded(3))
    side = (1 - first).mean((1, 2, 3)).sqrt()
    assert 0.38 < side.min() < 0.45
    assert 0.75 < side.max() < 0.82
    torch.testing.assert_close(place(ink, (0.4, 0.8), 0, torch.ones(1), seeded(3)), first, rtol=0, atol=0)
    assert not torch.allclose(place(ink, (0.4, 0.8), 0, torch.ones(1), seeded(4)), first)


def test_commonest_value_of_every_channel() -> None:
    images = torch.tensor([[[[7, 7], [9, 0]], [[1, 2], [3, 255]]], [[[7, 9], [9, 0]], [[255, 4], [5, 6]]]]).to(
        torch.uint8
    )
    assert commonest(images).tolist() == [7, 255]
    assert commonest(images).dtype == torch.uint8
