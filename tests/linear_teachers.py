"""Teachers of one linear layer, and a student with known logits, for what is worked out by hand."""

from __future__ import annotations

import math

import torch
from torch import nn

from dfcompress.data.batches import UNLABELLED, Batch
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import ClassMap


def teacher(names=None, classes=2, name="t", size=(1, 4, 4), seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(size), classes))
    card = ModelCard("tiny", classes, size, (0.5,) * size[0], (0.25,) * size[0], names)
    return Classifier(network, card, name=name).frozen()


def images(seed, size, count=256):
    shape, random = (count, *size), torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def batch_of(images, sources):
    return Batch(images, torch.full((len(images),), UNLABELLED), sources)


class FixedLogits(nn.Module):
    """A student that gives fixed logits: those of the row that an image's pixels name."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


# Two images, the first of teacher 1, the second of teacher 2; they share output 1 of three.
LOGITS = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]])
TARGETS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[-0.5, 0.5], [2.0, -2.0]])
BLOCKS = ClassMap((torch.tensor([0, 1]), torch.tensor([1, 2])), 3)


def values_of(distiller):
    """The distiller's values by name, for the student of `LOGITS` and the teachers of `TARGETS`."""
    rows = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    found = distiller.losses(FixedLogits(LOGITS), batch_of(rows, torch.tensor([0, 1])), TARGETS)
    return dict(zip(distiller.names, found.tolist(), strict=True))
