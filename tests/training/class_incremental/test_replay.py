"""Batches of replayed and of new images."""

from __future__ import annotations

import pytest
import torch

from dfcompress.training.class_incremental.method import NEW, OLD
from dfcompress.training.class_incremental.replay import Replay, class_weights, parts_of
from dfcompress.training.settings import Training

TRAINING = Training(steps=1, lr=0.1, batch_size=16)


def images(count, value):
    return torch.full((count, 1, 2, 2), value, dtype=torch.uint8)


def test_a_batch_holds_old_and_new_images_in_the_shares_of_their_classes():
    old, new = (images(40, 0), torch.arange(40) % 6), (images(3, 255), torch.tensor([6, 7, 7]))
    source = Replay(old, new, TRAINING, old_share=0.75, seed=0)
    batch = source.batch(5)
    assert source.batch_size == len(batch.images) == 16
    assert batch.sources.tolist() == [OLD] * 12 + [NEW] * 4, "three new images fill four places"
    assert (batch.images.flatten(1)[:, 0] == batch.sources).all()
    assert set(batch.labels[:12].tolist()) <= set(range(6))
    assert set(batch.labels[12:].tolist()) <= {6, 7}
    assert torch.equal(source.batch(5).labels, batch.labels)


@pytest.mark.parametrize(("share", "parts"), [(0.5, (8, 8)), (0.99, (12, 4)), (0.01, (4, 12))])
def test_neither_side_has_less_than_a_quarter(share, parts):
    assert parts_of(16, share) == parts


def test_without_old_images_all_are_new():
    batch = Replay(None, (images(20, 9), torch.zeros(20, dtype=torch.long)), TRAINING, old_share=0.5, seed=0).batch(0)
    assert batch.sources.tolist() == [NEW] * 16


def test_weighted_classes_count_the_same():
    """Twelve places of 16 for six old classes, four for new ones of which one has three times as many images."""
    weights = class_weights(torch.tensor([6, 7, 7, 7]), 8, 6, 16)
    expected = torch.tensor([2.0] * 6 + [1.0, 3.0])
    assert torch.allclose(weights * expected, torch.full((8,), 2.0))
