"""`ImagePool`: all images of a set on the device, drawn and augmented there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dfcompress.data.synthetic_set import as_float
from dfcompress.randomness import generator, seed_of


@dataclass(frozen=True)
class Augmentation:
    """What training does to images: `shift` moves each by up to that many pixels (its edge repeated), `flip` mirrors
    half of them, `mixup` > 0 blends each with another one by a share from Beta(`mixup`, `mixup`), one share a batch.
    """

    shift: int = 0
    flip: bool = False
    mixup: float = 0.0


class ImagePool:
    """Endless batches out of stored images; the batch of a step is a pure function of (seed, step).

    `images` `(N, C, H, W)` are uint8, or float16 in units of [0, 1], on any device, where the batches come out too.
    Every image is drawn once an epoch. A batch is never larger than the pool.
    """

    def __init__(self, images: Tensor, augmentation: Augmentation, *, batch_size: int, seed: int = 0) -> None:
        self.images, self.augmentation, self.seed = images, augmentation, seed
        self.batch_size = min(batch_size, len(images))

    def batch(self, step: int) -> Tensor:
        """Float images `(batch_size, C, H, W)` in units of [0, 1]: those of `step`, counted from 0."""
        random = generator("augment", self.seed, step)
        images = as_float(self.images[self._drawn(step).to(self.images.device)])
        if self.augmentation.shift:
            images = shifted(images, random_offsets(len(images), self.augmentation.shift, random))
        if self.augmentation.flip:
            images = flipped(images, torch.rand(len(images), generator=random) < 0.5)
        if self.augmentation.mixup:
            images = mixed(images, self._share(step), torch.randperm(len(images), generator=random))
        return images

    def _drawn(self, step: int) -> Tensor:
        epoch, position = divmod(step, len(self.images) // self.batch_size)
        order = torch.randperm(len(self.images), generator=generator("epoch", self.seed, epoch))
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def _share(self, step: int) -> float:
        alpha = self.augmentation.mixup
        return float(np.random.default_rng(seed_of("mixup", self.seed, step)).beta(alpha, alpha))


def random_offsets(count: int, shift: int, random: torch.Generator) -> Tensor:
    """Pixels to move each image down and right by, `(count, 2)`, each in ±`shift`."""
    return torch.randint(-shift, shift + 1, (count, 2), generator=random)


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Each image `(N, C, H, W)` moved by its own `(down, right)` pixels, its edge repeated, in one gather."""
    count, _, height, width = images.shape
    offsets = offsets.to(images.device)
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)
    image = torch.arange(count, device=images.device)
    return images.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flipped(images: Tensor, which: Tensor) -> Tensor:
    """The images `(N, C, H, W)` that `which` `(N,)` marks, mirrored left-right."""
    return torch.where(which.to(images.device)[:, None, None, None], images.flip(3), images)


def mixed(images: Tensor, share: float, partners: Tensor) -> Tensor:
    """`share` of each image plus the rest of its partner (Zhang et al. 2018), inputs only."""
    return share * images + (1 - share) * images[partners.to(images.device)]
