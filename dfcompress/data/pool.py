"""`ImagePool`: all images of one or several sets in their stored form on the device, drawn and augmented there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfcompress.arguments import require_fields
from dfcompress.data.batches import UNLABELLED, Batch
from dfcompress.data.synthetic_set import as_float
from dfcompress.errors import BadInput
from dfcompress.randomness import generator, seed_of


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to training images, drawn again for every image and step.

    `shift` moves an image by up to this number of pixels (the edge is repeated). `flip` mirrors half of the images.
    `jitter` changes brightness (added) and contrast (multiplied, around the image's mean) by up to ± this share.
    `cutout` sets a square, whose side is this share of the image's side and whose centre is anywhere, to the image's
    mean. `mixup` > 0 blends each image with another image of its set by a share from Beta(`mixup`, `mixup`), which is
    drawn once per batch and set. Raises `BadInput` if `jitter` or `cutout` is not in [0, 1), or a value is negative.
    """

    shift: int = 0
    flip: bool = False
    jitter: float = 0.0
    cutout: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        """Raise `BadInput` for a value that is not valid."""
        require_fields(self)
        if not 0 <= self.jitter < 1 or not 0 <= self.cutout < 1:
            raise BadInput(
                f"jitter and cutout must be shares below 1; they are {self.jitter} and {self.cutout}.",
                "Use for instance 0.3.",
            )
        if self.shift < 0 or self.mixup < 0:
            raise BadInput(f"shift {self.shift} or mixup {self.mixup} is negative.", "Use 0 to leave it out.")


