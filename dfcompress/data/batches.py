"""What a student is trained on: batches, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

UNLABELLED = -1


class Batch(NamedTuple):
    """Float images `(N, C, H, W)` in units of [0, 1]; the class of each, int64 `(N,)`, `UNLABELLED` where it is not
    known; and the number of the teacher that each is for, int64 `(N,)`, from 0.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor

    def part(self, rows: slice) -> Batch:
        """Some of its images, with their labels and sources."""
        return Batch(*(values[rows] for values in self))


class BatchSource(Protocol):
    """Endless batches of `batch_size` images for the `Trainer`, which cannot tell stored images from live ones.

    The Trainer asks for the steps 0, 1, 2, ... once each. A source whose batches depend on more than the step keeps
    that in its state: after `load_state_dict(state)` the next batches are those that came after `state_dict()`.
    """

    batch_size: int

    def batch(self, step: int) -> Batch:
        """The batch of `step`: equally many images for each teacher, teacher after teacher."""

    def to(self, device: torch.device) -> None:
        """Let batches come out on `device`."""

    def measured(self) -> Mapping[str, float]:
        """What it knows of the making of its images, by name; nothing of stored ones."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `torch.load(weights_only=True)` reads."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step in which the state was taken."""


@runtime_checkable
class RepeatingSource(BatchSource, Protocol):
    """A source of so many `images` that may show them again unchanged, so that their targets can be kept."""

    @property
    def images(self) -> int:
        """How many different images there are."""

    def repeated(self) -> Iterator[Batch] | None:
        """Every image once, in the order of `places`, in batches; None where images differ from step to step."""

    def places(self, step: int) -> Tensor:
        """The place of each image of the batch of `step` among the repeated ones, `(batch_size,)`."""
