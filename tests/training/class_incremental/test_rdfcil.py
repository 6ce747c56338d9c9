"""R-DFCIL's terms, by hand, and the two parts of its training."""

from __future__ import annotations

import math

import pytest
import torch
from class_incremental_task import WEIGHTS, batch, task, values_of
from torch.nn import functional as F

from dfcompress.training.class_incremental.rdfcil import Rdfcil, angles


def test_its_values_are_the_terms_of_both_parts():
    given = task()
    distiller = Rdfcil(given)
    found, student, old, _ = values_of(distiller, given)
    labels = torch.cat([old[:3].argmax(1), batch().labels[3:]])
    hard = (student[:3, :2] - old[:3]).abs().mean().item()
    assert found["hard"] == found["hard-head"] == pytest.approx(hard, rel=1e-4)
    over_all = student.log_softmax(1)[torch.arange(6), labels]
    assert found["refine"] == pytest.approx(-(over_all * WEIGHTS[labels]).mean().item(), rel=1e-4)
    shown = given.old.normalise(batch().images[3:]).flatten(1)
    of_student, of_old = (angles(embed(shown)) for embed in distiller.module)
    assert found["relations"] == pytest.approx(F.smooth_l1_loss(of_student, of_old).item(), rel=1e-4)


def test_angles_are_cosines_at_the_first_point():
    corner = angles(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
    assert corner[0, 1, 2] == 0
    assert corner[1, 0, 2] == pytest.approx(1 / math.sqrt(5))
    assert corner[0, 0].abs().sum() == 0


def test_the_last_fifth_of_the_steps_refines_the_last_layer_alone():
    distiller = Rdfcil(task(steps=10))
    learning, refining = [0.5 * 2, 0.15, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.15, 0.5]
    for step in range(10):
        assert distiller.weights.tolist() == pytest.approx(learning if step < 8 else refining)
        distiller.update(torch.zeros(5))
