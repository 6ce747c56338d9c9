"""The picture of a set."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from dfcompress.synthesis.preview import PREVIEW, grid, write_preview


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
    write_preview(tmp_path, torch.rand(20, 3, side, side))
    with Image.open(tmp_path / PREVIEW) as picture:
        assert picture.size == (10 * (shown + 2) + 2, 2 * (shown + 2) + 2)
