"""`minmax`: the range reaches from the lowest to the highest value (Haroush et al. 2020, section 4.2).

For activations these are plain averages of the extremes of several chunks of images, in place of the paper's running
mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfcompress.models.grids import WeightGrid

CHUNK = 16  # Images.


class Observer:
    """The range of a layer's input: the mean over chunks of 16 images of the lowest value, and of the highest value."""

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []

    def observe(self, activations: Tensor) -> None:
        """Store the extremes of each image's activations `(N, ...)`; the result does not depend on the batch size."""
        images = activations.flatten(1).float()
        self._extremes.append(torch.stack([images.amin(1), images.amax(1)]).cpu())

    def range(self, *, bits: int, signed: bool) -> tuple[float, float]:
        """The mean of the lowest values and the mean of the highest; the last chunk may have fewer than 16 images."""
        chunks = torch.cat(self._extremes, 1).double().split(CHUNK, dim=1)
        lows, highs = [chunk[0].amin() for chunk in chunks], [chunk[1].amax() for chunk in chunks]
        return torch.stack(lows).mean().item(), torch.stack(highs).mean().item()


def weight_shares(weight: Tensor, kind: WeightGrid) -> Tensor:
    """The share 1 for both ends of each output channel, `(2, out_channels)`."""
    return torch.ones(2, len(weight), device=weight.device)
