"""BatchNorm folded into the layer before it: the same function with fewer tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.fake_quantizers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    per_channel,
)
from dfcompress.models.hooks import hooked

# Subclasses may compute something else.
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Conv2d, nn.Linear, QuantizedConv2d, QuantizedLinear)


@torch.no_grad()
def fold_batchnorms(classifier: Classifier) -> list[str]:
    """Fold every BatchNorm that alone uses the output of a convolution or linear layer into that layer, in place.

    The names of those folded. A frozen quantized layer keeps its integers, mirrored by a negative factor: the factor
    goes into its scales, so nothing is rounded anew.
    """
    pairs = _pairs(classifier)
    for norm_name, layer_name in pairs.items():
        norm = classifier.network.get_submodule(norm_name)
        assert isinstance(norm, _BatchNorm)
        _fold(classifier.network.get_submodule(layer_name), norm)
        parent, _, own = norm_name.rpartition(".")
        setattr(classifier.network.get_submodule(parent), own, nn.Identity())
    return list(pairs)


def _pairs(classifier: Classifier) -> dict[str, str]:
    """The layer before each BatchNorm that can be folded into it."""
    modules = dict(classifier.network.named_modules())
    layers = [name for name, module in modules.items() if type(module) in _LAYERS]
    norms = [name for name, module in modules.items() if type(module) in _PLAIN and module.running_mean is not None]
    made: dict[int, str] = {}
    taken: dict[str, int] = {}
    runs: Counter[str] = Counter()

    def note(name: str, module: nn.Module, activations: Tensor, output: Tensor) -> None:
        runs[name] += 1
        if type(module) in _PLAIN:
            taken[name] = _place(activations)
        else:
            made[_place(output)] = name

    uses = _Uses()
    with hooked(classifier.network, [*layers, *norms], note), uses:
        pass_once(classifier, [])
    return {
        norm: made[place]
        for norm, place in taken.items()
        if place in made and uses.count[place] == 1 and runs[norm] == runs[made[place]] == 1
    }


def _place(tensor: Tensor) -> int:
    """Tells tensors apart that are alive at the same time."""
    return tensor.untyped_storage()._cdata


class _Uses(TorchDispatchMode):
    """Counts how many operations take each tensor, and keeps all of them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        self.count.update({_place(each) for each in given})
        result = func(*args, **(kwargs or {}))
        self._alive += [given, result]
        return result


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
