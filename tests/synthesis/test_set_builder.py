"""The metrics of a set."""

from __future__ import annotations

import json

import pytest
import torch

from dfcompress.errors import BadInput
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import Loss
from dfcompress.synthesis.recipe import RESERVED, Recipe
from dfcompress.synthesis.set_builder import _write_metrics
from dfcompress.synthesis.synthesizer import SynthesizedBatch


def test_losses_are_refused_the_names_that_stand_beside_theirs(tmp_path):
    """Otherwise a loss called `seconds` is what the set took, and one called `health` ends the run."""
    history = [{"step": 0, "mine": 2.0}, {"step": 1, "mine": 1.0}]
    batch = SynthesizedBatch(torch.zeros(1, 3, 4, 4), torch.zeros(1), {"mine": 1.0}, history, seconds=3.0)
    _write_metrics(tmp_path / "lines", 0, batch, {"variety": 1.0})
    written = {name for line in (tmp_path / "lines").read_text().splitlines() for name in json.loads(line)}
    assert written == {*RESERVED, "mine"} - {"round"}  # That one is shown while a student learns.
    for name in RESERVED:
        with pytest.raises(BadInput, match=f"A loss of a recipe has the name '{name}'"):
            Recipe(images=Pixels(), batch_size=1, losses=[Loss(name, lambda trace: trace.logits.mean())])
