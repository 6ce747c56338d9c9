"""The ranges of quantized layers: of their inputs, measured on images, and of their weights, by the rules of the folder
`observers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import TENSOR_GRIDS, InputGrid, in_float, input_grids, quantized_layers
from dfcompress.models.hooks import hooked_inputs
from dfcompress.quantization.observers import range_rules


def require_rules(inputs: str, weights: str) -> None:
    """Raise `BadInput` for a rule that is none."""
    for option, rule in (("calibrate", inputs), ("weight-ranges", weights)):
        if rule not in range_rules():
            raise BadInput(f"There is no --{option} {rule!r}.", f"Known: {', '.join(range_rules())}.")


def _rule(name: str) -> Any:
    return importlib.import_module(f"dfcompress.quantization.observers.{name}")


@torch.no_grad()
def calibrate(classifier: Classifier, batches: Iterable[Tensor], *, rule: str = "minmax", signed: bool = False) -> None:
    """Set each quantized layer's input range as `rule` says; `signed` grids have zero point 0.

    `batches` are images `(N, C, H, W)` in [0, 1] on the classifier's device.
    The network runs in evaluation mode and in float (our choice): fine-tuning with fixed ranges brings it back to its
    float activations. On ResNet-20, ranges seen through freshly quantized weights were no better at 4 bits, and far
    too wide at 2 (KL to the float model on training images 80, against 16).
    Raises `BadInput` where there are no images, or a layer's input is not finite.
    """
    grids = input_grids(classifier.network)
    observers = {name: _rule(rule).Observer() for grid in grids for name in grid.observed}
    seen: set[str] = set()

    def observe(name: str, activations: Tensor) -> None:
        observers[name].observe(activations)
        seen.add(name)

    with (
        exact_fp32(),
        evaluating(classifier),
        in_float(classifier.network),
        hooked_inputs(classifier.network, observers, observe),
    ):
        for images in batches:
            classifier(images)
    if observers and not seen:
        raise BadInput("There are no images to calibrate on.", "Give at least one batch.")
    for grid in grids:
        lows, highs = [], []
        for name, (lowest, highest) in grid.observed.items():
            low, high = _finite_range(name, observers[name], bits=grid.bits, signed=signed)
            # A range wider than what ReLU6 lets through costs its kernel in onnxruntime.
            lows.append(max(low, lowest))
            highs.append(min(high, highest))
        for owner in grid.owners:
            owner.input_grid = InputGrid.covering(min(lows), max(highs), bits=grid.bits, signed=signed)


def _finite_range(name: str, observer: Any, *, bits: int, signed: bool) -> tuple[float, float]:
    """What an observer finds; raises `BadInput` where a value was not finite."""
    low, high = observer.range(bits=bits, signed=signed)
    if not (isfinite(low) and isfinite(high)):
        place = name.removeprefix(f"{TENSOR_GRIDS}.")
        what = f"The input of layer {name}" if place == name else f"The tensor behind {place}"
        raise BadInput(f"{what} ranges from {low} to {high}.", "Check the weights and the images.")
    return low, high


@torch.no_grad()
def fit_weights(classifier: Classifier, *, rule: str) -> None:
    """Set which shares of each output channel's lowest and highest weight the grid of a quantized layer covers.

    Layers whose weights follow no range any more (frozen, or of learnt steps) must not be among them.
    """
    for layer in quantized_layers(classifier.network).values():
        assert layer.weight_shares is not None
        layer.weight_shares.copy_(_rule(rule).weight_shares(layer.weight, layer.weight_grid))
