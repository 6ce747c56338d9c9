"""Distillation and merging on CIFAR-10 for a CUDA machine, by the installed command.

    python docs/train_cifar_teachers.py CIFAR10_FOLDER TEACHERS cifar_resnet34 wrn40_2 cifar_vgg11_bn \
        cifar_resnet18-01234 cifar_resnet18-56789 cifar_resnet18-01 cifar_resnet18-23 cifar_resnet18-45 \
        cifar_resnet18-67 cifar_resnet18-89
    python docs/measure_cifar.py TEACHERS CIFAR10_FOLDER OUTPUT [--seeds N] [--only ROW ...] [--more "OPTIONS"]

Every row is one command, which is printed; results are appended to OUTPUT/rows.jsonl, and rows that are there are not
made again. `--more` adds options to every command, for instance fewer images and steps to try it out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

from measuring import Rows, run

IMAGES, STEPS = "--images 51200 --preset paper-cifar10", "--train-steps 80000"
PAIRS = " ".join(f"cifar_resnet18-{pair}" for pair in ("01", "23", "45", "67", "89"))
HALVES = "cifar_resnet18-01234 cifar_resnet18-56789"
EACH = {2: "--images 12800", 5: "--images 5120"}
# The pairs and the methods of table 2 of Chen et al. 2023; `paper-cifar10` is 200 epochs of 400 steps, and hours.
ALONE = "--student-init none --second-recipe none --probe-images 0"
METHODS = {
    **{name: f"--recipe {name} --preset paper-cifar10 --images 2560" for name in ("dafl", "zskt", "dfq")},
    "fast-generator": "--recipe fast-generator --images 51200 --train-steps 80000",
    **{name: f"--recipe {name} --preset paper-cifar10 --images 10240" for name in ("cmi", "ifhe")},
}
TEACHER_OF = {
    "wrn16_1": "wrn40_2",
    "wrn40_1": "wrn40_2",
    "wrn16_2": "wrn40_2",
    "cifar_resnet18": "cifar_vgg11_bn",
    "resnet18": "cifar_resnet34",
}
# Of every row the verb, the teachers, and the student with what else is asked for.
ROWS = {
    "ResNet-34 to ResNet-18": ("distill", "cifar_resnet34", f"--student cifar_resnet18 {IMAGES} {STEPS}"),
    "the same from random weights": (
        "distill",
        "cifar_resnet34",
        f"--student cifar_resnet18 --student-init none {IMAGES} {STEPS}",
    ),
    **{
        f"{method}: {teacher} to {student}": ("distill", teacher, f"--student {student} {asked} {ALONE}")
        for method, asked in METHODS.items()
        for student, teacher in TEACHER_OF.items()
    },
    "WRN40-2 to WRN16-2": ("distill", "wrn40_2", f"--student wrn16_2 {IMAGES} {STEPS}"),
    **{
        f"{count} teachers to {student}": ("merge", names, f"--student cifar_{student} {EACH[count]} {STEPS}")
        for count, names in ((2, HALVES), (5, PAIRS))
        for student in ("resnet18", "resnet34", "resnet50")
    },
}


def measure(given: argparse.Namespace, row: str, seed: int) -> dict:
    """One row: counts of the teachers and the student."""
    verb, names, asked = ROWS[row]
    teachers = " ".join(str(given.teachers / name) for name in names.split())
    where = f"--eval-data {given.cifar10 / 'test'} -o {given.output / row.replace(' ', '-')}-{seed} --overwrite"
    result = run(f"{verb} {teachers} {asked} {given.more} --seed {seed} {where}")
    return {"seconds": result["seconds"], **result["evaluation"]}


def table(rows: list[dict]) -> str:
    """Markdown: the student's mean over the seeds beside the mean of its teachers, each on its own classes."""
    lines = ["| row | teachers | students | mean | of the teachers' | synthesis + training |", "|---" * 6 + "|"]
    for name, (verb, _, _) in ROWS.items():
        made = [row for row in rows if row["row"] == name]
        if made:
            first = made[0]["results"]
            alone = [first[0]] if verb == "distill" else first[:-2:2]
            teachers = statistics.mean(each["top1"] for each in alone)
            shares = [row["results"][-1]["top1"] for row in made]
            mean = statistics.mean(shares)
            seconds = [statistics.mean(row["seconds"][part] for row in made) for part in ("synthesis", "training")]
            counts = " ".join(f"{row['results'][-1]['correct']:,}" for row in made)
            cells = [name, f"{teachers:.2%}", counts, f"{mean:.2%}", f"{mean / teachers:.1%}"]
            lines.append(f"| {' | '.join(cells)} | {seconds[0]:.0f} + {seconds[1]:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("teachers", "cifar10", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], choices=list(ROWS))
    parser.add_argument("--more", default="", help="options for every command")
    given = parser.parse_args()
    rows = Rows(given.output)
    for seed in range(given.seeds):
        for row in given.only or ROWS:
            rows.make(partial(measure, given, row, seed), row=row, seed=seed)
    sys.stdout.write(table(rows.made) + "\n")


if __name__ == "__main__":
    main()
