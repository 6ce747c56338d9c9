"""The two pictures of images made from ResNet-20, by the installed command.

    python docs/make_pictures.py resnet20-12fca82f.th OUTPUT_FOLDER

`images-from-resnet20.png` (README) is the preview of 256 images of the default recipe; `images-of-seven-methods.png`
(docs/results/invert.md) has the first 16 images of each method, a row a recipe. The other
pictures, `images-of-records-*.png`, are those of docs/measure_records.py.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from measuring import run
from PIL import Image

from dfcompress.data.synthetic_set import SyntheticSet, as_float
from dfcompress.synthesis.preview import PREVIEW, grid

ROWS = ("gaussian", "inception", "deepdream", "bns", "bns-inception", "deepinversion", "adaptive-deepinversion")
COLUMNS, SCALE = 16, 2


def main() -> None:
    """Make the images and both pictures."""
    checkpoint, output = sys.argv[1], Path(sys.argv[2])
    for recipe in ROWS:
        batch = " --batch-size 128" if recipe.startswith("adaptive") else ""  # So its student learns once.
        run(f"invert {checkpoint} --recipe {recipe} --images 256{batch} -o {output / recipe}")
    shutil.copy(output / "deepinversion" / PREVIEW, output / "images-from-resnet20.png")
    rows = torch.cat([as_float(SyntheticSet(output / recipe).images[:COLUMNS]) for recipe in ROWS])
    enlarged = rows.clamp(0, 1).expand(-1, 3, -1, -1).repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
    pixels = (grid(enlarged, columns=COLUMNS, border=2) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(output / "images-of-seven-methods.png")


if __name__ == "__main__":
    main()
