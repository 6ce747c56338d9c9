"""`RecordSettings`: what a record shall contain. `RecordAccumulator`: collects activations, then gives the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dfcompress.arguments import require_fields
from dfcompress.errors import BadInput
from dfcompress.synthesis.records import BN_EQUIVALENT, GAUSSIAN, KINDS


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What a record shall contain: its kind, and the settings of particular kinds.

    `layers` are patterns of layer names (default: all layers). `class_independent` pools all classes (Gaussian kinds).
    `covariance` is `auto`, `full`, `block:N` or `diagonal`. `temperature` divides logits. Spectral kinds store up to
    `per_class` activations of each class, and of each activation's coefficients the share `coefficients`. A class of
    fewer than `min_images` images is refused, because its record would reveal too much about them.
    """

    kind: str = "all-layers"
    layers: Sequence[str] = ()
    class_independent: bool = False
    covariance: str = "auto"
    temperature: float = 8.0
    per_class: int = 100
    coefficients: float = 0.1
    min_images: int = 20

    def __post_init__(self) -> None:
        """Raise `BadInput` for an unknown kind or covariance, for a number out of range, and for pooled classes of a
        kind without them.
        """
        require_fields(self)
        if self.kind not in KINDS:
            raise BadInput(f"There is no kind of record {self.kind!r}.", f"Known: {', '.join(KINDS)}.")
        if not 0 < self.coefficients <= 1:
            raise BadInput(
                f"--coefficients must be a share above 0, up to 1; it is {self.coefficients}.",
                "Use a number above 0, up to 1.",
            )
        if not 0 < self.temperature < math.inf:
            raise BadInput(f"--temperature {self.temperature} is not positive.", "8 is the paper's.")
        if self.min_images < 2:
            raise BadInput(f"--min-images {self.min_images} are too few for a variance.", "Use 2 or more.")
        if self.per_class < 1:
            raise BadInput(f"--per-class {self.per_class} keeps nothing.", "Use 1 or more.")
        if self.covariance not in ("auto", "full", "diagonal") and self.block is None:
            raise BadInput(f"--covariance {self.covariance!r} is not understood.", "auto, full, block:N or diagonal.")
        if self.class_independent and self.kind not in GAUSSIAN:
            raise BadInput(f"A record of kind {self.kind} does not pool classes.", "Leave out --class-independent.")

    @property
    def block(self) -> int | None:
        """The N of `block:N`, else None."""
        name, _, number = self.covariance.partition(":")
        return int(number) if name == "block" and number.isdecimal() and int(number) > 0 else None

    @property
    def keeps_classes_apart(self) -> bool:
        """Whether the record has separate statistics for each class."""
        return self.kind != BN_EQUIVALENT and not self.class_independent


class RecordAccumulator(Protocol):
    """Collects one family's statistics of some layers, batch by batch.

    `bytes` is the size of its part of the file and `memory_bytes` the memory of its sums; both are known beforehand.
    With `flat` it takes outputs `(N, units)` instead of in their own shape.
    """

    flat: bool
    bytes: int
    memory_bytes: int

    def update(self, outputs: Sequence[Tensor], labels: Tensor, numbers: Tensor) -> None:
        """Add the layers' outputs for a batch of images with classes `labels` `(N,)` and numbers `numbers` `(N,)`."""

    def state(self) -> dict[str, Tensor]:
        """Everything that another process needs to `merge` this accumulator."""

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the `state` of another process."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, once all images were seen."""

    def details(self) -> dict[str, Any]:
        """The fields of a record's `Description` that belong to this family alone."""

    def notices(self) -> list[str]:
        """Sentences that the owner should read before recording starts."""
