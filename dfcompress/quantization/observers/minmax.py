"""`minmax`: the range is what was seen (Haroush et al. 2020, section 4.2).

The paper's running mean of the extremes of activations is taken as a plain average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfcompress.models.fake_quantizers import WeightGrid

CHUNK = 16  # Images.


class Observer:
    """The mean over chunks of 16 images of the lowest and of the highest value."""

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []

    def observe(self, activations: Tensor) -> None:
        """Remember the extremes of each image's activations `(N, ...)`, in whatever batches the images come."""
        images = activations.flatten(1).float()
        self._extremes.append(torch.stack([images.amin(1), images.amax(1)]).cpu())

    def range(self, *, bits: int, signed: bool) -> tuple[float, float]:
        """The mean extremes; the last chunk may have fewer images."""
        chunks = torch.cat(self._extremes, 1).double().split(CHUNK, dim=1)
        lows, highs = [chunk[0].amin() for chunk in chunks], [chunk[1].amax() for chunk in chunks]
        return torch.stack(lows).mean().item(), torch.stack(highs).mean().item()


def weight_shares(weight: Tensor, kind: WeightGrid) -> Tensor:
    """All of both ends, `(2, out_channels)`."""
    return torch.ones(2, len(weight), device=weight.device)