class ImagePool:
    """A `BatchSource` of stored images; the batch of a step is a pure function of (seed, step), so it has no state.

    Each of `sets` `(N, C, H, W)`, one per teacher and all of one image shape, is uint8, or float16 in units of [0, 1];
    only the images of a batch are converted to float32. `labels` are the classes of each set's images, int64 `(N,)`, or
    None if they are unknown. A batch has the same number of images of each set, set after set, and not more than the
    smallest set has. An epoch of a set shows no image twice and leaves out images that do not fill a batch; each epoch
    has another order.
    """

    def __init__(
        self,
        *sets: Tensor,
        labels: Sequence[Tensor] | None = None,
        augmentation: Augmentation,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self.sets, self.augmentation, self.seed = sets, augmentation, seed
        self.labels = labels or [torch.full((len(images),), UNLABELLED) for images in sets]
        self.share = min(batch_size // len(sets), *map(len, sets))
        self.batch_size = self.share * len(sets)
        self._orders: dict[int, tuple[int, Tensor]] = {}  # By set, an epoch and the order of its images.
        self.to(sets[0].device)

    def to(self, device: torch.device) -> None:
        """Move the stored images, and so the batches, to `device`."""
        self.sets = tuple(images.to(device) for images in self.sets)
        self.labels = [labels.to(device) for labels in self.labels]

    def measured(self) -> dict[str, float]:
        """Nothing: stored images have no measurements."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a batch depends on the seed and the step alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def drawn(self, step: int) -> list[Tensor]:
        """For each set, the indices of its images in the batch of `step` (from 0)."""
        return [self._drawn(number, len(images), step) for number, images in enumerate(self.sets)]

    def places(self, step: int) -> Tensor:
        """The indices `(batch_size,)` of a batch's images among the images of all sets, set after set."""
        starts = accumulate(map(len, self.sets[:-1]), initial=0)
        drawn = zip(starts, self.drawn(step), strict=True)
        return torch.cat([start + chosen for start, chosen in drawn]).to(self.sets[0].device, non_blocking=True)

    def batch(self, step: int) -> Batch:
        """The augmented batch of `step`; an image that is mixed with another keeps its own label."""
        parts = []
        for number, (images, labels, drawn) in enumerate(zip(self.sets, self.labels, self.drawn(step), strict=True)):
            rows = drawn.to(images.device, non_blocking=True)
            shown = self._augmented(as_float(images[rows]), number, step)
            parts.append(_of_set(number, shown, labels[rows]))
        return parts[0] if len(parts) == 1 else Batch(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @property
    def images(self) -> int:
        """The number of images in all sets together."""
        return sum(map(len, self.sets))

    def repeated(self) -> Iterator[Batch] | None:
        """All images, set after set, in batches; None if there is any augmentation."""
        if self.augmentation != Augmentation():
            return None
        return (
            _of_set(number, as_float(some), named)
            for number, (images, labels) in enumerate(zip(self.sets, self.labels, strict=True))
            for some, named in zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)
        )

    def _augmented(self, images: Tensor, number: int, step: int) -> Tensor:
        random, change = generator("augment", *self._key(number, step)), self.augmentation
        if change.shift:
            images = shifted(images, random_offsets(len(images), change.shift, random))
        if change.flip:
            images = flipped(images, torch.rand(len(images), generator=random) < 0.5)
        if change.mixup:
            images = mixed(images, self._blend(number, step), torch.randperm(len(images), generator=random))
        if change.jitter:
            images = jittered(images, change.jitter * (2 * torch.rand(len(images), 2, generator=random) - 1))
        if change.cutout:
            images = cut_out(images, change.cutout, torch.rand(len(images), 2, generator=random))
        return images

    def _drawn(self, number: int, images: int, step: int) -> Tensor:
        epoch, position = divmod(step, images // self.share)
        known, order = self._orders.get(number, (-1, torch.empty(0)))
        if known != epoch:
            order = torch.randperm(images, generator=generator("epoch", *self._key(number, epoch)))
            self._orders[number] = epoch, order
        return order[position * self.share : (position + 1) * self.share]

    def _blend(self, number: int, step: int) -> float:
        alpha = self.augmentation.mixup
        return float(np.random.default_rng(seed_of("mixup", *self._key(number, step))).beta(alpha, alpha))

    def _key(self, number: int, count: int) -> tuple[int, ...]:
        return (self.seed, count, number) if number else (self.seed, count)


def _of_set(number: int, images: Tensor, labels: Tensor) -> Batch:
    return Batch(images, labels, torch.full((len(images),), number, device=images.device))


def random_offsets(count: int, shift: int, random: torch.Generator) -> Tensor:
    """Random offsets `(count, 2)` in pixels, down and right, each from −`shift` to `shift`."""
    return torch.randint(-shift, shift + 1, (count, 2), generator=random)


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Each image `(N, C, H, W)` moved by its own `offsets` `(N, 2)`, down and right; edges are repeated; one gather."""
    count, _, height, width = images.shape
    offsets = offsets.to(images.device, non_blocking=True)
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)
    image = torch.arange(count, device=images.device)
    return images.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flipped(images: Tensor, which: Tensor) -> Tensor:
    """The images `(N, C, H, W)` that `which` `(N,)` marks, mirrored left-right."""
    return torch.where(which.to(images.device, non_blocking=True)[:, None, None, None], images.flip(3), images)


def mixed(images: Tensor, share: float, partners: Tensor) -> Tensor:
    """`share` · image + (1 − `share`) · partner (Zhang et al. 2018, inputs only); `partners` are indices `(N,)`."""
    return share * images + (1 - share) * images[partners.to(images.device, non_blocking=True)]


def jittered(images: Tensor, changes: Tensor) -> Tensor:
    """Images `(N, C, H, W)` with brightness and contrast changed by `changes` `(N, 2)`, clipped to [0, 1]."""
    brightness, contrast = changes.to(images.device, non_blocking=True)[:, :, None, None, None].unbind(1)
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * (1 + contrast) + mean + brightness).clamp(0, 1)


def cut_out(images: Tensor, share: float, centres: Tensor) -> Tensor:
    """Images `(N, C, H, W)` with a square of `share` of the side set to their own mean (DeVries and Taylor 2017).

    `centres` `(N, 2)` are the squares' centres in [0, 1], down and right; a square may extend beyond the edge.
    """
    height, width = images.shape[2:]
    centres = centres.to(images.device, non_blocking=True)
    rows = near(height, centres[:, 0], share)[:, None, :, None]
    columns = near(width, centres[:, 1], share)[:, None, None, :]
    return torch.where(rows & columns, images.mean((1, 2, 3), keepdim=True), images)


def near(pixels: int, centre: Tensor, size: float) -> Tensor:
    """Mask `(N, pixels)` of the pixels within `size` / 2 of `centre` `(N,)`, both in shares of the side."""
    place = (torch.arange(pixels, device=centre.device) + 0.5) / pixels
    return (place - centre[:, None]).abs() <= size / 2
