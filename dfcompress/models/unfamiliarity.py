"""How foreign single images are to a network, by what it remembers of its training data."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dfcompress.models.batchnorms import eps_of
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.recorder import channels_first, input_record
from dfcompress.models.statistics import statistics_layers, why_no_statistics

FLOOR = 1e-3


class Unfamiliarity:
    """Inside this context every forward pass of `classifier` leaves here how foreign its images are to it.

    That is KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) between an image's own features (hats) and what a layer remembers, the mean over its
    channels, and over the layers that see several positions of an image; a thousandth of σ² is added to σ̂².
    It must be entered before the network is compiled.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._layers = _layers_of_several_positions(classifier)
        self._seen: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def is_known(self) -> bool:
        """Whether there is a layer that tells."""
        return bool(self._layers)

    def __enter__(self) -> Self:
        for place, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._noting(place)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def taken(self) -> Tensor:
        """Of the images of the last pass, `(N,)`, 0 for what is just as the layers remember it."""
        return torch.stack([self._seen[place] for place in range(len(self._layers))]).mean(0)

    def _noting(self, place: int) -> Callable[..., None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            record = input_record(layer, inputs[0])
            remembered = record.running_var + eps_of(layer)  # A dead channel has no variance.
            var = (record.square_error - record.mean_error**2).clamp_min(0) / remembered + FLOOR
            distance = record.mean_error**2 / remembered
            self._seen[place] = 0.5 * (distance + var - 1 - var.log()).mean(1)

        return note


def _layers_of_several_positions(classifier: Classifier) -> list[nn.Module]:
    """In fully connected layers, and after pooling, an image has no variance of its own."""
    if why_no_statistics(classifier.network):
        return []
    found: list[nn.Module] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if channels_first(layer, inputs[0]).shape[2:].numel() > 1:
            found.append(layer)

    layers = statistics_layers(classifier)
    pass_once(classifier, [layer.register_forward_pre_hook(note) for layer in layers])
    return [layer for layer in layers if layer in found]
