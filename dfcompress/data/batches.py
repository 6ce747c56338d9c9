"""Batches of training images for a student, and the protocols of their sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

UNLABELLED = -1


class Batch(NamedTuple):
    """A batch of training images.

    `images` are float `(N, C, H, W)` in units of [0, 1]; `labels` are the classes, int64 `(N,)`, `UNLABELLED` if
    unknown; `sources` are the numbers, from 0, of the teachers that the images are for, int64 `(N,)`.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor

    def part(self, rows: slice) -> Batch:
        """The images in `rows`, with their labels and sources."""
        return Batch(*(values[rows] for values in self))


class BatchSource(Protocol):
    """Endless batches of `batch_size` images for the `Trainer`, which treats stored and live images alike.

    The Trainer requests the steps 0, 1, 2, ... once each. If batches depend on more than the step, the state holds the
    rest: after `load_state_dict(state)` the next batches are those that followed `state_dict()`.
    """

    batch_size: int

    def batch(self, step: int) -> Batch:
        """The batch of `step`: the same number of images for each teacher, teacher after teacher."""

    def to(self, device: torch.device) -> None:
        """Make all later batches on `device`."""

    def measured(self) -> Mapping[str, float]:
        """Measurements of the synthesis of its images, by name; empty for stored images."""

    def state_dict(self) -> dict[str, Any]:
        """The source's state as tensors and numbers that `torch.load(weights_only=True)` can read."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step in which the state was taken."""


@runtime_checkable
class RepeatingSource(BatchSource, Protocol):
    """A source of a fixed number of images that may repeat them unchanged, so that their targets can be kept."""

    @property
    def images(self) -> int:
        """The number of different images."""

    def repeated(self) -> Iterator[Batch] | None:
        """Every image once, in the order of `places`, in batches; None if the images change from step to step."""

    def places(self, step: int) -> Tensor:
        """The indices `(batch_size,)`, among the images of `repeated`, of the images in the batch of `step`."""
