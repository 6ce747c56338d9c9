"""ResNet-18 at 4w4a from its checkpoint alone, on ImageNet: for a CUDA machine that has the data to report on. Not run.

    python docs/measure_imagenet.py RESNET18 IMAGENET_VAL OUTPUT [--images N] [--seeds N]

RESNET18 is torchvision's checkpoint (69.76 %), IMAGENET_VAL a folder with one subfolder a class. Published with the
first and the last layer at 8 bits: 68.14 % with 100,000 images of BatchNorm statistics (Haroush et al. 2020); block
reconstruction with 1,024 images loses about 1.4 points (GENIE, Jeon et al. 2023), which the second row repeats.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from measuring import Rows, run

ROWS = {
    "100,000 images": "--images {images} --train-steps 40000 --train-batch-size 256",
    "1,024 images, blocks": "--images 1024 --finetune blocks --train-steps 20000 --train-lr 0.001",
}


def measure(given: argparse.Namespace, row: str, seed: int) -> dict:
    """One row: counts of both models, and seconds."""
    asked = ROWS[row].format(images=given.images)
    where = f"-o {given.output / row.split()[0].replace(',', '')}-{seed} --overwrite --eval-data {given.val}"
    result = run(f"quantize {given.checkpoint} --bits 4w4a {asked} --seed {seed} {where}")
    return {"seconds": result["seconds"], **result["evaluation"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "val", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    rows = Rows(given.output)
    for seed in range(given.seeds):
        for row in ROWS:
            rows.make(partial(measure, given, row, seed), row=row, seed=seed)
    for row in rows.made:
        before, after = row["results"]
        sys.stdout.write(f"{row['row']}, seed {row['seed']}: {before['top1']:.2%} → {after['top1']:.2%}\n")


if __name__ == "__main__":
    main()
