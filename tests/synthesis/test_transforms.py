"""Views move pixels as they say, and carry gradients back: ⟨view(x), y⟩ = ⟨x, ∂⟨view(x), y⟩/∂x⟩ for linear ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dfcompress.randomness import generator
from dfcompress.synthesis.transforms import (
    augmentations,
    downscale,
    jitters,
    random_crops,
    random_flip,
    random_roll,
    random_shifts,
    views,
)


def seen(transform, images, *key):
    return transform.apply(images, *transform.sample(images.shape, generator("test", *key)))


@pytest.mark.parametrize(
    "transform",
    [
        random_shifts(2),
        views(random_shifts(1), random_crops(1)),
        random_roll(2),
        random_flip(1.0),
        random_flip(0.0),
        downscale(2),
        downscale(1),
        random_crops(3),
    ],
)
@pytest.mark.parametrize("step", range(3))
def test_gradients_go_back_through_every_view(transform, step):
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(step), requires_grad=True)
    y = seen(transform, x, step)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(step + 10))
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert (y * weights).sum().item() == pytest.approx((x * gradient).sum().item(), rel=1e-4, abs=1e-4)


def test_a_roll_moves_the_whole_batch_by_one_offset_within_its_bound():
    image = torch.zeros(2, 1, 9, 9)
    image[:, :, 4, 4] = 1
    offsets = set()
    for step in range(60):
        rolled = seen(random_roll(2), image, step)
        first, second = (rolled[i, 0].nonzero()[0] - 4 for i in (0, 1))
        assert torch.equal(first, second)
        offsets.add(tuple(first.tolist()))
    assert {down for down, _ in offsets} == {right for _, right in offsets} == {-2, -1, 0, 1, 2}


def test_a_roll_is_the_published_one():
    image = torch.randn(1, 3, 5, 7)
    down, right = torch.randint(-2, 3, (2,), generator=generator("test", 4)).tolist()
    assert torch.equal(seen(random_roll(2), image, 4), image.roll((down, right), (2, 3)))


def test_a_flip_mirrors_left_and_right():
    image = torch.arange(4.0).view(1, 1, 1, 4)
    assert seen(random_flip(1.0), image).flatten().tolist() == [3.0, 2.0, 1.0, 0.0]


def test_downscaling_is_average_pooling():
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(seen(downscale(2), image), F.avg_pool2d(image, 2))


def test_crops_of_the_whole_image_without_a_hole_are_the_image_or_its_mirror():
    image = torch.randn(3, 2, 6, 6)
    shown = seen(random_crops(4, smallest=1.0, cutout=0.0), image).view(4, 3, 2, 6, 6)
    for copy in shown:
        for got, original in zip(copy, image, strict=True):
            assert torch.allclose(got, original, atol=1e-5) or torch.allclose(got, original.flip(2), atol=1e-5)


@pytest.mark.parametrize("flip", [True, False])
def test_augmentations_mirror_only_where_they_are_asked_to(flip):
    image = torch.arange(6.0).expand(20, 1, 6, 6)
    (crops,) = augmentations(2, crop=1.0, cutout=0.0, flip=flip)
    (_, *mirrors) = augmentations(1, crop=1.0, cutout=0.0, jitter=1, flip=flip)
    mirrored = seen(crops, image)[:, 0, 0, 0] > 3
    assert mirrored.any() == flip
    assert bool(mirrors) == flip


def test_crops_stay_inside_the_image():
    """A ramp from 0 to 1 keeps its range, and a crop of it spans as much of it as the crop is wide."""
    ramp = torch.linspace(0, 1, 32).expand(8, 1, 32, 32)
    shown = seen(random_crops(4, smallest=0.5, cutout=0.0), ramp)
    assert shown.min() >= 0
    assert shown.max() <= 1 + 1e-6
    span = shown.amax((1, 2, 3)) - shown.amin((1, 2, 3))
    assert 0.4 < span.min() < 0.6
    assert span.max() > 0.85


def test_a_square_is_cut_out_of_every_copy():
    shown = seen(random_crops(2, smallest=1.0, cutout=0.25), torch.ones(50, 1, 32, 32))
    holes = (shown == 0).flatten(1).sum(1)
    assert holes.max() == 8 * 8
    assert holes.min() >= 4 * 4


def test_a_roll_and_a_flip_hand_over_a_few_bytes_whatever_the_size():
    """Each step copies them to the device, and a copy of more than 64 KB waits for it."""
    drawn = [
        each for transform in jitters(30, flip=True) for each in transform.sample((152, 3, 224, 224), generator("test"))
    ]
    assert sum(each.nbytes for each in drawn) < 100


def test_views_show_every_image_by_each_transform_one_copy_after_the_other():
    images = torch.randn(3, 2, 6, 6)
    moved, cropped = random_shifts(2), random_crops(1, smallest=0.5, cutout=0.0)
    numbers = moved.sample(images.shape, generator("view", 0)), cropped.sample(images.shape, generator("view", 1))
    shown = views(moved, cropped).apply(images, *numbers[0], *numbers[1])
    assert torch.equal(shown, torch.cat([moved.apply(images, *numbers[0]), cropped.apply(images, *numbers[1])]))


def test_a_shift_moves_each_image_by_whole_pixels_and_mirrors_it_before_if_drawn():
    images = torch.arange(32.0).view(2, 1, 4, 4)
    shown = random_shifts(2).apply(images, torch.tensor([[1, -1], [0, 0]]), torch.tensor([0.0, 1.0]))
    expected = torch.zeros(4, 4)
    expected[:3, 1:] = images[0, 0, 1:, :3]
    assert torch.equal(shown[0, 0], expected)
    assert torch.equal(shown[1, 0], images[1, 0].flip(1))
