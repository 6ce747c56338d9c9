"""A task of two known and two new classes on linear networks, whose losses can be worked out by hand."""

from __future__ import annotations

import torch
from linear_teachers import teacher

from dfcompress.data.batches import Batch
from dfcompress.training.class_incremental.method import NEW, OLD, ExtensionTask

SIZE = (1, 2, 2)
WEIGHTS = torch.tensor([1.0, 1.0, 2.0, 3.0])


def task(steps=10):
    """Old model of classes 0 and 1, student of 0 to 3, expert of 2 and 3."""
    old, student, expert = (
        teacher(classes=classes, size=SIZE, seed=seed) for classes, seed in ((2, 1), (4, 2), (2, 3))
    )
    return ExtensionTask(old=old, student=student, expert=expert, class_weights=WEIGHTS, steps=steps, seed=0)


def batch():
    """Three replayed images, and three labelled ones, of which the first is of an old class."""
    images = torch.rand(6, *SIZE, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.tensor([0, 1, 0, 1, 2, 3]), torch.tensor([OLD] * 3 + [NEW] * 3))


def values_of(distiller, task):
    """The values of a step by name, and the logits of the student, the old model and the expert."""
    shown = batch()
    with torch.no_grad(), distiller.attached(task.student):
        values = distiller.losses(task.student, shown, distiller.targets(shown))
        logits = [each(shown.images) for each in (task.student, task.old, task.expert)]
    return dict(zip(distiller.names, values.tolist(), strict=True)), *logits
