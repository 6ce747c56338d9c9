"""A calibration that is done again is the one of before, however much memory is free."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.quantization.bits import Bits
from dfcompress.quantization.calibration import Calibration, calibrated


@pytest.mark.parametrize("resumed", [True, False])
def test_statistics_are_corrected_on_as_many_images_as_before(resumed, tmp_path, monkeypatch):
    """Where the run is another, on as many as there is room for."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    teacher = Classifier(network, ModelCard("test", 4, (3, 8, 8), (0.5,) * 3, (0.3,) * 3)).frozen()
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    variances = []
    for number, room in enumerate((64, 8)):
        fits = "dfcompress.quantization.calibration.images_at_once"
        monkeypatch.setattr(fits, lambda wanted, *_, room=room, **__: min(wanted, room))
        student, folder = copy.deepcopy(teacher), tmp_path / str(0 if resumed else number)
        folder.mkdir(exist_ok=True)
        calibrated(
            student,
            teacher,
            {"0": Bits(4, 4), "4": Bits(4, 4)},
            images,
            Calibration(steps=1),
            Compute(device="cpu"),
            size_ratio=None,
            bits=folder / "bits.partial",
        )
        variances.append(student.network[1].running_var)
    assert torch.equal(*variances) == resumed
