"""Mean and variance of each channel, and their change carried over to a BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.models.layers import channel_axis

# Number of values per part, 2 MiB of doubles. In parts of this size the moments of features (16, 32, 112, 112) took an
# eighth of the time that they take in one part.
CACHED = 2**18
# A channel whose standard deviation after BatchNorm is below a millionth of its scale is not rescaled: a variance, in
# shares of the running variance plus eps.
STILL = 1e-12
# The greatest number of pixels of all images in one pass for statistics, and the smallest number of images, which
# overrides it. Our choice, not measured.
PIXELS, FEWEST = 2**20, 64


def images_for_statistics(size: Sequence[int], available: int) -> int:
    """The number of images of `size` (channels, height, width), at most `available`, that are enough for stable
    statistics and few enough for one pass.
    """
    _, height, width = size
    return min(available, max(FEWEST, PIXELS // (height * width)))


def channel_moments(layer: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `(C,)` of each channel of a layer's input or output `features`, in float64.

    A few images are converted at a time, so that their doubles stay in the processor's cache.
    """
    few = max(1, CACHED * len(features) // features.numel())
    parts = [images.movedim(channel_axis(layer), 0).flatten(1) for images in features.split(few)]
    count = sum(part.shape[1] for part in parts)
    mean = torch.stack([part.double().sum(1) for part in parts]).sum(0) / count
    squares = torch.stack([(part.double() - mean[:, None]).square().sum(1) for part in parts])
    return mean, squares.sum(0) / count


@torch.no_grad()
def renormalise(norm: _BatchNorm, features: Tensor, was_mean: Tensor, was_variance: Tensor) -> None:
    """Set a BatchNorm's running statistics so that each output channel keeps its mean and variance when the moments of
    its input change from `was_mean` and `was_variance`, each `(C,)`, to the moments of `features`.

    Only the *change* of the moments is carried over, so the images need not have the training data's statistics.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = channel_moments(norm, features)
    divisor = norm.running_var.double() + norm.eps
    moves = torch.minimum(variance, was_variance) > STILL * divisor
    # BatchNorm always adds eps to the variance, so its divisor cannot be smaller than eps.
    new_divisor = (divisor * torch.where(moves, variance / was_variance, 1.0)).clamp_min(norm.eps)
    norm.running_mean.copy_(mean + (norm.running_mean - was_mean) * (new_divisor / divisor).sqrt())
    norm.running_var.copy_(new_divisor - norm.eps)
