"""The OOD score of single images: the distance of an image's features from a network's BatchNorm statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfcompress.models.batchnorms import eps_of
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.recorder import channels_first, input_moments
from dfcompress.models.statistics import named_statistics_layers, why_no_statistics

FLOOR = 1e-3
Measure = Callable[[Tensor, Tensor], Tensor]


def divergence(distance: Tensor, quotient: Tensor) -> Tensor:
    """KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) of every channel, from (μ̂ − μ)² / σ² and σ̂² / σ²."""
    return 0.5 * (distance + quotient - 1 - quotient.log())


def spread(_: Tensor, quotient: Tensor) -> Tensor:
    """(log(σ̂² / σ²))² of every channel."""
    return quotient.log().square()


class OodScore:
    """Computes the OOD scores of the images of each forward pass of `classifier` while attached to it.

    The score compares the moments of an image's own features (hats) with a layer's running statistics, by a `measure`
    per channel. It is the mean over channels and over the layers that have several positions per image, or, with
    `last_layer`, over the channels of the last of these layers. `FLOOR` (0.001) is added to σ̂² / σ².

    To find images of another kind, `spread` in the last layer was chosen on ResNet-20 with training images: among 800
    images of CIFAR-10 and 100 of another set, the 100 highest scores contain 84 of MNIST's 100 images, or 87 of
    Fashion-MNIST's; with `divergence` in all layers they contain 22 and 27.
    """

    def __init__(self, classifier: Classifier, measure: Measure = divergence, *, last_layer: bool = False) -> None:
        self._network, self._measure = classifier.network, measure
        layers = [*_layers_of_several_positions(classifier).items()]
        self._layers = dict(layers[-1:] if last_layer else layers)
        self._seen: dict[str, Tensor] = {}

    @property
    def is_known(self) -> bool:
        """Whether the network has a layer with statistics that an image can be compared with."""
        return bool(self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context, every forward pass stores its scores; enter it before the network is compiled."""
        with hooked_inputs(self._network, self._layers, self._note):
            try:
                yield
            finally:
                self._seen.clear()

    def taken(self) -> Tensor:
        """The scores `(N,)` of the last pass; `divergence` is near 0 if an image has exactly the running statistics."""
        return torch.stack([self._seen[name] for name in self._layers]).mean(0)

    def _note(self, name: str, features: Tensor) -> None:
        layer = self._layers[name]
        record = input_moments(layer, features)
        remembered = record.running_var + eps_of(layer)  # A dead channel has a variance of 0.
        quotient = (record.square_error - record.mean_error**2).clamp_min(0) / remembered + FLOOR
        self._seen[name] = self._measure(record.mean_error**2 / remembered, quotient).mean(1)


def _layers_of_several_positions(classifier: Classifier) -> dict[str, nn.Module]:
    """The layers with known statistics that have several positions per image, in the order of a pass.

    In fully connected layers, and after global pooling, an image has no variance of its own.
    """
    if why_no_statistics(classifier.network):
        return {}
    layers, found = named_statistics_layers(classifier.network), dict[str, nn.Module]()

    def note(name: str, features: Tensor) -> None:
        images, _, *positions = channels_first(layers[name], features).shape
        if images == 1 and math.prod(positions) > 1:  # Otherwise a row is not a whole image.
            found[name] = layers[name]

    with hooked_inputs(classifier.network, layers, note):
        pass_once(classifier)
    return found
