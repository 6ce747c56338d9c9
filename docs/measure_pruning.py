"""The tables of docs/results/prune.md, by the installed command.

    python docs/measure_pruning.py CHECKPOINT TEST LARGER_TEST REAL OUTPUT [--seeds N] [--only ROW ...]

TEST and LARGER_TEST are real images to report on, REAL 1,000 training images for comparison. Rows "from nothing" make
their own images, as a user's first command does, and rows "distilled on" 512; all others of a seed share the 512 of
OUTPUT/images-SEED. Where a row names no importance it is `magnitude`, which was the default when it was measured. Rows
"of the filters" are for a network of docs/train_cifar_teachers.py. Every command is printed; results are appended to
OUTPUT/rows.jsonl, and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import get_args

from measuring import Rows, run

from dfcompress.pruning import ImportanceName

# The shares that DeepInversion's table states for ResNet-50: 20 and 50 % of the filters.
SHARES = {"-37 %": 0.63, "-71 %": 0.29}
# The shares of the filters that go in the table of Model folding (ICLR 2025).
FILTERS = {"25 %": 0.75, "50 %": 0.5, "70 %": 0.3}
SHORT = "--train-steps 500"
FEW = f"{SHORT} --images 512"
RECIPES = {"noise": "gaussian", "deepdream": "deepdream", "deepinversion": "deepinversion"}
EACH = 512
SHARED = {"synthetic": "deepinversion", "synthetic-bns": "bns"}


def rows_of(name: str, share: float) -> dict[str, str]:
    """The options of every row at one share; DATA stands for the seed's images, REAL for real ones."""
    budget = f"--flops {share} --importance magnitude"
    return {
        f"{name}, from nothing": budget,
        f"{name}, from nothing, round to 8": f"{budget} --round-to 8",
        f"{name}, real images": f"{budget} --data REAL",
        f"{name}, no repair": f"{budget} --repair none --data DATA",
        f"{name}, refit": f"{budget} --repair refit --data DATA",
        **{
            f"{name}, distilled on {what}": f"{budget} {FEW} --recipe {recipe} --second-recipe none"
            for what, recipe in RECIPES.items()
        },
        f"{name}, distilled on adaptive": f"{budget} {FEW}",
        f"{name}, distilled on real images": f"{budget} {SHORT} --data REAL",
        **{
            f"{name}, {importance}": f"--flops {share} {SHORT} --importance {importance} --data DATA"
            for importance in get_args(ImportanceName)
        },
        f"{name}, round to 16": f"{budget} {SHORT} --round-to 16 --data DATA",
        f"{name}, three rounds": f"{budget} {SHORT} --rounds 3 --data DATA",
    }


def rows_of_filters(name: str, share: float) -> dict[str, str]:
    """The same for a share of the filters, all on the seed's images."""
    budget = f"--filters {share} --data DATA"
    return {
        f"{name} of the filters, {importance}, {how}": f"{budget} --importance {importance} {options}"
        for importance in ("magnitude", "fold", "taylor")
        for how, options in (("refit", "--repair refit"), ("distilled", SHORT))
    }


ROWS = {
    **{row: asked for name, share in SHARES.items() for row, asked in rows_of(name, share).items()},
    "0.7 of the time": f"--latency 0.7 --importance magnitude {SHORT} --data DATA",
    **{row: asked for name, share in FILTERS.items() for row, asked in rows_of_filters(name, share).items()},
}
# The row that is quantized afterwards.
QUANTIZED = "-37 %, from nothing"


def images(given: argparse.Namespace, seed: int) -> Path:
    """The images of a seed, made where they are not there."""
    folder = given.output / f"images-{seed}"
    for name, recipe in SHARED.items():
        if not (folder / name / "run.json").exists():
            each = EACH // len(SHARED)
            run(f"invert {given.checkpoint} --recipe {recipe} --images {each} --seed {seed} -o {folder / name}")
    return folder


def folder_of(given: argparse.Namespace, row: str, seed: int) -> Path:
    """Where a row's network lies."""
    return given.output / f"{row.replace(' ', '-').replace(',', '').replace('%', '')}-{seed}"


def measure(given: argparse.Namespace, row: str, seed: int) -> dict:
    """One row: right answers on both sets of test images, seconds, bytes, and milliseconds in onnxruntime."""
    asked = ROWS[row].replace("REAL", str(given.real))
    if "DATA" in asked:
        asked = asked.replace("DATA", str(images(given, seed)))
    where = folder_of(given, row, seed)
    line = f"prune {given.checkpoint} {asked} --seed {seed} -o {where} --overwrite --eval-data {given.test}"
    result = run(f"{line} --probe-images 0 --export onnx")
    larger = run(f"evaluate {given.checkpoint} {where} --data {given.larger_test}")["results"]
    return {
        "test": [each["correct"] for each in result["evaluation"]["results"]],
        "larger": [each["correct"] for each in larger],
        "ms": [result["export"]["milliseconds_fp32"], result["export"]["milliseconds"]],
        **{name: result[name] for name in ("seconds", "bytes", "bytes_ratio", "agreement")},
    }


def chain(given: argparse.Namespace, seed: int) -> dict:
    """Pruned, then 8w8a: right answers, bytes and milliseconds."""
    pruned = folder_of(given, QUANTIZED, seed)
    line = f"quantize {pruned} --bits 8w8a --data {pruned} --export onnx -o {pruned}-8w8a --overwrite"
    result = run(f"{line} --eval-data {given.test}")
    counts = [each["correct"] for each in result["evaluation"]["results"]]
    return {"test": counts, "bytes": result["bytes"], "ms": result["export"]["milliseconds"]}


def table(rows: Rows) -> str:
    """Markdown: a line for each row."""
    columns = ("row", "correct", "mean", "correct on the larger set", "bytes", "faster in onnxruntime", "seconds")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in ROWS:
        if made := rows.of(row=row):
            counts = [" ".join(str(each[which][1]) for each in made) for which in ("test", "larger")]
            of_test = statistics.mean(each["test"][1] / each["test"][0] for each in made)
            faster = statistics.mean(each["ms"][0] / each["ms"][1] for each in made)
            seconds = statistics.mean(each["seconds"]["total"] for each in made)
            cells = [row, counts[0], f"{of_test:.2%} of the unpruned", counts[1], f"{made[0]['bytes_ratio']:.3f}"]
            lines.append(f"| {' | '.join([*cells, f'{faster:.2f} ×', f'{seconds:.0f}'])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "test", "larger_test", "real", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(ROWS))
    given = parser.parse_args()
    rows = Rows(given.output)
    for seed in range(given.seeds):
        for row in given.only:
            rows.make(partial(measure, given, row, seed), row=row, seed=seed)
        if QUANTIZED in given.only:
            rows.make(partial(chain, given, seed), chain="8w8a", seed=seed)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
