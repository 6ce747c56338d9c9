"""The preview picture of a set: some of its images side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.run import write_atomically

PREVIEW = "preview.png"


PREVIEW_IMAGES = 80


PREVIEW_SIDE = 112  # 80 images of 224 pixels: 2,262 × 1,810 pixels, up to 12 MB as PNG; averaged to 112, 3 MB.


def first_images(synthetic: SyntheticSet) -> Tensor:
    """The first images `(N, C, H, W)` of a set, at most `PREVIEW_IMAGES`."""
    found: list[Tensor] = []
    for images, _ in synthetic.batches(PREVIEW_IMAGES):
        found.append(images)
        if sum(map(len, found)) >= PREVIEW_IMAGES:
            break
    return torch.cat(found)[:PREVIEW_IMAGES]


def write_preview(folder: Path, images: Tensor) -> None:
    """Write `images` `(N, C, H, W)` as one picture: large images are averaged by a whole factor, small ones enlarged. A
    column holds one class if ten classes take turns.
    """
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    images = F.avg_pool2d(images, max(1, min(images.shape[2:]) // PREVIEW_SIDE))
    images = images.expand(-1, 3, -1, -1)
    scale = max(1, 64 // images.shape[-1])
    enlarged = images.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = (grid(enlarged, columns=10, border=2) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with write_atomically(folder / PREVIEW) as path:
        Image.fromarray(pixels).save(path, format="png")


def grid(images: Tensor, *, columns: int, border: int) -> Tensor:
    """Images `(N, C, H, W)` row by row as one `(C, rows, columns)`, with white borders of `border` pixels.

    (torchvision's `make_grid` does the same, but importing torchvision takes 0.3 to 1.4 s of CPU time.)
    """
    columns = min(columns, len(images))
    images = F.pad(images, (0, border, 0, border, 0, 0, 0, -len(images) % columns), value=1.0)
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(rows, (border, 0, border, 0), value=1.0)
