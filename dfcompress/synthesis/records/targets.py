"""`BatchTargets`: the activations that the images of a batch shall have; `TargetSampler`: a record that draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dfcompress.models.trace import Target


@dataclass(frozen=True)
class BatchTargets:
    """What a record sets for a batch: `targets` by layer, and `filters` that dropout layers multiply by, held for all
    steps; `(N, ...)` each.
    """

    targets: Mapping[str, Target] = field(default_factory=dict)
    filters: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> BatchTargets:
        """The same on a device."""
        targets = {
            layer: Target(values.to(device), scale.to(device)) for layer, (values, scale) in self.targets.items()
        }
        return BatchTargets(targets, tuple(tensor.to(device) for tensor in self.filters))

    def part(self, rows: slice) -> BatchTargets:
        """Those of some images."""
        targets = {layer: Target(values[rows], scale) for layer, (values, scale) in self.targets.items()}
        return BatchTargets(targets, tuple(tensor[rows] for tensor in self.filters))

    @staticmethod
    def together(parts: list[BatchTargets]) -> BatchTargets:
        """Of several batches, one after the other; of none where no record sets any."""
        targets = {
            layer: Target(torch.cat([part.targets[layer].values for part in parts]), target.scale)
            for layer, target in (parts[0].targets.items() if parts else ())
        }
        return BatchTargets(targets, tuple(map(torch.cat, zip(*(part.filters for part in parts), strict=True))))


class TargetSampler(Protocol):
    """A record made ready for synthesis.

    `layers` are those whose outputs it knows; `fixes_dropout` says that it asks for dropout filters.
    """

    layers: tuple[str, ...]
    fixes_dropout: bool

    def sample(self, labels: Tensor, random: torch.Generator) -> BatchTargets:
        """What a batch of the classes `labels` `(N,)` shall be, drawn from `random`; on the CPU."""
