"""Fold BatchNorms into the layers before them: the network computes the same with fewer tensors."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.fake_quantizers import QuantizedLayer
from dfcompress.models.grids import per_channel
from dfcompress.models.hooks import hooked_inputs, hooked_outputs
from dfcompress.models.layers import channel_axis
from dfcompress.models.plain_layers import after_normalising, plain_kind
from dfcompress.models.uses import Uses, place


@torch.no_grad()
def fold_batchnorms(classifier: Classifier) -> list[str]:
    """Fold every BatchNorm that is the only user of a convolution's or linear layer's output into that layer, in place.

    Modules that the BatchNorm applies after normalising stay at its place. Returns the names of the folded BatchNorms.
    A frozen quantized layer keeps its integers, mirrored where the factor is negative: the factor goes into its scales,
    so nothing is rounded again.
    """
    pairs = _pairs(classifier)
    names = list(classifier.network.named_modules(remove_duplicate=False))  # A module may have several names.
    for norm_name, layer_name in pairs.items():
        norm = classifier.network.get_submodule(norm_name)
        after = after_normalising(norm)
        assert isinstance(norm, _BatchNorm)
        assert after is not None
        _fold(classifier.network.get_submodule(layer_name), norm)
        for name in [name for name, each in names if each is norm]:
            classifier.network.set_submodule(name, after)
    return list(pairs)


def _pairs(classifier: Classifier) -> dict[str, str]:
    """For each BatchNorm that can be folded, the name of the layer before it."""
    network, uses = classifier.network, Uses()
    modules = dict(network.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, QuantizedLayer) or plain_kind(module)]
    norms = [name for name, module in modules.items() if after_normalising(module) is not None]
    layer_of_output: dict[int, str] = {}
    input_of_norm: dict[str, int] = {}
    runs: Counter[str] = Counter()

    def note_input(norm: str, features: Tensor) -> None:
        runs[norm] += 1
        input_of_norm[norm] = place(features)

    def note_output(layer: str, features: Tensor) -> None:
        runs[layer] += 1
        # After a linear layer on tokens, a BatchNorm normalises each token, not each channel.
        if channel_axis(network.get_submodule(layer)) % features.dim() == 1:
            layer_of_output[place(features)] = layer

    # Only the places of tensors are noted, and `uses` keeps all tensors alive, so no copies are needed.
    with hooked_inputs(network, norms, note_input), hooked_outputs(network, layers, note_output), uses:
        pass_once(classifier)
    return {
        norm: layer_of_output[where]
        for norm, where in input_of_norm.items()
        if where in layer_of_output and uses.count[where] == 1 and runs[norm] == runs[layer_of_output[where]] == 1
    }


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = 1 / (norm.running_var.double() + norm.eps).sqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    shift = (0.0 if bias is None else bias) - norm.running_mean.double()
    shift = shift * factor + (0.0 if norm.bias is None else norm.bias)
    if isinstance(layer, QuantizedLayer):
        integers, grid = layer.integer_weight()
        layer.set_integer_weight(*grid.times(factor, integers))
    else:
        layer.weight = nn.Parameter((weight * per_channel(factor, weight)).float(), requires_grad=False)
    layer.bias = nn.Parameter(shift.float(), requires_grad=False)
