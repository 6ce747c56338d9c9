"""Seconds of passes of quantized networks, beside the same passes with torch's `fake_quantize`.

    python docs/measure_grids.py

Random weights, layer inputs in −1 .. 3, one thread. Both ways take turns, and the least seconds of processor time
count; their logits and gradients must be equal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn

from dfcompress.models import grids
from dfcompress.models.architectures import find
from dfcompress.models.fake_quantizers import can_be_quantized, quantize_layers, quantized_layers
from dfcompress.models.grids import InputGrid

ROUNDS = 5
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ResNet-20, 64 images of 32 pixels": (lambda: find("cifar_resnet20").make(10, 3), 64, 32),
    "ResNet-18, 8 of 224": (torchvision.models.resnet18, 8, 224),
    "MobileNetV2, 8 of 224": (torchvision.models.mobilenet_v2, 8, 224),
}


def by_torch(values: Tensor, scale: float | Tensor, lowest: int | Tensor, highest: int | Tensor) -> Tensor:
    """What `on_grid` computes, by torch's operations."""
    if isinstance(scale, Tensor) and isinstance(lowest, Tensor) and isinstance(highest, Tensor):
        last = int((highest - lowest).max())
        return torch.fake_quantize_per_channel_affine(values, scale.flatten(), -lowest.flatten(), 0, 0, last)
    return torch.fake_quantize_per_tensor_affine(values, scale, -lowest, 0, highest - lowest)


def passes(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""

    def both() -> Tensor:
        network.zero_grad()
        network(images).square().mean().backward()
        return torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None])

    return {"forward": torch.no_grad()(lambda: network(images)), "forward and backward": both}


def seconds_of(work: Callable[[], Tensor]) -> tuple[float, float]:
    """The least seconds with torch's operations and as shipped."""
    least = [float("inf")] * 2
    for _ in range(ROUNDS):
        results = []
        for way, function in enumerate((by_torch, grids.on_grid)):
            with mock.patch.object(grids, "on_grid", function):
                started = time.process_time()
                results.append(work())
                least[way] = min(least[way], time.process_time() - started)
        assert torch.equal(*results), "both ways give the same numbers"
    return least[0], least[1]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    lines = ["| network, 8w8a | forward | forward and backward |", "|---|---|---|"]
    for name, (make, images, side) in NETWORKS.items():
        torch.manual_seed(0)
        network = make().eval()
        layers = [layer for layer, module in network.named_modules() if can_be_quantized(module)]
        quantize_layers(network, dict.fromkeys(layers, (8, 8)))
        for layer in quantized_layers(network).values():
            layer.input_grid = InputGrid.covering(-1.0, 3.0, bits=8)
        seconds = [seconds_of(work) for work in passes(network, torch.randn(images, 3, side, side)).values()]
        cells = (f"{before:.2f} → {now:.2f} ({before / now:.1f} x)" for before, now in seconds)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
