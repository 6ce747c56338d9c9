"""The report on quantized layers, with the bits and the errors of each: `quantization.json` and the table of
`quantize`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier, evaluating, images_a_pass
from dfcompress.models.fake_quantizers import QuantizedLayer, quantized_layers
from dfcompress.models.hooks import hooked_outputs, kept_outputs

REPORT = "quantization.json"
CHUNK = 16  # Images whose features are in memory at the same time.


def layer_report(
    student: Classifier,
    teacher: Classifier,
    images: Tensor,
    *,
    sensitivity: Mapping[str, float],
    left: Mapping[str, str],
    unused: Mapping[str, int],
) -> dict[str, Any]:
    """The report as JSON: the quantized `layers` in execution order; the layers `left` in float, each with its type, or
    with `float` if the user left it so; and the bytes of `unused` modules.

    A layer has its name, its type, the number of its `weights`, the bits of its weights and input, the ends of its
    input's range `input_low` and `input_high` and its `zero_point` (None in float), its `sensitivity` in nats, and its
    `signal_to_noise` in decibels. The last compares the layer's output with the teacher's when all layers are
    quantized, on `images` `(N, C, H, W)` in [0, 1].
    """
    layers = quantized_layers(student.network)
    noise = signal_to_noise(student, teacher, images)
    rows = [
        {
            "layer": name,
            "type": "conv" if isinstance(layers[name], nn.Conv2d) else "linear",
            "weights": layers[name].weight.numel(),
            "weight_bits": layers[name].weight_bits,
            "input_bits": layers[name].input_bits,
            **_range(layers[name]),
            "sensitivity": sensitivity[name],
            "signal_to_noise": noise[name],
        }
        for name in sensitivity
    ]
    return {"schema": 1, "layers": rows, "left_in_float": dict(left), "unused_bytes": dict(unused)}


def named_bytes(modules: Mapping[str, int]) -> str:
    """The names of modules with their bytes, as text for a message."""
    return ", ".join(f"{name} ({count:,} bytes)" for name, count in modules.items())


def _range(layer: QuantizedLayer) -> dict[str, float | int | None]:
    grid = layer.input_grid
    if grid is None:
        return {"input_low": None, "input_high": None, "zero_point": None}
    low, high = grid.ends()
    return {"input_low": low, "input_high": high, "zero_point": grid.zero_point}


@torch.no_grad()
def signal_to_noise(student: Classifier, teacher: Classifier, images: Tensor) -> dict[str, float | None]:
    """The signal-to-noise ratio 10·log₁₀(Σ t² / Σ (t − s)²) of the output of every quantized layer in decibels, with
    the teacher's output t and the student's output s; None where either sum is 0.
    """
    names = list(quantized_layers(student.network))
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    power, noise = (dict.fromkeys(names, 0.0) for _ in range(2))

    def keep(name: str, output: Tensor) -> None:
        outputs[name].append(output)

    def compare(name: str, output: Tensor) -> None:
        signal = outputs[name].pop(0)  # A layer that runs several times is compared run by run.
        power[name] += signal.square().sum(dtype=torch.float64).item()
        noise[name] += (signal - output.float()).square().sum(dtype=torch.float64).item()

    for some in images.split(min(CHUNK, images_a_pass(student))):
        with exact_fp32(), evaluating(teacher), kept_outputs(teacher.network, names, keep, dtype=torch.float32):
            teacher(some)
        with exact_fp32(), evaluating(student), hooked_outputs(student.network, names, compare):
            student(some)
    return {name: 10 * math.log10(power[name] / noise[name]) if noise[name] and power[name] else None for name in names}
