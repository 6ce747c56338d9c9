"""The pool: batches as a pure function of the step, and augmentations that do what they say."""

from __future__ import annotations

import pytest
import torch
from largest_float import LargestFloat

from dfcompress.data.batches import UNLABELLED, RepeatingSource
from dfcompress.data.pool import Augmentation, ImagePool, cut_out, flipped, jittered, mixed, shifted
from dfcompress.errors import BadInput


def numbered(count):
    """Images whose pixels all carry their own number."""
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def numbers(batch):
    return (batch.images[:, 0, 0, 0] * 255).round().long().tolist()


def test_the_batch_of_a_step_depends_on_seed_and_step_alone():
    augmentation = Augmentation(shift=2, flip=True, mixup=1.0)
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pool = ImagePool(images, augmentation=augmentation, batch_size=8, seed=5)
    later = pool.batch(7).images
    pool.batch(0)
    assert torch.equal(pool.batch(7).images, later)
    assert torch.equal(ImagePool(images, augmentation=augmentation, batch_size=8, seed=5).batch(7).images, later)
    assert not torch.equal(ImagePool(images, augmentation=augmentation, batch_size=8, seed=6).batch(7).images, later)


def test_every_image_is_drawn_once_an_epoch():
    pool = ImagePool(numbered(12), augmentation=Augmentation(), batch_size=4)
    epochs = [[n for step in range(3) for n in numbers(pool.batch(3 * epoch + step))] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_a_batch_is_never_larger_than_the_pool():
    assert len(ImagePool(numbered(5), augmentation=Augmentation(), batch_size=64).batch(3).images) == 5


def test_stored_bytes_become_shares_of_one():
    images = torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)
    assert ImagePool(images, augmentation=Augmentation(), batch_size=2).batch(0).images.max().item() == 1.0


def test_each_image_is_shifted_by_its_own_offset_and_its_edge_repeated():
    image = torch.tensor([[0.0, 1.0, 2.0]] * 3).expand(2, 1, 3, 3)
    right, left = shifted(image, torch.tensor([[0, 1], [0, -1]]))
    assert right[0, 0].tolist() == [0.0, 0.0, 1.0]
    assert left[0, 0].tolist() == [1.0, 2.0, 2.0]
    down = shifted(image.mT[:1], torch.tensor([[1, 0]]))
    assert down[0, 0, :, 0].tolist() == [0.0, 0.0, 1.0]


def test_only_the_marked_images_are_flipped():
    image = torch.tensor([[0.0, 1.0]]).expand(2, 1, 1, 2)
    assert flipped(image, torch.tensor([True, False]))[:, 0, 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_mixup_is_a_weighted_mean_with_the_partner():
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert mixed(images, 0.75, torch.tensor([1, 0])).flatten().tolist() == [0.25, 0.75]


def test_every_set_has_an_equal_share_of_each_batch():
    pool = ImagePool(numbered(12), 100 + numbered(5), augmentation=Augmentation(), batch_size=9)
    assert (pool.share, pool.batch_size) == (4, 8)
    for step in range(6):
        drawn = numbers(pool.batch(step))
        assert all(number < 12 for number in drawn[:4])
        assert all(100 <= number < 105 for number in drawn[4:])
    assert pool.batch(0).sources.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_labels_stay_beside_their_images_in_every_order():
    sets, labels = (numbered(12), 100 + numbered(5)), [10 * torch.arange(12), 10 * torch.arange(100, 105)]
    pool = ImagePool(*sets, labels=labels, augmentation=Augmentation(shift=1), batch_size=9)
    for step in range(4):
        batch = pool.batch(step)
        assert batch.labels.tolist() == [10 * number for number in numbers(batch)]
        assert batch.part(slice(1, None, 2)).labels.tolist() == batch.labels.tolist()[1::2]
    assert ImagePool(*sets, augmentation=Augmentation(), batch_size=8).batch(0).labels.tolist() == [UNLABELLED] * 8


def test_places_name_the_images_of_a_batch_among_the_repeated_ones():
    pool = ImagePool(numbered(12), 100 + numbered(5), augmentation=Augmentation(), batch_size=8)
    assert isinstance(pool, RepeatingSource)
    repeated = [number for batch in pool.repeated() for number in numbers(batch)]
    assert len(repeated) == pool.images == 17
    for step in range(4):
        assert [repeated[place] for place in pool.places(step)] == numbers(pool.batch(step))
    assert ImagePool(numbered(12), augmentation=Augmentation(shift=1), batch_size=8).repeated() is None


def test_only_the_images_of_a_batch_are_in_float():
    """A set of 224² stays the bytes it is stored as: nothing of the pool holds more floats than one batch has."""
    images = torch.zeros(64, 3, 224, 224, dtype=torch.uint8)
    pool = ImagePool(images, augmentation=Augmentation(shift=4, flip=True, mixup=1.0), batch_size=4)
    with LargestFloat() as seen:
        pool.batch(0)
    assert pool.sets[0].data_ptr() == images.data_ptr(), "nothing was copied"
    assert 0 < seen.elements <= 4 * 3 * 224 * 224


def test_images_are_mixed_within_their_own_set():
    pool = ImagePool(numbered(4), 200 + numbered(4), augmentation=Augmentation(mixup=1.0), batch_size=8)
    drawn = numbers(pool.batch(3))
    assert max(drawn[:4]) <= 3
    assert min(drawn[4:]) >= 200


def test_cutout_sets_a_square_to_the_images_own_mean():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 0, 0] = 0.64
    cut = cut_out(image, 0.5, torch.tensor([[0.75, 0.75]]))
    assert cut[0, 0, 4:, 4:].unique().item() == pytest.approx(0.01)
    assert torch.equal(cut[0, 0, :4], image[0, 0, :4])


def test_jitter_changes_brightness_and_contrast_about_the_mean():
    image = torch.tensor([0.25, 0.75]).view(1, 1, 1, 2)
    assert jittered(image, torch.tensor([[0.1, 0.0]])).flatten().tolist() == pytest.approx([0.35, 0.85])
    assert jittered(image, torch.tensor([[0.0, 0.4]])).flatten().tolist() == pytest.approx([0.15, 0.85])
    assert jittered(image, torch.tensor([[0.5, 0.0]])).max().item() == 1.0


@pytest.mark.parametrize("wrong", [{"cutout": 1.0}, {"jitter": -0.1}, {"shift": -1}, {"mixup": -1.0}])
def test_augmentations_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput):
        Augmentation(**wrong)
