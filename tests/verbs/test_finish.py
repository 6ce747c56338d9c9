"""A damaged picture is refused before any work, wherever pictures are read only after it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dfcompress.cli import run
from dfcompress.models.card import ModelCard
from dfcompress.models.saving import save
from dfcompress.training.student import make_student


@pytest.fixture
def model(tmp_path):
    card = ModelCard("lenet5_bn", 2, (1, 32, 32), (0.4,), (0.2,), ("x", "y"))
    for seed, name in enumerate(("model", "other")):
        classifier, _ = make_student("lenet5_bn", card, seed=seed)
        classifier.train()(torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
        save(classifier.eval(), tmp_path / name)
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path):
    """Two classes, of which the last picture is cut short."""
    for name in "xy":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    last = tmp_path / "pictures" / "y" / "2.png"
    last.write_bytes(last.read_bytes()[:-300])
    return tmp_path / "pictures"


@pytest.mark.parametrize("option", ["--eval-data", "--data"])
@pytest.mark.parametrize("verb", ["distill", "merge", "extend"])
def test_a_damaged_picture_is_refused_before_any_work(verb, option, model, pictures, tmp_path, capsys):
    np.savez(tmp_path / "new.npz", images=np.zeros((20, 1, 32, 32), np.uint8), labels=np.repeat([5, 6], 10))
    words = {
        "distill": ["--student", "half"],
        "merge": [str(tmp_path / "other"), "--student", "lenet5_bn"],
        "extend": ["--new-data", str(tmp_path / "new.npz")],
    }[verb]
    option = "--old-images" if (verb, option) == ("extend", "--data") else option
    line = [verb, str(model), *words, option, str(pictures), "-o", str(tmp_path / "out"), "--dry-run"]
    if (verb, option) == ("merge", "--data"):
        line += [option, str(pictures)]
    assert run(line) == 2
    assert "y/2.png cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
