"""Episodes: which images, drawn how."""

import cases
import pytest
import torch

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages, to_float
from metapool.episodes import Episodes, draw_classes, draw_episodes, sample_episodes


def images_with(counts: list[int]) -> LabelledImages:
    """Class k has counts[k] images, in shuffled order."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return LabelledImages(
        torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels, tuple(f"c{k}" for k in range(len(counts)))
    )


IMAGES = images_with([20, 21, 22, 23, 24, 25, 26])


@pytest.mark.parametrize(("way", "shot", "query"), [(5, 1, 15), (5, 5, 15), (2, 3, 1), (7, 1, 1)])
def test_shapes_and_labels(way: int, shot: int, query: int) -> None:
    episodes = sample_episodes(IMAGES, way, shot, query, 11, seed=0)
    assert episodes.support.shape == (11, way, shot)
    assert episodes.query.shape == (11, way, query)
    assert (len(episodes), episodes.way, episodes.shot) == (11, way, shot)
    assert episodes.support_labels.tolist() == [label for label in range(way) for _ in range(shot)]
    assert episodes.query_labels.tolist() == [label for label in range(way) for _ in range(query)]


def test_each_row_is_one_class_classes_differ_and_no_image_stands_twice() -> None:
    episodes = sample_episodes(IMAGES, 5, 5, 15, 50, seed=0)
    for support, query in zip(episodes.support, episodes.query):
        together = torch.cat([support, query], 1)
        labels = IMAGES.labels[together]
        assert all(len(set(row.tolist())) == 1 for row in labels)
        assert len(set(labels[:, 0].tolist())) == 5
        assert len(set(together.flatten().tolist())) == together.numel()


def test_queries_do_not_depend_on_the_number_of_shots() -> None:
    one, five = (sample_episodes(IMAGES, 5, shot, 15, 30, seed=3) for shot in (1, 5))
    torch.testing.assert_close(one.query, five.query, rtol=0, atol=0)
    torch.testing.assert_close(one.support, five.support[:, :, :1], rtol=0, atol=0)
    assert one.digest() != five.digest()


def test_same_seed_same_episodes_and_fewer_are_the_first_of_more() -> None:
    few, many, other = (sample_episodes(IMAGES, 5, 1, 5, n, seed) for n, seed in ((10, 0), (30, 0), (10, 1)))
    torch.testing.assert_close(few.support, many.support[:10], rtol=0, atol=0)
    torch.testing.assert_close(few.query, many.query[:10], rtol=0, atol=0)
    assert few.digest() == sample_episodes(IMAGES, 5, 1, 5, 10, 0).digest()
    assert few.digest() != other.digest()


def test_the_global_seed_decides_nothing() -> None:
    torch.manual_seed(1)
    first = sample_episodes(IMAGES, 5, 1, 5, 10, 0)
    torch.manual_seed(2)
    assert sample_episodes(IMAGES, 5, 1, 5, 10, 0).digest() == first.digest()


def test_every_class_and_image_is_drawn_about_equally_often() -> None:
    episodes = sample_episodes(images_with([10] * 6), 3, 1, 4, 600, seed=0)
    drawn = torch.bincount(torch.cat([episodes.support, episodes.query], 2).flatten(), minlength=60)
    # 600 episodes × 3 classes × 5 images over 60 images: 150 each, binomial deviation about 8.
    assert drawn.min() > 110
    assert drawn.max() < 190


def test_classes_with_too_few_images_are_left_out() -> None:
    data = images_with([3, 10, 10, 4, 10])
    episodes = sample_episodes(data, 3, 1, 5, 40, seed=0)
    assert set(data.labels[episodes.query].flatten().tolist()) == {1, 2, 4}
    all_used = sample_episodes(data, 3, 1, 2, 40, seed=0)
    assert set(data.labels[all_used.query].flatten().tolist()) == {0, 1, 2, 3, 4}


def test_too_few_classes_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(MetapoolError, match=r"5-way 5-shot .* 15 queries need 5 classes of 20 images; 3 of 4 classes"):
        sample_episodes(images_with([20, 20, 20, 19]), 5, 5, 15, 10, seed=0)
    assert len(sample_episodes(images_with([20, 20, 20, 19]), 3, 5, 15, 10, seed=0)) == 10


def test_digest_sees_support_and_query() -> None:
    support, query = torch.tensor([[[0], [1]]]), torch.tensor([[[2], [3]]])
    digests = {
        Episodes(support, query).digest(),
        Episodes(query, support).digest(),
        Episodes(support, query + 1).digest(),
    }
    assert len(digests) == 3


# Training draws -------------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_training_draw_is_class_major_without_replacement() -> None:
    rows, chosen = draw_classes(IMAGES.labels, 7, 5, 6, seeded())
    assert len(set(chosen.tolist())) == 5
    assert IMAGES.labels[rows].tolist() == chosen.repeat_interleave(6).tolist()
    assert len(set(rows.tolist())) == 30
    again, other = (draw_classes(IMAGES.labels, 7, 5, 6, seeded(seed))[0] for seed in (0, 1))
    torch.testing.assert_close(again, rows, rtol=0, atol=0)
    assert not torch.equal(other, rows)


def test_a_training_draw_takes_what_there_is() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1])
    rows, chosen = draw_classes(labels, 2, 5, 7, seeded())
    assert sorted(chosen.tolist()) == [0, 1], "all classes when there are fewer than asked for"
    for label, part in zip(chosen, rows.view(2, 7)):
        assert (labels[part] == label).all()
        counts = torch.bincount(part)[labels[: part.max() + 1] == label]
        assert counts.max() - counts.min() <= 1, "every image once before any a second time"


def test_training_episodes_are_class_major_and_normalised() -> None:
    images = cases.toy_images(classes=4, per_class=6, shape=(1, 16, 16), seed=0)
    input = cases.input_spec((1, 16, 16))
    seen, labels = draw_episodes(images, input, 3, 4, 5, torch.Generator().manual_seed(0))
    assert tuple(seen.shape) == (5, 12, 1, 16, 16)
    assert labels.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 5
    known = input.prepare(to_float(images.images)).flatten(1)
    for episode in seen.flatten(2):
        rows = [torch.where((known == image).all(1))[0][0] for image in episode]
        owners = images.labels[torch.stack(rows)].view(3, 4)
        assert (owners == owners[:, :1]).all(), "a class of an episode is one class"
        assert len(owners[:, 0].unique()) == 3
    again = draw_episodes(images, input, 3, 4, 5, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(again, seen, rtol=0, atol=0)
    assert not torch.equal(draw_episodes(images, input, 3, 4, 5, torch.Generator().manual_seed(1))[0], seen)
    assert draw_episodes(images, input, 9, 4, 1, torch.Generator())[1].max() == 3, "all classes when there are fewer"
