"""The layers of a network that have weights, and the channel axis of their outputs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_outputs


def weighted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, in order of definition."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _ConvNd | nn.Linear)}


@torch.no_grad()
def last_weighted_layer(classifier: Classifier) -> str:
    """The name of the weighted layer that runs last in a pass: in most networks the final linear layer."""
    ran: list[str] = []
    layers = weighted_layers(classifier.network)
    with hooked_outputs(classifier.network, layers, lambda name, output: ran.append(name)):
        pass_once(classifier)
    return ran[-1]


def channels_of(layer: nn.Module) -> int:
    """The number of channels of a weighted layer's output; 0 for other layers."""
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))


def channel_axis(layer: nn.Module) -> int:
    """The channel axis of a layer's output: -1 for a linear layer, else 1."""
    return -1 if isinstance(layer, nn.Linear) else 1
