"""The tables of docs/results/quantize.md, by the installed command.

    python docs/measure_quantization.py CHECKPOINT TEST LARGER_TEST REAL OUTPUT [--seeds N] [--only ROW ...]

TEST and LARGER_TEST are real images to report on, REAL 1,000 training images for comparison. Images are made once for
a seed (OUTPUT/images-SEED, as many and by the recipes that `quantize` would take) and serve all its rows. Every command
is printed; results are appended to OUTPUT/rows.jsonl, and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

from measuring import Rows, run

RECIPES = {"synthetic": "bns-inception", "synthetic-bns": "bns"}
EACH = 1024
NOISE = "--recipe gaussian --second-recipe none --images 1024 --calibration-steps 4 --precision fp32 --compile off"
SHORT = "--finetune kd --train-steps 100 --train-batch-size 128"

CALIBRATED = {
    "8w8a calibrated": "--bits 8w8a --finetune none --placement layer-inputs",
    "4w8a calibrated": "--bits 4w8a --finetune none",
    "4w4a calibrated": "--bits 4w4a --finetune none",
    "4w4a calibrated, ends 4": "--bits 4w4a --first-last-bits 4 --finetune none",
}
TUNED = {
    "2w4a, ends 4": "--bits 2w4a --first-last-bits 4",
    "4w4a": "--bits 4w4a",
}
AT_TWO_BITS = {"2w4a calibrated, ends 4": "--bits 2w4a --first-last-bits 4 --finetune none"}
MINMAX = "--calibrate minmax --weight-ranges minmax --weight-grid symmetric --no-correction"
ROWS = {
    **CALIBRATED,
    **AT_TWO_BITS,
    **TUNED,
    **{f"{row}, as published": f"{asked} --method paper" for row, asked in (CALIBRATED | AT_TWO_BITS).items()},
    **{f"{row}, min-max, symmetric": f"{asked} {MINMAX}" for row, asked in CALIBRATED.items()},
    **{f"{row}, {how} alone": f"{asked} --finetune {how}" for row, asked in TUNED.items() for how in ("blocks", "lsq")},
}
# Of ResNet-44 on the first 846 test images, must / aim; and what Haroush et al. 2020 have for theirs (float 93.23 % of
# all 10,000): synthetic images; real ones.
TARGETS = {
    "4w8a calibrated": ("92.8 / 93.5", "92.21; 92.18"),
    "4w4a calibrated": ("92.2 / 93", "91.76; 91.64"),
    "4w4a calibrated, ends 4": ("89.5 / 91.5", "88.5–89.1; 89.19"),
    "2w4a, ends 4": ("89.0 / 91.7", "88.52, 89.6; 90.27, 91.24"),
    "4w4a": ("92.8 / 93.5", ""),
}
# Haroush et al. 2020: noise is of use only with frozen BatchNorm and the IQ loss.
ABLATION = {f"noise, {bits}, calibrated": f"{NOISE} --bits {bits} --finetune none" for bits in ("4w4a", "2w4a")} | {
    f"noise, {bits}, BatchNorm {how}, {'IQ' if iq else 'no IQ'}": f"{NOISE} --bits {bits} {SHORT} "
    f"--train-set freeze_batchnorm={how == 'frozen'} --objective kd {'--objective iq=0.001' if iq else ''}"
    for bits in ("4w4a", "2w4a")
    for how in ("frozen", "free")
    for iq in (True, False)
}


def images(given: argparse.Namespace, seed: int) -> Path:
    """The images of a seed, made where they are not there."""
    folder = given.output / f"images-{seed}"
    for name, recipe in RECIPES.items():
        if not (folder / name / "run.json").exists():
            run(f"invert {given.checkpoint} --recipe {recipe} --images {EACH} --seed {seed} -o {folder / name}")
    return folder


def measure(given: argparse.Namespace, row: str, source: str, seed: int) -> dict:
    """One row: right answers on both sets of test images, seconds and bytes."""
    asked = {**ROWS, **ABLATION}[row]
    if row not in ABLATION:
        asked += f" --data {given.real if source == 'real' else images(given, seed)}"
    where = given.output / f"{row.replace(' ', '-').replace(',', '')}-{source}-{seed}"
    result = run(f"quantize {given.checkpoint} {asked} --seed {seed} -o {where} --overwrite --eval-data {given.test}")
    larger = run(f"evaluate {given.checkpoint} {where} --data {given.larger_test}")["results"]
    counts = {
        name: {"float": results[0]["correct"], "correct": results[1]["correct"], "total": results[1]["total"]}
        for name, results in (("test", result["evaluation"]["results"]), ("larger", larger))
    }
    return {**counts, **{name: result[name] for name in ("seconds", "bytes", "bytes_ratio", "agreement")}}


def table(rows: Rows) -> str:
    """Markdown: a line for each row and source of images."""
    columns = ("row", "images", "correct", "mean", "must / aim", "published", "correct on the larger set", "mean")
    columns += ("lost there, points", "bytes", "calibration + rounding + training")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in {**ROWS, **ABLATION}:
        for source in ("made", "real"):
            if made := rows.of(row=row, source=source):
                lines.append(_line(row, source, made))
    return "\n".join(lines)


def _line(row: str, source: str, made: list[dict]) -> str:
    cells = [row, "noise" if row in ABLATION else source]
    for which in ("test", "larger"):
        counts, total = [each[which]["correct"] for each in made], made[0][which]["total"]
        cells += [" ".join(f"{count:,}" for count in counts), f"{statistics.mean(counts) / total:.2%}"]
        if which == "test":
            cells += TARGETS.get(row, ("", ""))
    lost = statistics.mean(each["larger"]["float"] - each["larger"]["correct"] for each in made)
    parts = ("calibration", "rounding", "training")
    seconds = [statistics.mean(each["seconds"].get(part, 0.0) for each in made) for part in parts]
    cells += [f"{100 * lost / made[0]['larger']['total']:.2f}", f"{made[0]['bytes_ratio']:.4f}"]
    return f"| {' | '.join(cells)} | {' + '.join(f'{each:.0f}' for each in seconds)} s |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "test", "larger_test", "real", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[], choices=[*ROWS, *ABLATION])
    parser.add_argument("--sources", nargs="*", default=["made", "real"], choices=["made", "real"])
    given = parser.parse_args()
    rows = Rows(given.output)
    for seed in given.seeds:
        for row in given.only or {**ROWS, **ABLATION}:
            for source in ["made"] if row in ABLATION else given.sources:
                rows.make(partial(measure, given, row, source, seed), row=row, source=source, seed=seed)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
