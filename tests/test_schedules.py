"""Schedules equal their formulas, to the bit those of before they stood in one place."""

from __future__ import annotations

import math

import pytest

from dfcompress.quantization.reconstruction import BETA, Reconstruction, _beta
from dfcompress.schedules import cosine, rate
from dfcompress.synthesis.recipe import Phase
from dfcompress.training.settings import Training


def test_a_rate_warms_up_linearly_and_then_follows_its_schedule():
    asked = {"peak": 2.0, "steps": 10, "warmup": 2}
    assert [rate(step, schedule="constant", **asked) for step in (0, 1, 2, 9)] == [1.0, 2.0, 2.0, 2.0]
    assert [rate(step, schedule="cosine", **asked) for step in (0, 1, 2, 6)] == pytest.approx([1.0, 2.0, 2.0, 1.0])
    several = {"schedule": "multistep", "milestones": (0.5, 0.8), "gamma": 0.1}
    assert [rate(step, **asked, **several) for step in (0, 4, 5, 8)] == pytest.approx([1.0, 2.0, 0.2, 0.02])


def test_a_cosine_goes_from_first_to_last_with_the_mean_in_the_middle():
    assert [cosine(done, 4, first=20.0, last=2.0) for done in (0, 2, 4)] == pytest.approx([20.0, 11.0, 2.0])


@pytest.mark.parametrize("steps", [7, 300])
def test_phases_trainings_and_reconstructions_keep_their_numbers_to_the_bit(steps):
    """The formula as each of the three wrote it for itself; other numbers would be other images and other weights."""
    phase = Phase(steps, 0.1, schedule="cosine", warmup=3)
    training = Training(steps=steps, lr=0.07, batch_size=1, warmup=0.05)
    warmup = max(1, round(0.05 * steps))
    rounding, (first, last) = Reconstruction(steps=steps), BETA
    for step in range(3, steps):
        assert phase.rate(step) == 0.1 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (steps - 3)))
        if step >= warmup:
            expected = 0.07 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
            assert training.rate(step) == expected
        progress = (step / steps - 0.2) / (1 - 0.2)
        assert _beta(step, rounding) == last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
