"""Each loss equals the value worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dfcompress.models.recorder import Moments, Trace, moments_of
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy, image_norm, total_variation


def trace(images=None, logits=None, labels=None, moments=()):
    return Trace(images, labels, logits, tuple(moments))


def test_cross_entropy_of_even_logits_is_the_logarithm_of_the_classes():
    value = class_cross_entropy().value(trace(logits=torch.zeros(2, 4), labels=torch.tensor([0, 3])))
    assert value.item() == pytest.approx(math.log(4))


def test_bn_distance_sums_unsquared_norms_over_layers():
    first = Moments(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([1.0, 1.0]))
    second = Moments(torch.tensor([0.0]), torch.tensor([3.0]), torch.zeros(1), torch.tensor([1.0]))
    assert bn_distance().value(trace(moments=[first, second])).item() == pytest.approx(5.0 + 0.0 + 0.0 + 2.0)


def test_total_variation_is_the_norm_over_the_whole_batch_in_four_directions():
    image = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).expand(2, 1, 2, 2)
    right, down = math.sqrt(2 * (1 + 4)), math.sqrt(2 * (4 + 9))
    diagonals = math.sqrt(2 * 16) + math.sqrt(2 * 1)
    assert total_variation().value(trace(images=image)).item() == pytest.approx(right + down + diagonals)


def test_image_norm_runs_over_the_whole_batch():
    assert image_norm().value(trace(images=torch.ones(4, 1, 2, 2))).item() == pytest.approx(4.0)


def test_a_weight_multiplies_and_keeps_the_name():
    loss = 2.0 * (3.0 * image_norm())
    assert (loss.name, loss.weight) == ("image_norm", 6.0)


def test_divergence_is_the_kl_between_gaussians():
    """KL(N(1, 4) ‖ N(0, 1)) = ½(4 + 1 − 1 − ln 4)."""
    moments = Moments(torch.tensor([1.0]), torch.tensor([4.0]), torch.zeros(1), torch.ones(1))
    assert moments.divergence().item() == pytest.approx(0.5 * (4 + 1 - 1 - math.log(4)))


def test_divergence_of_equal_moments_is_zero():
    moments = Moments(torch.zeros(3), torch.full((3,), 2.0), torch.ones(3), torch.full((3,), 2.0))
    assert moments.divergence().item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 3)])
def test_moments_are_the_mean_and_the_biased_variance_of_each_channel(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 100
    running_mean = torch.tensor([90.0, 100.0, 110.0])
    moments = moments_of(features, running_mean, torch.ones(3))
    channels = features.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.mean_error.double(), channels.mean(1) - running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.var.double(), channels.var(1, correction=0), rtol=1e-4, atol=1e-4)
