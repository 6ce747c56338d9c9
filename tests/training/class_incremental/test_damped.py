"""What distinguishes damped balance from ABD: a share of one gradient."""

from __future__ import annotations

import torch
from class_incremental_task import batch, task

from dfcompress.training.class_incremental.damped import METHOD


def test_three_tenths_of_the_balancing_gradient_reach_the_features():
    given = task()
    distiller, shown = METHOD.distiller(given), batch()
    shown.images.requires_grad_(True)
    with distiller.attached(given.student):
        values = distiller.losses(given.student, shown, distiller.targets(shown))
    (damped,) = torch.autograd.grad(values[2], shown.images)
    distiller.passed = 1.0
    with distiller.attached(given.student):
        values = distiller.losses(given.student, shown, distiller.targets(shown))
    (whole,) = torch.autograd.grad(values[2], shown.images)
    assert whole.abs().sum() > 0
    assert torch.allclose(damped, 0.3 * whole, atol=1e-7)
