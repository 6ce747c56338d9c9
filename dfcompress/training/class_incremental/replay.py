"""`Replay`: batches of replayed images, which stand for old classes, and labelled images of new classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfcompress.data.batches import Batch
from dfcompress.data.pool import ImagePool
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.randomness import seed_of
from dfcompress.training.class_incremental.method import NEW, OLD
from dfcompress.training.settings import Training

LEAST_SHARE = 1 / 4  # Of a batch, for old and for new classes.


class Replay:
    """A `BatchSource` whose batches hold the old images first, then the new images. `old_share` is the share of old
    images in a batch, limited so that old and new images each have at least a quarter.

    `old` and `new` are pairs of stored images `(N, C, H, W)` and labels `(N,)`; without `old` all images of a batch are
    new. A set with fewer images than its part of a batch shows them several times in a batch.
    """

    def __init__(
        self,
        old: tuple[Tensor, Tensor] | None,
        new: tuple[Tensor, Tensor],
        training: Training,
        *,
        old_share: float,
        seed: int,
    ) -> None:
        parts = parts_of(training.batch_size, old_share) if old else (0, training.batch_size)
        self._pools = {
            source: _pool(*images, training, size, seed_of("replay", seed, source))
            for source, images, size in zip((OLD, NEW), (old, new), parts, strict=True)
            if images is not None
        }
        self.batch_size = sum(parts)

    def batch(self, step: int) -> Batch:
        """The batch of `step`, changed by the training's augmentation; its `sources` are `OLD` or `NEW`."""
        batches = [
            batch._replace(sources=torch.full_like(batch.sources, source))
            for source, pool in self._pools.items()
            for batch in [pool.batch(step)]
        ]
        return Batch(*(torch.cat(values) for values in zip(*batches, strict=True)))

    def to(self, device: torch.device) -> None:
        """Move the stored images, and thereby the batches, to `device`."""
        for pool in self._pools.values():
            pool.to(device)

    def measured(self) -> dict[str, float]:
        """Nothing: the source makes no images."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a batch depends on its step alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def parts_of(batch_size: int, old_share: float) -> tuple[int, int]:
    """The number of images in a batch that stand for old classes, and the number that stand for new classes."""
    old = round(batch_size * min(max(old_share, LEAST_SHARE), 1 - LEAST_SHARE))
    return old, batch_size - old


def require_parts(batch_size: int, old_share: float) -> None:
    """Raise `BadInput` where the old or the new images of a batch cannot be divided equally among the processes."""
    count = world().world_size

    def divides(size: int) -> bool:
        return not any(part % count for part in parts_of(size, old_share))

    if divides(batch_size):
        return
    old, new = parts_of(batch_size, old_share)
    nearby = sorted(range(count, 2 * batch_size), key=lambda size: abs(size - batch_size))
    fitting = next(filter(divides, nearby), None)
    raise BadInput(
        f"{old} old and {new} new images of a batch do not divide among {count} processes.",
        f"Use --train-batch-size {fitting}." if fitting else "Use one process.",
    )


def class_weights(new_labels: Tensor, classes: int, known: int, batch_size: int) -> Tensor:
    """The weights `(classes,)` with which every class counts the same in a batch, provided that the replayed images are
    divided equally among the `known` old classes; 0 for a class without images.
    """
    old, new = parts_of(batch_size, known / classes)
    counts = torch.zeros(classes)
    counts[:known] = old / known
    counts += new * new_labels.bincount(minlength=classes) / len(new_labels)
    return torch.where(counts > 0, batch_size / (classes * counts), 0.0)


def _pool(images: Tensor, labels: Tensor, training: Training, size: int, seed: int) -> ImagePool:
    repeats = -(-size // len(images))
    if repeats > 1:
        images, labels = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    return replace(training, batch_size=size).pool(images, labels=[labels], seed=seed)
