"""`Classifier`: a network and its card. Nothing else in the code knows a mean or a standard deviation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfcompress.models.card import ModelCard


class Classifier(nn.Module):
    """A network that takes images in [0, 1] because it owns the normalisation its weights expect.

    `network` takes normalised images `(N, C, H, W)` and returns logits `(N, classes)`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, card: ModelCard) -> None:
        super().__init__()
        self.network = network
        self.card = card
        self.register_buffer("mean", torch.tensor(card.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, C, H, W)` in [0, 1]."""
        return self.network(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] → the space the network works in."""
        return (images - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """The network's space → images in [0, 1]."""
        return images * self.std + self.mean

    def frozen(self) -> Classifier:
        """Itself in evaluation mode, no parameter asking for a gradient."""
        return self.eval().requires_grad_(False)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
