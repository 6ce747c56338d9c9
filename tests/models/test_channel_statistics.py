"""Moments of channels, and BatchNorms that take over how these changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.models.channel_statistics import CACHED, channel_moments, images_for_statistics, renormalise


@pytest.mark.parametrize(
    ("layer", "shape", "others"),
    [
        (nn.Conv2d(3, 5, 1), (7, 5, 160, 160), (0, 2, 3)),
        (nn.Linear(3, 5), (7, 9, 5), (0, 1)),
        (nn.Linear(3, 5), (7, 5), 0),
    ],
)
def test_moments_in_parts_are_those_of_all_values_in_doubles(layer, shape, others):
    activations = 100 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert shape[2:] != (160, 160) or activations.numel() > 2 * CACHED
    mean, variance = channel_moments(layer, activations)
    expected_variance, expected_mean = torch.var_mean(activations.double(), others, correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("size", "available", "count"), [((3, 32, 32), 960, 960), ((3, 32, 32), 5000, 1024), ((3, 224, 224), 960, 64)]
)
def test_as_many_images_as_memory_allows_and_never_too_few(size, available, count):
    assert images_for_statistics(size, available) == count


@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0], ids=["as before", "nearly still", "still"])
def test_a_channel_keeps_its_mean_whatever_is_left_of_its_spread(spread):
    random = torch.Generator().manual_seed(0)
    before = 2 + torch.randn(64, 3, 4, 4, generator=random)
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.fill_(1.5)
    norm.running_var.fill_(0.8)
    with torch.no_grad():
        was = norm(before).mean((0, 2, 3))
        now = 5 + spread * (before - 2)
        renormalise(norm, now, *channel_moments(norm, before))
        torch.testing.assert_close(norm(now).mean((0, 2, 3)), was, rtol=1e-3, atol=1e-3)
    if spread == 1.0:
        torch.testing.assert_close(
            norm(now), nn.functional.batch_norm(before, *[torch.full((3,), v) for v in (1.5, 0.8)])
        )
