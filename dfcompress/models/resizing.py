"""The same network with half the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def halved(network: nn.Module) -> nn.Module:
    """The network itself, every layer changed to half the channels (rounded up), but for what goes in and comes out.

    Weights start anew, as each layer's own class initialises them. Networks whose forward pass counts channels itself
    (transformers, for instance) cannot run afterwards.
    """
    weighted = [module for module in network.modules() if isinstance(module, _ConvNd | nn.Linear)]
    for module in network.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            _halve_weighted(module, keep_in=module is weighted[0], keep_out=module is weighted[-1])
        elif isinstance(module, _BatchNorm):
            module.num_features = _half(module.num_features)
            _renew(module, (module.num_features,))
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = _half(module.num_channels)
            module.num_groups = min(module.num_groups, module.num_channels)
            _renew(module, (module.num_channels,))
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            module.normalized_shape = (_half(module.normalized_shape[0]),)
            _renew(module, module.normalized_shape)
    return network


def _half(count: int) -> int:
    return (count + 1) // 2


def _halve_weighted(layer: Any, *, keep_in: bool, keep_out: bool) -> None:
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    taken, given = (getattr(layer, name) for name in names)
    groups = getattr(layer, "groups", 1)
    if groups > 1 and groups == taken:  # Depthwise: as many groups as channels.
        layer.groups = groups = _half(groups)
    taken, given = taken if keep_in else _half(taken), given if keep_out else _half(given)
    setattr(layer, names[0], taken)
    setattr(layer, names[1], given)
    outer, inner = (taken, given) if getattr(layer, "transposed", False) else (given, taken)
    shape = (outer, inner // groups, *layer.weight.shape[2:])
    layer.weight = nn.Parameter(torch.empty(shape, device=layer.weight.device))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(given, device=layer.bias.device))
    layer.reset_parameters()


def _renew(norm: Any, shape: tuple[int, ...]) -> None:
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, nn.Parameter(torch.empty(shape, device=parameter.device)))
    for name, buffer in list(norm.named_buffers(recurse=False)):
        if buffer.dim():
            setattr(norm, name, torch.empty(shape, device=buffer.device))
    norm.reset_parameters()
