"""The picture and the metrics of a set."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from dfcompress.errors import BadInput
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import Loss
from dfcompress.synthesis.recipe import RESERVED, Recipe
from dfcompress.synthesis.set_builder import PREVIEW, _write_metrics, _write_preview, grid
from dfcompress.synthesis.synthesizer import Batch


@pytest.mark.parametrize("count", [2, 9, 10, 11, 20])
def test_a_grid_is_the_one_that_torchvision_makes(count):
    images = torch.rand(count, 3, 4, 6)
    expected = make_grid(images, nrow=10, padding=2, pad_value=1.0)
    assert torch.equal(grid(images, columns=10, border=2), expected)


def test_a_single_image_has_a_border_too():
    assert grid(torch.zeros(1, 3, 4, 6), columns=10, border=2)[0].tolist() == [
        [1.0] * 10,
        [1.0] * 10,
        *[[1.0] * 2 + [0.0] * 6 + [1.0] * 2] * 4,
        [1.0] * 10,
        [1.0] * 10,
    ]


@pytest.mark.parametrize(("side", "shown"), [(32, 64), (96, 96), (224, 112), (299, 149)])
def test_large_images_are_shown_smaller(tmp_path, side, shown):
    """And small ones larger: 20 images in two rows, each with borders of 2 pixels."""
    _write_preview(tmp_path, torch.rand(20, 3, side, side))
    with Image.open(tmp_path / PREVIEW) as picture:
        assert picture.size == (10 * (shown + 2) + 2, 2 * (shown + 2) + 2)


def test_losses_are_refused_the_names_that_stand_beside_theirs(tmp_path):
    """Otherwise a loss called `seconds` is what the set took, and one called `health` ends the run."""
    history = [{"step": 0, "mine": 2.0}, {"step": 1, "mine": 1.0}]
    batch = Batch(torch.zeros(1, 3, 4, 4), torch.zeros(1), {"mine": 1.0}, history, seconds=3.0)
    _write_metrics(tmp_path / "lines", 0, batch, {"variety": 1.0})
    written = {name for line in (tmp_path / "lines").read_text().splitlines() for name in json.loads(line)}
    assert written == {*RESERVED, "mine"} - {"round"}  # That one is shown while a student learns.
    for name in RESERVED:
        with pytest.raises(BadInput, match=f"A loss of a recipe has the name '{name}'"):
            Recipe(images=Pixels(), batch_size=1, losses=[Loss(name, lambda trace: trace.logits.mean())])
