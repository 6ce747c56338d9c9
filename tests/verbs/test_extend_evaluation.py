"""What is counted of an extended model, by hand."""

from __future__ import annotations

import pytest
import torch
from linear_teachers import teacher

from dfcompress.errors import GateNotMet
from dfcompress.evaluation.metrics import Predictions
from dfcompress.verbs._extend_evaluation import evaluate_extended
from dfcompress.verbs._finish import Compressed
from dfcompress.verbs._gates import Gates
from dfcompress.verbs.evaluate import Evaluation

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def predictions(*classes):
    return Predictions(torch.tensor(classes)[:, None], LABELS)


def evaluation(rows=slice(None)):
    before, after = predictions(0, 0, 1, 0, 0, 0), predictions(0, 2, 1, 1, 2, 0)
    parts = (Predictions(each.classes[rows], each.labels[rows]) for each in (before, after))
    return evaluate_extended(teacher(("x", "y"), name="old"), teacher(classes=3, name="wide"), *parts)


def test_old_new_and_all_classes_are_counted_apart():
    found = evaluation()
    assert [(each.checkpoint, each.images, each.correct, each.total) for each in found.results] == [
        ("old", "old", 3, 4),
        ("wide", "old", 3, 4),
        ("wide", "new", 1, 2),
        ("wide", "all", 4, 6),
    ]
    assert [(each.name, each.total, each.before, each.after) for each in found.forgetting] == [
        ("x", 2, 1.0, 0.5),
        ("y", 2, 0.5, 1.0),
    ]
    assert Evaluation.from_json(found.to_json()) == found


def test_a_gate_on_old_classes_needs_images_of_them():
    result = Compressed("", "", 1, 1.0, 1, {}, 1.0, [], [], evaluation(slice(4, None)))
    with pytest.raises(GateNotMet, match="--eval-data has no image of an old class"):
        Gates(max_drop=50).check(result)
    Gates(max_drop=0).check(Compressed("", "", 1, 1.0, 1, {}, 1.0, [], [], evaluation()))
