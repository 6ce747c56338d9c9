"""The pool: batches as a pure function of the step, and augmentations that do what they say."""

from __future__ import annotations

import torch

from dfcompress.data.pool import Augmentation, ImagePool, flipped, mixed, shifted


def numbered(count):
    """Images whose pixels all carry their own number."""
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def numbers(batch):
    return (batch[:, 0, 0, 0] * 255).round().long().tolist()


def test_the_batch_of_a_step_depends_on_seed_and_step_alone():
    augmentation = Augmentation(shift=2, flip=True, mixup=1.0)
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pool = ImagePool(images, augmentation=augmentation, batch_size=8, seed=5)
    later = pool.batch(7)
    pool.batch(0)
    assert torch.equal(pool.batch(7), later)
    assert torch.equal(ImagePool(images, augmentation=augmentation, batch_size=8, seed=5).batch(7), later)
    assert not torch.equal(ImagePool(images, augmentation=augmentation, batch_size=8, seed=6).batch(7), later)


def test_every_image_is_drawn_once_an_epoch():
    pool = ImagePool(numbered(12), augmentation=Augmentation(), batch_size=4)
    epochs = [[n for step in range(3) for n in numbers(pool.batch(3 * epoch + step))] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_a_batch_is_never_larger_than_the_pool():
    assert len(ImagePool(numbered(5), augmentation=Augmentation(), batch_size=64).batch(3)) == 5


def test_stored_bytes_become_shares_of_one():
    images = torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)
    assert ImagePool(images, augmentation=Augmentation(), batch_size=2).batch(0).max().item() == 1.0


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
