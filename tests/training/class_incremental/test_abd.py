"""ABD's three terms, by hand, and what each of them trains."""

from __future__ import annotations

import pytest
import torch
from class_incremental_task import WEIGHTS, batch, task, values_of

from dfcompress.training.class_incremental.abd import AlwaysBeDreaming


def test_its_values_are_the_three_terms():
    given = task()
    found, student, old, _ = values_of(AlwaysBeDreaming(given), given)
    labels = torch.cat([old[:3].argmax(1), batch().labels[3:]])
    among_new = student[4:, 2:].log_softmax(1)[torch.arange(2), labels[4:] - 2]
    assert found["new"] == pytest.approx(-(among_new * WEIGHTS[labels[4:]]).mean().item(), rel=1e-4)
    over_all = student.log_softmax(1)[torch.arange(6), labels]
    assert found["balance"] == pytest.approx(-(over_all * WEIGHTS[labels]).mean().item(), rel=1e-4)
    # Features are the images themselves here, so the old last layer gives the old logits.
    assert found["features"] == pytest.approx(0.0, abs=1e-9)


def test_a_refined_last_layer_sends_no_gradient_further():
    given = task()
    distiller, shown = AlwaysBeDreaming(given), batch()
    shown.images.requires_grad_(True)
    with distiller.attached(given.student):
        values = distiller.losses(given.student, shown, distiller.targets(shown))
    (balance,) = torch.autograd.grad(values[2], shown.images, retain_graph=True)
    (new,) = torch.autograd.grad(values[0], shown.images)
    assert balance.abs().sum() == 0
    assert new.abs().sum() > 0
