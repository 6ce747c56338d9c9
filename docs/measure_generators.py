"""Methods for students that start from nothing, by the installed command: LeNet-5 to half its width on MNIST.

    python docs/measure_generators.py DEMO_FILES OUTPUT [--only NAME ...] [--seeds N]

DEMO_FILES is the folder `demo_files` of the package. Every row is one `dfcompress distill` of a student with random
weights, which is printed; images, rounds and steps of the methods are such that each takes about 150 s of one core of
an AMD EPYC, but for the row that says 10 minutes. No setting was chosen here: all are those of the presets. The 10,000
real test images only report.
Rows are appended to OUTPUT/rows.jsonl, and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from measuring import Rows, run

HOW = "--student half --student-init none --second-recipe none --probe-images 0 --device cpu"
ROWS = {
    "gaussian": "--recipe gaussian --images 2048 --train-steps 8300",
    "deepdream": "--recipe deepdream --images 1024 --train-steps 6000",
    "deepinversion": "--recipe deepinversion --images 1024 --train-steps 3000",
    "dafl": "--recipe dafl --set rounds=600",
    "zskt": "--recipe zskt --set rounds=600",
    "dfq": "--recipe dfq --set rounds=340",
    "cmi": "--recipe cmi --images 2048 --train-steps 1000",
    "ifhe": "--recipe ifhe --images 3072 --train-steps 1000",
    "fast-generator": "--recipe fast-generator --images 14080 --set student_steps=30 --train-steps 3300",
    "fast-generator, 10 minutes": "--recipe fast-generator --images 51200 --train-steps 12000",
    "ifhe alpha 0": "--recipe ifhe --images 3072 --train-steps 1000 --set alpha=0",
    "ifhe alpha 1": "--recipe ifhe --images 3072 --train-steps 1000 --set alpha=1",
    "ifhe alpha 1.5": "--recipe ifhe --images 3072 --train-steps 1000 --set alpha=1.5",
    "dafl + head": "--recipe dafl --set rounds=600 --set head=0.5",
    "dfq + head": "--recipe dfq --set rounds=340 --set head=0.5",
}


def measure(given: argparse.Namespace, options: str, seed: int) -> dict[str, Any]:
    """One row: the student's count, its seconds, and those of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    where = f"-o {given.output / 'student'} --overwrite"
    result = run(f"distill {given.demo_files} {HOW} --seed {seed} {options} --eval-data {given.demo_files} {where}")
    processor = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    student, teacher = result["evaluation"]["results"][1], result["teachers"][0]
    return {
        "correct": student["correct"],
        "total": student["total"],
        "held_out": teacher["held_out"],
        "seconds": result["seconds"],
        "processor_seconds": round(processor, 1),
    }


def main() -> None:
    """Make the rows and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("demo_files", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    rows = Rows(given.output)
    sys.stdout.write("| method | right of 10,000 | mean | seconds of one core |\n|---|---|---|---|\n")
    for name in given.only:
        for seed in range(given.seeds):
            rows.make(partial(measure, given, ROWS[name], seed), row=name, seed=seed)
        found = [rows.of(row=name, seed=seed)[0] for seed in range(given.seeds)]
        counts, mean = (
            " ".join(f"{row['correct']:,}" for row in found),
            statistics.mean(row["correct"] for row in found),
        )
        seconds = statistics.mean(row["processor_seconds"] for row in found)
        sys.stdout.write(f"| `{name}` | {counts} | {mean / 100:.2f}% | {seconds:.0f} |\n")


if __name__ == "__main__":
    main()
