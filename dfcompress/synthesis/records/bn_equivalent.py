"""The statistics that a BatchNorm would have stored: mean and variance of every channel of layers' outputs.

A network without BatchNorm has no statistics of its training data; with this record, every recipe that matches
BatchNorm statistics matches the recorded statistics in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.models.layers import channel_axis, channels_of, weighted_layers
from dfcompress.models.statistics import KnownStatistics, require_variances
from dfcompress.synthesis.records.moments import StreamingMoments, merge_states, states
from dfcompress.synthesis.records.record_file import Record


class StatisticsAccumulator:
    """Sums over the channels of layers' outputs; `outputs` holds one image's outputs `(1, ...)` by layer."""

    flat = False

    def __init__(self, network: nn.Module, outputs: Mapping[str, Tensor]) -> None:
        self._axes = {layer: channel_axis(network.get_submodule(layer)) for layer in outputs}
        channels = {layer: channels_of(network.get_submodule(layer)) for layer in outputs}
        self._moments = {layer: StreamingMoments(1, count, 1) for layer, count in channels.items()}
        self.bytes, self.memory_bytes = 8 * sum(channels.values()), 16 * sum(channels.values())

    def update(self, outputs: Sequence[Tensor], labels: Tensor, numbers: Tensor) -> None:
        """Add the layers' outputs, every position as a separate sample."""
        for (layer, moments), output in zip(self._moments.items(), outputs, strict=True):
            moments.update(output.movedim(self._axes[layer], -1).flatten(0, -2))

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return states(self._moments)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums of another process."""
        merge_states(self._moments, state)

    def tensors(self) -> dict[str, Tensor]:
        """`mean.<layer>` and `var.<layer>`, `(C,)`, fp32."""
        means = {f"mean.{layer}": moments.mean[0].float() for layer, moments in self._moments.items()}
        return means | {f"var.{layer}": moments.variance[0].float() for layer, moments in self._moments.items()}

    def details(self) -> dict[str, Any]:
        """No fields."""
        return {}

    def notices(self) -> list[str]:
        """No notices."""
        return []


def with_statistics(teacher: Classifier, record: Record) -> Classifier:
    """A copy of the teacher whose layers know the recorded statistics, as BatchNorm layers know theirs.

    A channel with constant output is treated as one of small variance, as BatchNorm treats it. Raises `BadInput` if the
    record does not fit the network or holds a negative variance.
    """
    network = copy.deepcopy(teacher.network)
    found, names = weighted_layers(network), list(network.named_modules(remove_duplicate=False))
    for layer in record.about.layers:
        if layer not in found:
            raise BadInput(f"{record.path} knows a layer {layer!r}, which {teacher.name} has not.", "Record again.")
        module = found[layer]
        channels = (channels_of(module),)
        record.require({f"{moment}.{layer}": (torch.float32, channels) for moment in ("mean", "var")})
        mean, var = (record.tensors[f"{moment}.{layer}"] for moment in ("mean", "var"))
        with_statistics = _WithStatistics(module, KnownStatistics(mean, var, axis=channel_axis(module)))
        for place in [place for place, each in names if each is module]:
            network.set_submodule(place, with_statistics)
    require_variances(network, f"{record.path}")
    sha256 = teacher.identity()["sha256"]
    informed = Classifier(network, teacher.card, name=teacher.name, sha256=sha256, path=teacher.path)
    return informed.to(teacher.mean.device).frozen()


class _WithStatistics(nn.Sequential):
    """A layer and the statistics of its output; it has the layer's attributes, too: networks read `layer.weight`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("0"), name)
