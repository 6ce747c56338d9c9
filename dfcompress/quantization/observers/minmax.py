"""`minmax`: the range is what was seen (Haroush et al. 2020, section 4.2).

The paper's running mean of the extremes of activations is taken as a plain average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfcompress.models.fake_quantizers import InputGrid, WeightGrid

CHUNK = 16  # Images.


class Observer:
    """The mean over chunks of 16 images of the lowest and of the highest value."""

    def __init__(self) -> None:
        self._sums, self._chunks = torch.zeros(2, dtype=torch.float64), 0

    def see(self, activations: Tensor) -> None:
        """Remember the extremes of activations `(N, ...)`; the last chunk may have fewer images."""
        for chunk in activations.split(CHUNK):
            self._sums = self._sums.to(chunk.device)
            self._sums += torch.stack(chunk.float().aminmax())
            self._chunks += 1

    def ends(self, covering: Callable[[float, float], InputGrid]) -> tuple[float, float]:
        """The mean extremes."""
        low, high = (self._sums / self._chunks).tolist()
        return low, high


def weight_shares(weight: Tensor, kind: WeightGrid) -> Tensor:
    """All of both ends, `(2, out_channels)`."""
    return torch.ones(2, len(weight), device=weight.device)
