"""Transforms: what is done to the images before the teacher sees them.

A transform's random numbers are drawn beforehand and passed in as tensors, so one compiled or captured function serves
every step: `apply(images, *sample(images.shape, random))`.
All transforms are differentiable. Transforms that only move pixels move the gradients back in the same way, without
sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from dfcompress.data.pool import near

Drawn = tuple[Tensor, ...]


def _nothing(shape: Sequence[int], random: torch.Generator) -> Drawn:
    return ()


@dataclass(frozen=True)
class Transform:
    """`apply` maps images `(N, C, H, W)` and the random numbers that `sample` drew for their shape to the images the
    teacher sees.

    A transform may show each image several times, one whole copy of the batch after the other, and divide height and
    width by a whole number, `downscale`.
    """

    apply: Callable[..., Tensor]
    sample: Callable[[Sequence[int], torch.Generator], Drawn] = _nothing
    downscale: int = 1


def random_roll(pixels: int) -> Transform:
    """Roll the whole batch by one offset in ±`pixels` along each axis (the published jitter)."""

    def sample(shape: Sequence[int], random: torch.Generator) -> Drawn:
        return (torch.randint(-pixels, pixels + 1, (2,), generator=random),)

    def apply(images: Tensor, offset: Tensor) -> Tensor:
        rolled: Tensor = _Reorder.apply(images, _rolled(images, offset), _rolled(images, -offset))
        return rolled

    return Transform(apply, sample)


def random_flip(probability: float = 0.5) -> Transform:
    """Mirror the whole batch left-right with `probability`."""

    def sample(shape: Sequence[int], random: torch.Generator) -> Drawn:
        return (torch.rand((), generator=random) < probability,)

    def apply(images: Tensor, mirrored: Tensor) -> Tensor:
        order = _mirrored(images, mirrored)
        flipped: Tensor = _Reorder.apply(images, order, order)
        return flipped

    return Transform(apply, sample)


def jitters(pixels: int, *, flip: bool = False, crop: float = 1.0, cutout: float = 0.0) -> list[Transform]:
    """The published jitter of ±`pixels`; with `flip`, the batch is mirrored half of the time; with `crop` below 1 or a
    `cutout`, each image is cropped, mirrored and cut out of on its own.
    """
    transforms = [random_roll(pixels)]
    if flip:
        transforms.append(random_flip())
    if crop < 1 or cutout:
        transforms.append(random_crops(1, smallest=crop, cutout=cutout, mirror=flip))
    return transforms


def augmentations(copies: int, *, crop: float, cutout: float, jitter: int = 0, flip: bool = True) -> list[Transform]:
    """In-batch augmentation (`random_crops`), after the published jitter if `jitter` is above 0. Images that are
    neither repeated nor cropped nor cut out of are mirrored all together, which needs no resampling. Without `flip`, no
    image is mirrored.
    """
    if copies == 1 and crop == 1 and not cutout:
        return jitters(jitter, flip=flip)
    rolled = [random_roll(jitter)] if jitter else []
    return [*rolled, random_crops(copies, smallest=crop, cutout=cutout, mirror=flip)]


def downscale(factor: int) -> Transform:
    """Show the images after `factor` × `factor` average pooling; a factor of 1 leaves them unchanged."""
    return Transform(lambda images: F.avg_pool2d(images, factor) if factor > 1 else images, downscale=factor)


def random_crops(copies: int = 4, *, smallest: float = 0.75, cutout: float = 0.25, mirror: bool = True) -> Transform:
    """In-batch augmentation: each image `copies` times; each copy is cropped and resized back, mirrored half of the
    time if `mirror`, and has a square cut out (Haroush 2020, section 3; the sizes are not stated there and are ours).

    The side of a crop is drawn from [`smallest`, 1] of the image's side, its position uniformly. The cut-out square has
    `cutout` of the side, is centred anywhere in the image and filled with 0, the mean of the data in normalised space.
    """

    def sample(shape: Sequence[int], random: torch.Generator) -> Drawn:
        count = copies * shape[0]
        side = smallest + (1 - smallest) * torch.rand(count, 1, generator=random)
        corner = (1 - side) * torch.rand(count, 2, generator=random)
        mirrored = (torch.rand(count, generator=random) < (0.5 if mirror else 0.0)).float()
        centre = torch.rand(count, 2, generator=random)
        return side, corner, mirrored, centre

    def apply(images: Tensor, side: Tensor, corner: Tensor, mirrored: Tensor, centre: Tensor) -> Tensor:
        height, width = images.shape[2:]
        rows = _resampling(height, side[:, 0], corner[:, 0], torch.zeros_like(mirrored))
        columns = _resampling(width, side[:, 0], corner[:, 1], mirrored)
        crops = torch.einsum("nih,nchw,njw->ncij", rows, images.repeat(copies, 1, 1, 1), columns)
        kept_rows = (~near(height, centre[:, 0], cutout)).float()
        kept_columns = (~near(width, centre[:, 1], cutout)).float()
        return crops * torch.maximum(kept_rows[:, None, :, None], kept_columns[:, None, None, :])

    return Transform(apply, sample)


def random_shifts(pixels: int, *, mirror: bool = True) -> Transform:
    """Each image moved by a whole number in ±`pixels` along each axis, and mirrored half of the time if `mirror`;
    pixels from outside are 0, the mean of the data in normalised space.
    """

    def sample(shape: Sequence[int], random: torch.Generator) -> Drawn:
        offsets = torch.randint(-pixels, pixels + 1, (shape[0], 2), generator=random)
        mirrored = (torch.rand(shape[0], generator=random) < (0.5 if mirror else 0.0)).float()
        return offsets, mirrored

    def apply(images: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
        height, width = images.shape[2:]
        rows = _moving(height, offsets[:, 0], torch.zeros_like(mirrored))
        columns = _moving(width, offsets[:, 1], mirrored)
        return torch.einsum("nih,nchw,njw->ncij", rows, images, columns)

    return Transform(apply, sample)


def views(*transforms: Transform) -> Transform:
    """Show every image once by each transform: one whole copy of the batch per transform."""
    counts = [len(transform.sample((1, 1, 1, 1), torch.Generator())) for transform in transforms]

    def sample(shape: Sequence[int], random: torch.Generator) -> Drawn:
        return tuple(numbers for transform in transforms for numbers in transform.sample(shape, random))

    def apply(images: Tensor, *drawn: Tensor) -> Tensor:
        shown, start = [], 0
        for transform, count in zip(transforms, counts, strict=True):
            shown.append(transform.apply(images, *drawn[start : start + count]))
            start += count
        return torch.cat(shown)

    return Transform(apply, sample)


def _moving(pixels: int, offset: Tensor, mirrored: Tensor) -> Tensor:
    """Matrices `(N, pixels, pixels)` that move a line of pixels by whole numbers and mirror it."""
    place = torch.arange(pixels, device=offset.device)
    source = torch.where(mirrored[:, None] > 0, pixels - 1 - place, place) + offset[:, None]
    return (source[:, :, None] == place).float()


def _resampling(pixels: int, side: Tensor, start: Tensor, mirrored: Tensor) -> Tensor:
    """Matrices `(N, pixels, pixels)` that sample [start, start + side] of a line of pixels, linearly interpolated."""
    place = (torch.arange(pixels, device=side.device) + 0.5) / pixels
    place = torch.where(mirrored[:, None] > 0, 1 - place, place)
    source = ((start[:, None] + side[:, None] * place) * pixels - 0.5).clamp(0, pixels - 1)
    return (1 - (source[:, :, None] - torch.arange(pixels, device=side.device)).abs()).clamp_min(0)


def _rolled(images: Tensor, offset: Tensor) -> Tensor:
    """The source `(H·W,)` of each pixel after images `(N, C, H, W)` are rolled down and right by `offset` `(2,)`."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - offset[0]) % height
    columns = (torch.arange(width, device=images.device) - offset[1]) % width
    return (width * rows[:, None] + columns).flatten()


def _mirrored(images: Tensor, mirrored: Tensor) -> Tensor:
    """The source `(H·W,)` of each pixel after images are mirrored left-right if `mirrored` `()`."""
    height, width = images.shape[2:]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored, width - 1 - columns, columns)
    return (width * torch.arange(height, device=images.device)[:, None] + columns).flatten()


class _Reorder(torch.autograd.Function):
    """Pixels in another order, given by the source places `(H·W,)`; the gradient takes the inverse order.

    The orders are computed on the device: at 224 px the two orders of a roll are 800 KB, and a copy of that size from
    the host waits for the device in every step. `gather` with one order for all images is faster on a CPU than indexing
    rows and columns.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _reordered(images, order)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _reordered(gradients[0], inverse), None, None


def _reordered(images: Tensor, order: Tensor) -> Tensor:
    places = images.flatten(2)
    return places.gather(2, order.expand_as(places)).view(images.shape)
