"""LwF.MC's binary cross-entropies, by hand."""

from __future__ import annotations

import pytest
import torch
from class_incremental_task import batch, task, values_of
from torch.nn import functional as F

from dfcompress.training.class_incremental.lwf_mc import METHOD, LwfMc


def test_its_values_are_sums_over_new_and_over_old_outputs():
    given = task()
    found, student, old, _ = values_of(LwfMc(given), given)
    wanted = F.one_hot(batch().labels, 4).float()
    new = F.binary_cross_entropy(student[:, 2:].sigmoid(), wanted[:, 2:], reduction="none").sum(1).mean()
    of_old = F.binary_cross_entropy(student[:, :2].sigmoid(), old.sigmoid(), reduction="none").sum(1).mean()
    assert found == {"new": pytest.approx(new.item(), rel=1e-4), "old": pytest.approx(of_old.item(), rel=1e-4)}
    assert torch.equal(LwfMc(given).weights, torch.ones(2))
    assert not METHOD.replays
