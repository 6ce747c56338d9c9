"""Views are linear, and their adjoints are true ones: ⟨view(x), y⟩ = ⟨x, adjoint(y)⟩."""

from __future__ import annotations

import pytest
import torch

from dfcompress.data.views import random_flip, random_roll
from dfcompress.randomness import generator


@pytest.mark.parametrize("view", [random_roll(2), random_flip(1.0), random_flip(0.0)])
@pytest.mark.parametrize("step", range(3))
def test_the_adjoint_carries_gradients_back(view, step):
    random = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 2, 3, 5, 5, generator=random)
    seen, adjoint = view(x, generator(0, step))
    assert (seen * y).sum().item() == pytest.approx((x * adjoint(y)).sum().item(), rel=1e-4)


def test_a_roll_moves_the_whole_batch_by_one_offset_within_its_bound():
    image = torch.zeros(2, 1, 9, 9)
    image[:, :, 4, 4] = 1
    offsets = set()
    for step in range(60):
        seen, _ = random_roll(2)(image, generator(step))
        first, second = (seen[i, 0].nonzero()[0] - 4 for i in (0, 1))
        assert torch.equal(first, second)
        offsets.add(tuple(first.tolist()))
    assert {down for down, _ in offsets} == {right for _, right in offsets} == {-2, -1, 0, 1, 2}


def test_a_flip_mirrors_left_and_right():
    image = torch.arange(4.0).view(1, 1, 1, 4)
    assert random_flip(1.0)(image, generator(0))[0].flatten().tolist() == [3.0, 2.0, 1.0, 0.0]
