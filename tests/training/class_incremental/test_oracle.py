"""The oracle's weighted cross-entropy, by hand."""

from __future__ import annotations

import pytest
import torch
from class_incremental_task import WEIGHTS, batch, task, values_of

from dfcompress.training.class_incremental.oracle import Oracle


def test_its_value_is_cross_entropy_with_the_labels():
    given = task()
    found, student, _, _ = values_of(Oracle(given), given)
    labels = batch().labels
    over_all = student.log_softmax(1)[torch.arange(6), labels]
    assert found == {"ce": pytest.approx(-(over_all * WEIGHTS[labels]).mean().item(), rel=1e-4)}
