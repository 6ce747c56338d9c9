"""Mean and variance of each channel, and a BatchNorm that takes over how these changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.models.layers import channel_axis

# Values, 2 MiB of doubles: features (16, 32, 112, 112) took an eighth of the time they take at once.
CACHED = 2**18
# A channel whose deviation behind BatchNorm is below a millionth of its scale has nothing to be rescaled by.
STILL = 1e-12
# Of all images that a network is shown at once for statistics, and the fewest images. Our choice, not measured.
PIXELS, FEWEST = 2**20, 64


def images_for_statistics(size: Sequence[int], available: int) -> int:
    """How many of the available images of `size` (channels, height, width) are enough for stable statistics and few
    enough to be seen at once.
    """
    _, height, width = size
    return min(available, max(FEWEST, PIXELS // (height * width)))


def channel_moments(layer: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel `(C,)` of what goes into or out of a layer, in float64, of a few images at a
    time, whose doubles stay in the processor's cache.
    """
    few = max(1, CACHED * len(features) // features.numel())
    parts = [images.movedim(channel_axis(layer), 0).flatten(1) for images in features.split(few)]
    count = sum(part.shape[1] for part in parts)
    mean = torch.stack([part.double().sum(1) for part in parts]).sum(0) / count
    squares = torch.stack([(part.double() - mean[:, None]).square().sum(1) for part in parts])
    return mean, squares.sum(0) / count


@torch.no_grad()
def renormalise(norm: _BatchNorm, features: Tensor, was_mean: Tensor, was_variance: Tensor) -> None:
    """Give a BatchNorm that is about to see `features` the statistics with which every channel behind it has the mean
    and the variance that it had when the moments were `was_mean` and `was_variance`, each `(C,)`.

    It takes over the *change* alone, so the images need not have the statistics of the training data.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = channel_moments(norm, features)
    divisor = norm.running_var.double() + norm.eps
    moves = torch.minimum(variance, was_variance) > STILL * divisor
    # BatchNorm adds eps whatever the variance, so it cannot divide by less.
    new_divisor = (divisor * torch.where(moves, variance / was_variance, 1.0)).clamp_min(norm.eps)
    norm.running_mean.copy_(mean + (norm.running_mean - was_mean) * (new_divisor / divisor).sqrt())
    norm.running_var.copy_(new_divisor - norm.eps)
