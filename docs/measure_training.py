"""One row for each optimizer and objective of `distill`, by the installed command: LeNet-5 to half its width.

    python docs/measure_training.py DEMO_FILES OUTPUT [--seeds N]

DEMO_FILES is the folder `demo_files` of the package. Every row is one `dfcompress distill`, which is printed: 300
training steps on 512 images (half of them by `bns`, 200 steps each), the same for all rows of a seed. An optimizer's
rate is the one of its list with the best agreement on the held-out images of seed 0; the 10,000 real test images only
report.
Rows are appended to OUTPUT/rows.jsonl, and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from measuring import Rows, run

HOW = "--student lenet5_bn_half --probe-images 0 --device cpu --precision fp32 --compile off"
# Of every row its options, and the rates to choose from; none: the usual 0.1.
ROWS: dict[str, tuple[str, tuple[float, ...]]] = {
    "default": ("", ()),
    "sgd": ("", (0.03, 0.1, 0.3)),
    "adam": ("--optimizer adam", (0.003, 0.01, 0.03)),
    "adamw": ("--optimizer adamw --train-set weight_decay=0.05", (0.003, 0.01, 0.03)),
    "lamb": ("--optimizer lamb --train-set weight_decay=0.01", (0.01, 0.03, 0.1)),
    "constant rate": ("--train-set schedule=constant", ()),
    "kd + attention 10": ("--objective kd --objective attention=10", ()),
    "kd + attention 100": ("--objective kd --objective attention=100", ()),
    "kd + feature 10": ("--objective kd --objective feature=10", ()),
    "kd + mse-logits": ("--objective kd --objective mse-logits", ()),
    "mse-logits": ("--objective mse-logits", ()),
    "ce": ("--objective ce", ()),
}


def measure(given: argparse.Namespace, options: str, lr: float | None, seed: int) -> dict[str, Any]:
    """One row: the student's count, and how often it agrees with its teacher."""
    images, rate = given.output / f"images-{seed}", f" --train-lr {lr}" if lr else ""
    common = f"distill {given.demo_files} {HOW} --seed {seed}"
    if not images.exists():
        run(f"{common} --images 512 --steps 200 --train-steps 0 -o {images}")
    where = f"-o {given.output / 'student'} --overwrite"
    result = run(f"{common} --data {images} --train-steps 300 {options}{rate} --eval-data {given.demo_files} {where}")
    student = result["evaluation"]["results"][1]
    held_out = result["teachers"][0]["held_out"]
    return {"held_out": held_out, **{name: student[name] for name in ("correct", "total", "agreement")}}


def main() -> None:
    """Make the rows and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("demo_files", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    rows = Rows(given.output)
    sys.stdout.write("| row | rate | right of 10,000 | mean | agreement |\n|---|---|---|---|---|\n")
    for name, (options, rates) in ROWS.items():
        for lr in rates:
            rows.make(partial(measure, given, options, lr, 0), row=name, lr=lr, seed=0)
        best = max(rows.of(row=name), key=lambda row: row["held_out"])["lr"] if rates else None
        for seed in range(given.seeds):
            rows.make(partial(measure, given, options, best, seed), row=name, lr=best, seed=seed)
        found = [rows.of(row=name, lr=best, seed=seed)[0] for seed in range(given.seeds)]
        counts = " ".join(f"{row['correct']:,}" for row in found)
        mean, agreement = (statistics.mean(row[key] for row in found) for key in ("correct", "agreement"))
        sys.stdout.write(f"| {name} | {best or 0.1} | {counts} | {mean / 100:.2f}% | {agreement:.2%} |\n")


if __name__ == "__main__":
    main()
