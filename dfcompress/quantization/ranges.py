"""The range of every quantized layer's input, measured on images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor

from dfcompress.device import exact_fp32
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import FLOAT_BITS, InputGrid, QuantizedLayer, in_float, quantized_layers

CHUNK = 16


@torch.no_grad()
def calibrate(classifier: Classifier, batches: Iterable[Tensor]) -> None:
    """Set each quantized layer's input range: the mean of the minimum and of the maximum over chunks of 16 images.

    `batches` are images `(N, C, H, W)` in [0, 1] on the classifier's device; of each batch the last chunk may be
    smaller. The running mean of Haroush et al. 2020, section 4.2, is taken as a plain average.
    The network runs in evaluation mode and in float (our choice): fine-tuning with fixed ranges brings it back to its
    float activations. On ResNet-20, ranges seen through freshly quantized weights were no better at 4 bits, and far
    too wide at 2 (KL to the float model on training images 80, against 16).
    Raises `BadInput` where there are no images, or a layer's input is not finite.
    """
    quantized = quantized_layers(classifier.network).items()
    layers = {name: layer for name, layer in quantized if layer.input_bits < FLOAT_BITS}
    with exact_fp32(), evaluating(classifier), in_float(classifier), _chunk_extremes(layers) as extremes:
        for images in batches:
            classifier(images)
    for name, layer in layers.items():
        layer.input_grid = _grid(name, layer, extremes[name])


@contextmanager
def _chunk_extremes(layers: dict[str, QuantizedLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, for each layer, the minima and maxima `(2, chunks)` of the inputs that pass through it."""
    extremes: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, activations: Tensor) -> None:
        per_image = activations.flatten(1).float().aminmax(dim=1)
        chunks = zip(per_image.min.split(CHUNK), per_image.max.split(CHUNK), strict=True)
        extremes[name].append(torch.stack([torch.stack([low.min(), high.max()]) for low, high in chunks], dim=1))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield extremes
    finally:
        for hook in hooks:
            hook.remove()


def _grid(name: str, layer: QuantizedLayer, extremes: list[Tensor]) -> InputGrid:
    if not extremes:
        raise BadInput("There are no images to calibrate on.", "Give at least one batch.")
    low, high = torch.cat(extremes, dim=1).double().mean(dim=1).tolist()
    if not (isfinite(low) and isfinite(high)):
        raise BadInput(f"The input of layer {name} ranges from {low} to {high}.", "Check the weights and the images.")
    return InputGrid.covering(low, high, bits=layer.input_bits)
