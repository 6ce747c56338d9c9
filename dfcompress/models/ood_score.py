"""The OOD score of single images: how far they are from what a network's BatchNorms remember of its training data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfcompress.models.batchnorms import eps_of
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.recorder import channels_first, input_moments
from dfcompress.models.statistics import named_statistics_layers, why_no_statistics

FLOOR = 1e-3


class BatchNormOodScore:
    """The OOD scores of the images of a forward pass of `classifier`, while the score is attached to it.

    The score is KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) between an image's own features (hats) and what a layer remembers, the mean
    over its channels, and over the layers that see several positions of an image; a thousandth of σ² is added to σ̂².
    """

    def __init__(self, classifier: Classifier) -> None:
        self._network = classifier.network
        self._layers = _layers_of_several_positions(classifier)
        self._seen: dict[str, Tensor] = {}

    @property
    def is_known(self) -> bool:
        """Whether a layer remembers statistics that an image can be compared with."""
        return bool(self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every forward pass leaves its images' score for `taken`; enter it before the network is compiled."""
        with hooked_inputs(self._network, self._layers, self._note):
            try:
                yield
            finally:
                self._seen.clear()

    def taken(self) -> Tensor:
        """The scores of the last pass, `(N,)`, 0 for an image that is just as the layers remember."""
        return torch.stack([self._seen[name] for name in self._layers]).mean(0)

    def _note(self, name: str, features: Tensor) -> None:
        layer = self._layers[name]
        record = input_moments(layer, features)
        remembered = record.running_var + eps_of(layer)  # A dead channel has no variance.
        var = (record.square_error - record.mean_error**2).clamp_min(0) / remembered + FLOOR
        distance = record.mean_error**2 / remembered
        self._seen[name] = 0.5 * (distance + var - 1 - var.log()).mean(1)


class SpreadScore:
    """How unusual the features of single images spread in the last layer of `classifier` that sees several positions of
    an image, for every forward pass while the score is attached.

    The score is the mean of (log(σ̂² / σ²))² over the channels of that layer, σ̂² over an image's own positions, σ² what
    the layer remembers; a thousandth is added to the quotient. Chosen on ResNet-20 with training images: of 100 images
    of MNIST among 800 of CIFAR-10 its first 100 are 84, of Fashion-MNIST 87; those of `BatchNormOodScore` 22 and 27.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._network = classifier.network
        self._layers = dict([*_layers_of_several_positions(classifier).items()][-1:])
        self._seen: Tensor | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is such a layer."""
        return bool(self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every forward pass leaves its images' scores for `taken`."""
        with hooked_inputs(self._network, self._layers, self._note):
            yield

    def taken(self) -> Tensor:
        """The scores of the last pass, `(N,)`."""
        assert self._seen is not None, "no pass has left scores"
        return self._seen

    def _note(self, name: str, features: Tensor) -> None:
        layer = self._layers[name]
        record = input_moments(layer, features)
        quotient = (record.square_error - record.mean_error**2).clamp_min(0) / (record.running_var + eps_of(layer))
        self._seen = (quotient + FLOOR).log().square().mean(1)


def _layers_of_several_positions(classifier: Classifier) -> dict[str, nn.Module]:
    """In fully connected layers, and after pooling, an image has no variance of its own."""
    if why_no_statistics(classifier.network):
        return {}
    found: set[str] = set()
    layers = named_statistics_layers(classifier.network)

    def note(name: str, features: Tensor) -> None:
        if channels_first(layers[name], features).shape[2:].numel() > 1:
            found.add(name)

    with hooked_inputs(classifier.network, layers, note):
        pass_once(classifier)
    return {name: layer for name, layer in layers.items() if name in found}
