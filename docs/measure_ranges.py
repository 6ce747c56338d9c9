"""Seconds of the search for ranges of weights, beside the same search on the whole layer by torch's `fake_quantize`.

    python docs/measure_ranges.py

Seconds of processor time on one thread; the shares that both find must be the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dfcompress.models.grids import WeightGrid
from dfcompress.quantization.observers.mse import SHARES, weight_shares

LAYERS = {"linear, 1,024 × 4,096": (1024, 4096), "convolution, 512 × 512 × 3 × 3": (512, 512, 3, 3)}
KINDS = {"8 bits, symmetric": (8, True), "4 bits, symmetric": (4, True), "3 bits, asymmetric": (3, False)}


def by_torch(grid: WeightGrid, rows: Tensor) -> Tensor:
    """The nearest grid value of each weight."""
    zero_point = grid.zero_point.float() if grid.symmetric else grid.zero_point
    return torch.fake_quantize_per_channel_affine(rows, grid.scale, zero_point, 0, *grid.integers())


def whole(weight: Tensor, kind: WeightGrid) -> Tensor:
    """The shares `(2, out_channels)`, all rows compared at once."""
    rows = weight.flatten(1)
    ends = torch.stack([rows.amin(1), rows.amax(1)])
    each = SHARES[:, None].expand(-1, len(rows))

    def best(shares: Tensor) -> Tensor:
        grids = (WeightGrid.covering(*pair, bits=kind.bits, symmetric=kind.symmetric) for pair in shares * ends)
        errors = torch.stack([(by_torch(grid, rows) - rows).square().sum(1) for grid in grids])
        return shares.gather(0, errors.argmin(0).expand(1, 2, -1))[0]

    found = best(torch.stack([each, each], 1))
    if kind.symmetric:
        return found
    found = best(torch.stack([found[0].expand_as(each), each], 1))
    return best(torch.stack([each, found[1].expand_as(each)], 1))


def timed(search: Callable[[Tensor, WeightGrid], Tensor], weight: Tensor, kind: WeightGrid) -> tuple[float, Tensor]:
    """Seconds of one search, and what it finds."""
    started = time.process_time()
    found = search(weight, kind)
    return time.process_time() - started, found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [f"| layer | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for name, shape in LAYERS.items():
        weight, cells = 0.02 * torch.randn(shape), []
        for bits, symmetric in KINDS.values():
            ends = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
            kind = WeightGrid.covering(*ends, bits=bits, symmetric=symmetric)
            (before, expected), (now, found) = timed(whole, weight, kind), timed(weight_shares, weight, kind)
            assert torch.equal(found, expected), "the shares are the same"
            cells.append(f"{before:.2f} → {now:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
