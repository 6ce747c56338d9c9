"""Change the widths of a network's layers.

    widths_of(network)                               # {"conv1": (3, 16), "bn1": (16, 16), ..., "fc": (64, 10)}
    resized(network, half_of(network))               # what `half:NAME` names
    resized(network, {"conv1": (3, 9), "bn1": (9, 9), "conv2": (9, 16)})

Widths are a layer's numbers of input and output channels, by the layer's name; for a normalising layer both are equal.
Depthwise convolutions keep one group per input channel; other convolutions keep their number of groups. The caller is
responsible for consistent widths, for instance of the inputs of a residual addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dfcompress.errors import BadInput

# The attributes in which the layers of a class keep their input and output channels.
_WEIGHTED = {_ConvNd: ("in_channels", "out_channels"), nn.Linear: ("in_features", "out_features")}
_NORMALISING = {
    _BatchNorm: "num_features",
    nn.GroupNorm: "num_channels",
    nn.LayerNorm: "normalized_shape",
    nn.PReLU: "num_parameters",
}
_PLACES = _WEIGHTED | {kind: (place, place) for kind, place in _NORMALISING.items()}

REMEDY = "Correct the widths on the model's card, or make the model again."


def widths_of(network: nn.Module) -> dict[str, tuple[int, int]]:
    """The widths of all layers that have widths, quantized or not, in the order in which they are registered."""
    return {name: _widths(layer) for name, layer in network.named_modules() if _places(layer)}


def half_of(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Half the widths of a network, rounded up, except the first layer's input and the last layer's output."""
    widths = widths_of(network)
    weighted = [name for name in widths if isinstance(network.get_submodule(name), tuple(_WEIGHTED))]
    return {
        name: (
            c_in if name in weighted[:1] else (c_in + 1) // 2,
            c_out if name in weighted[-1:] else (c_out + 1) // 2,
        )
        for name, (c_in, c_out) in widths.items()
    }


def resized(network: nn.Module, widths: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Change the layers named in `widths` to these widths, in place, and return the network.

    The weights of these layers are initialised again, as the layer's class does it, on the same device. Networks whose
    forward pass has fixed numbers of channels (transformers, for instance) cannot run afterwards.
    Raises `BadInput`, before anything changes, for names that are not layers and widths that a layer cannot have.
    """
    layers = dict(network.named_modules())
    groups = {name: _groups(name, layers.get(name), *channels) for name, channels in widths.items()}
    for name, layer in layers.items():  # In the network's order, because initial weights are drawn one after the other.
        if name in widths:
            _resize(layer, *widths[name], groups[name])
    return network


def has_widths(layer: nn.Module) -> bool:
    """Whether the widths of a layer can be changed."""
    return _places(layer) is not None


def is_channelwise(layer: nn.Module) -> bool:
    """Whether each output channel of a layer depends only on the same input channel: a normalising layer or a depthwise
    convolution.
    """
    if isinstance(layer, _ConvNd):
        return layer.groups == layer.in_channels == layer.out_channels > 1
    return has_widths(layer) and isinstance(layer, tuple(_NORMALISING))


def _places(layer: nn.Module) -> tuple[str, str] | None:
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return None
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:  # One slope for all channels.
        return None
    return next((places for kind, places in _PLACES.items() if isinstance(layer, kind)), None)


def _widths(layer: nn.Module) -> tuple[int, int]:
    c_in, c_out = (getattr(layer, place) for place in _places(layer) or ())
    return (*c_in, *c_out) if isinstance(layer, nn.LayerNorm) else (c_in, c_out)


def _groups(name: str, layer: nn.Module | None, c_in: int, c_out: int) -> int:
    """The number of groups of a layer with these widths; raises `BadInput` if it cannot have these widths."""
    if layer is None or not _places(layer):
        raise BadInput(f"The widths name {name!r}, which is not a layer with widths.", REMEDY)
    if isinstance(layer, tuple(_NORMALISING)) and c_in != c_out:
        raise BadInput(f"The widths of {name} are {c_in} and {c_out}, and a normalising layer has one.", REMEDY)
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.GroupNorm):
        groups = min(layer.num_groups, c_in)
    elif groups > 1 and groups == _widths(layer)[0]:  # Depthwise.
        groups = c_in
    if c_in % groups or c_out % groups:
        raise BadInput(f"The widths of {name} are {c_in} and {c_out}, which {groups} groups cannot share.", REMEDY)
    return groups


def _resize(layer: Any, c_in: int, c_out: int, groups: int) -> None:
    for place, channels in zip(_places(layer) or (), (c_in, c_out), strict=True):
        setattr(layer, place, (channels,) if isinstance(layer, nn.LayerNorm) else channels)
    if isinstance(layer, _ConvNd):
        layer.groups = groups
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = groups
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (c_out,))
    if not isinstance(layer, tuple(_NORMALISING)):
        outer, inner = (c_in, c_out) if getattr(layer, "transposed", False) else (c_out, c_in)
        shapes["weight"] = (outer, inner // groups, *layer.weight.shape[2:])
    for name, shape in shapes.items():
        old = getattr(layer, name, None)
        if old is not None:
            new = torch.empty(shape, device=old.device, dtype=old.dtype)
            setattr(layer, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    layer.reset_parameters()
