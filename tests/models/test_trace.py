"""Moments of recorded layers, and traces of parts of what went through a network together."""

from __future__ import annotations

import math

import pytest
import torch

from dfcompress.models.recorder import moments_of
from dfcompress.models.trace import LayerMoments, Moments, Recording, Target, traces


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 3)])
def test_moments_are_the_mean_and_the_biased_variance_of_each_channel(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 100
    running_mean = torch.tensor([90.0, 100.0, 110.0])
    measured = Moments.of([moments_of(features, running_mean, torch.ones(3))])
    channels = features.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(measured.mean_error.double(), channels.mean(1) - running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(measured.var.double(), channels.var(1, correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_dead_channel_counts_as_the_kl_of_variances_with_batchnorms_eps(eps):
    """KL(N(0.01, 1e-4 + eps) ‖ N(0, eps)), beside a live channel, which is the paper's."""
    features = torch.tensor([[0.0, 3.0], [0.02, 1.0]])
    record = moments_of(features, torch.zeros(2), torch.tensor([0.0, 2.0]), eps)
    dead = 0.5 * (math.log(eps / (1e-4 + eps)) + (1e-4 + eps + 1e-4) / eps - 1)
    live = 0.5 * (math.log(2.0 / 1.0) + (1 + 4) / 2.0 - 1)
    assert Moments.of([record]).divergences().item() == pytest.approx((dead + live) / 2, rel=1e-3)


def test_what_a_dead_channel_always_was_is_no_distance_from_it():
    record = moments_of(torch.full((4, 1), 7.0), torch.full((1,), 7.0), torch.zeros(1))
    assert Moments.of([record]).divergences().item() == pytest.approx(0.0, abs=1e-5)


def test_batches_side_by_side_have_the_traces_of_each_alone_with_labels_and_targets_for_every_copy():
    """Two batches of two images, each shown twice: the first batch's copies come before the second's."""
    random = torch.Generator().manual_seed(0)
    images, logits, values = (torch.randn(8, size, generator=random) for size in (3, 4, 5))
    layer = LayerMoments(values, values.square() + 1, torch.ones(5), torch.zeros(5))
    recording = Recording(logits, (layer,), {"a": values}, {"b": values}, {"c": values}, values)
    labels, targets = torch.arange(4), {"a": Target(torch.arange(20.0).view(4, 5), torch.tensor(2.0))}
    both = traces(images, labels, recording, targets=targets, student_logits=-logits, groups=2)
    for trace, rows, own in zip(both, (slice(0, 4), slice(4, 8)), ([0, 1, 0, 1], [2, 3, 2, 3]), strict=True):
        assert trace.labels.tolist() == own
        assert trace.targets["a"].values[:, 0].tolist() == [5 * label for label in own]
        assert trace.targets["a"].scale == 2
        part = layer._replace(mean_error=values[rows], square_error=layer.square_error[rows])
        torch.testing.assert_close(trace.moments.divergences(), Moments.of([part]).divergences())
        for found in (trace.outputs["a"], trace.channel_means["b"], trace.patches["c"], trace.penultimate):
            assert torch.equal(found, values[rows])
        assert torch.equal(trace.images, images[rows])
        assert torch.equal(trace.student_logits, -logits[rows])
