"""Objectives equal the values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dfcompress.training.objectives import kd


def test_kd_is_the_softened_divergence_times_the_temperature_squared():
    """p = (¾, ¼) at τ = 2 against (½, ½): τ²·(¾ ln 3/2 + ¼ ln 1/2)."""
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kd(2.0).value(torch.zeros(1, 2), teacher).item() == pytest.approx(expected, rel=1e-5)


def test_kd_of_equal_answers_is_zero_and_its_mean_runs_over_the_batch():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert kd(4.0).value(logits, logits).item() == pytest.approx(0.0, abs=1e-6)
    other = logits.flip(0)
    doubled = kd(4.0).value(torch.cat([other, other]), torch.cat([logits, logits]))
    assert doubled.item() == pytest.approx(kd(4.0).value(other, logits).item(), rel=1e-5)


def test_a_weight_multiplies_and_keeps_the_name():
    objective = 0.5 * kd(4.0)
    assert (objective.name, objective.weight) == ("kd", 0.5)
