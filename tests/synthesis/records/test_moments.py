"""Streaming equals two passes, whatever the batches, the blocks and the processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcompress.synthesis.records.moments import StreamingMoments, merge_states, states


def streamed(vectors, labels, block, batch):
    moments = StreamingMoments(2, vectors.shape[1], block)
    for part, own in zip(vectors.split(batch), labels.split(batch), strict=True):
        moments.update(part, own)
    return moments


@given(
    count=st.integers(8, 40),
    units=st.integers(1, 9),
    block=st.integers(1, 9),
    batch=st.integers(1, 40),
    offset=st.floats(-1e4, 1e4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_streaming_equals_two_passes(count, units, block, batch, offset, seed):
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, units, generator=random) + offset
    labels = torch.arange(count) % 2
    moments = streamed(vectors, labels, block, batch)
    for label in range(2):
        own = vectors[labels == label].double()
        covariance = torch.atleast_2d(own.T.cov())
        torch.testing.assert_close(moments.mean[label], own.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.variance[label], covariance.diagonal(), rtol=1e-7, atol=1e-9)
        for number, found in enumerate(moments.covariance(label)):
            first = number * moments.block
            expected = covariance[first : first + moments.block, first : first + moments.block]
            torch.testing.assert_close(found[: len(expected), : len(expected)], expected, rtol=1e-7, atol=1e-9)


def test_a_large_mean_costs_no_digits():
    vectors = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = StreamingMoments(1, 3, 3)
    for part in (vectors + 1e7).split(100):
        moments.update(part)
    torch.testing.assert_close(moments.covariance(0)[0], vectors.T.cov(), rtol=1e-6, atol=1e-6)


def test_two_halves_merged_are_the_whole():
    random = torch.Generator().manual_seed(0)
    vectors, labels = torch.randn(50, 5, generator=random), torch.arange(50) % 2
    whole = streamed(vectors, labels, 3, 10)
    first, second = streamed(vectors[:20], labels[:20], 3, 10), streamed(vectors[20:], labels[20:], 3, 10)
    merge_states({"x": first}, states({"x": second}))
    assert torch.equal(first.count, whole.count)
    for label in range(2):
        torch.testing.assert_close(first.covariance(label), whole.covariance(label))


def test_a_class_that_was_not_seen_merges_nothing():
    seen, nothing = StreamingMoments(1, 2, 2), StreamingMoments(1, 2, 2)
    seen.update(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    expected = seen.covariance(0).clone()
    merge_states({"x": seen}, states({"x": nothing}))
    assert torch.equal(seen.covariance(0), expected)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_the_last_block_is_filled_up(block):
    moments = StreamingMoments(1, 7, block)
    moments.update(torch.randn(20, 7))
    assert moments.mean.shape == moments.variance.shape == (1, 7)
    assert moments.covariance(0).shape == (-(-7 // block), block, block)
