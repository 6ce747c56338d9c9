"""Replace padding that depends on the size of a convolution's input by constant padding for the card's image size.

TensorFlow's "same" padding depends on the input's size and differs between the sides, as in timm's `Conv2dSame`.
For images of the card's size it is constant, and the layer is torch's convolution, which integer kernels support.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier, evaluating, pass_once
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.plain_layers import is_altered, plain_kind

# Greatest difference, as a share of the largest output: both sides are one fp32 convolution.
CLOSE = 1e-5


def fix_padding(classifier: Classifier) -> list[str]:
    """Turn convolutions whose padding depends on the input's size into torch's own, in place; returns their names.

    They get the constant padding for images of the card's size. Tensor names do not change.
    """
    candidates = {
        name: module
        for name, module in classifier.network.named_modules()
        if isinstance(module, nn.Conv2d) and plain_kind(module) is None and not is_altered(module)
    }
    inputs: dict[str, set[torch.Size]] = {}

    def note(name: str, features: Tensor) -> None:
        inputs.setdefault(name, set()).add(features.shape)

    if candidates:
        with hooked_inputs(classifier.network, candidates, note):
            pass_once(classifier)
    return [name for name, shapes in inputs.items() if len(shapes) == 1 and _fix(candidates[name], *shapes)]


@torch.no_grad()
def _fix(layer: nn.Conv2d, shape: torch.Size) -> bool:
    """Turn the layer into torch's convolution with constant padding if both have the same output; whether it did."""
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    with evaluating(layer), exact_fp32():
        expected = layer(probe)
        geometry = zip(shape[2:], expected.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
        missing = [max(0, (out - 1) * step + gap * (taps - 1) + 1 - size) for size, out, taps, step, gap in geometry]
        # The odd pixel goes to the right and to the bottom.
        (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in missing)
        padding = [left, right, top, bottom]
        found = F.conv2d(F.pad(probe, padding), layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    if not (found - expected).abs().max() <= CLOSE * expected.abs().max():
        return False
    layer.__class__ = nn.Conv2d
    # torch uses this padding if `padding_mode` is not "zeros"; with "zeros" it pads both sides alike.
    layer.padding_mode, layer._reversed_padding_repeated_twice = "constant", padding  # type: ignore[assignment]
    return True
