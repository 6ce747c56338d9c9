"""The four terms of DeepInversion's class-incremental loss, by hand."""

from __future__ import annotations

import pytest
import torch
from class_incremental_task import WEIGHTS, batch, task, values_of

from dfcompress.training.class_incremental.deepinversion import DeepInversion


def kl(target, logits):
    return (target * (target.log() - logits)).sum(1).mean().item()


def test_its_values_are_the_four_terms():
    given = task()
    distiller = DeepInversion(given)
    found, student, old, expert = values_of(distiller, given)
    over_all, labels = student.log_softmax(1), batch().labels
    assert found["kd"] == pytest.approx(kl(old[:3].softmax(1), over_all[:3, :2]), rel=1e-4)
    picked = over_all[torch.arange(3, 6), labels[3:]]
    assert found["ce"] == pytest.approx(-(picked * WEIGHTS[labels[3:]]).mean().item(), rel=1e-4)
    assert found["kd-new"] == pytest.approx(kl(expert[3:].softmax(1), student[3:, 2:].log_softmax(1)), rel=1e-4)
    assert found["kd-old"] == pytest.approx(kl(old[3:].softmax(1), student[3:, :2].log_softmax(1)), rel=1e-4)
    assert distiller.weights.tolist() == [0.5] * 4, "half of the classes are old"
