"""`BatchTargets`: the activations that a batch's images shall have; `TargetSampler`: draws them from a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dfcompress.models.trace import Target


@dataclass(frozen=True)
class BatchTargets:
    """A record's settings for a batch, `(N, ...)` each: `targets` by layer, and `filters` that dropout layers multiply
    by, fixed for all steps.
    """

    targets: Mapping[str, Target] = field(default_factory=dict)
    filters: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> BatchTargets:
        """A copy on a device."""
        targets = {
            layer: Target(values.to(device), scale.to(device)) for layer, (values, scale) in self.targets.items()
        }
        return BatchTargets(targets, tuple(tensor.to(device) for tensor in self.filters))

    def part(self, rows: slice) -> BatchTargets:
        """The targets and filters of some images."""
        targets = {layer: Target(values[rows], scale) for layer, (values, scale) in self.targets.items()}
        return BatchTargets(targets, tuple(tensor[rows] for tensor in self.filters))

    @staticmethod
    def together(parts: list[BatchTargets]) -> BatchTargets:
        """The targets and filters of several batches, one after the other; empty if `parts` is empty."""
        targets = {
            layer: Target(torch.cat([part.targets[layer].values for part in parts]), target.scale)
            for layer, target in (parts[0].targets.items() if parts else ())
        }
        return BatchTargets(targets, tuple(map(torch.cat, zip(*(part.filters for part in parts), strict=True))))


class TargetSampler(Protocol):
    """A record prepared for synthesis.

    `layers` are the layers whose outputs it knows; `fixes_dropout` says whether it sets dropout filters.
    """

    layers: tuple[str, ...]
    fixes_dropout: bool

    def sample(self, labels: Tensor, random: torch.Generator) -> BatchTargets:
        """The targets of a batch with classes `labels` `(N,)`, drawn with `random`, on the CPU."""
