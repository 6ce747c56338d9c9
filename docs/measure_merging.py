"""The tables of docs/results/merge.md, by the installed command.

    python docs/measure_merging.py TEACHERS MNIST FASHION OUTPUT [--seeds N] [--only CASE/ROW ...]

TEACHERS is what docs/train_mnist_teachers.py wrote, under the names in `CASES`. Every row is one `dfcompress merge`,
which is printed; results are appended to OUTPUT/rows.jsonl, and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import Rows, run
from train_mnist_teachers import images_of

from dfcompress.data.real import open_images
from dfcompress.evaluation.metrics import predict
from dfcompress.models.checkpoint import load

ARCHITECTURE = "lenet5_bn"
# Of every case the teachers, the one with the hardest classes first; FASHION- are those of Fashion-MNIST.
CASES = {
    "halves": ("lenet5_bn-01234", "lenet5_bn-56789"),
    "fashion and digits": ("fashion-lenet5_bn", "lenet5_bn"),
    "two shared": ("lenet5_bn-012345", "lenet5_bn-456789"),
    "five pairs": tuple(f"lenet5_bn-{pair}" for pair in ("01", "23", "45", "67", "89")),
}
SHARED = (4, 5)
# `real` is the ceiling: the same method on each teacher's own training images.
ROWS = {"all-logits": "", "paper": "--method shapira-sidi", "real": "--data"}


def measure(given: argparse.Namespace, case: str, row: str, seed: int) -> dict:
    """One row: counts of the teachers, the largest logit and the student."""
    teachers = " ".join(str(given.teachers / name) for name in CASES[case])
    tests = [given.fashion if "fashion" in name else given.mnist for name in CASES[case]]
    shown = f"--eval-data {tests[0]}" if len(set(tests)) == 1 else " ".join(f"--eval-data {test}" for test in tests)
    how = ROWS[row]
    if row == "real":
        how = " ".join(f"{how} {learnt_from(given, *each)}" for each in zip(CASES[case], tests, strict=True))
    where = given.output / f"{case.replace(' ', '-')}-{row}-{seed}"
    line = (
        f"merge {teachers} --student {ARCHITECTURE} {how} {shown} --probe-images 0 --seed {seed} -o {where} --overwrite"
    )
    result = run(line)
    measured = {"seconds": result["seconds"], **result["evaluation"]}
    return {**measured, "shared": shared(where, given.mnist)} if case == "two shared" else measured


def learnt_from(given: argparse.Namespace, teacher: str, images: Path) -> Path:
    """The training images of a teacher's classes, as an .npz."""
    file = given.output / f"{teacher}.npz"
    if not file.exists():
        digits = teacher.partition(ARCHITECTURE)[2].strip("-") or "0123456789"
        own, labels = images_of(images, "train", ARCHITECTURE, [int(digit) for digit in digits])
        np.savez(file, images=(255 * own).round().byte().numpy(), labels=labels.numpy())
    return file


def shared(student: Path, mnist: Path) -> dict[str, float]:
    """Top-1 on the digits that both teachers know, and on the others."""
    classifier = load(student)
    found = predict(classifier, open_images(mnist, classifier.card).batches(256))
    right, of_both = found.classes[:, 0] == found.labels, torch.isin(found.labels, torch.tensor(SHARED))
    return {"both know": right[of_both].double().mean().item(), "one knows": right[~of_both].double().mean().item()}


def table(rows: list[dict]) -> str:
    """Markdown: a line for each case and row, the student's mean over the seeds beside the teachers' own."""
    columns = ("teachers", "method", "correct on all", "mean", "spread", "each teacher's images: teacher → student")
    lines = [f"| {' | '.join((*columns, 'largest logit', 'synthesis + training'))} |", "|---" * 8 + "|"]
    for case in CASES:
        for method in ROWS:
            made = [row for row in rows if (row["case"], row["row"]) == (case, method)]
            if made:
                lines.append(_line(case, method, made))
    return "\n".join(lines)


def _line(case: str, method: str, made: list[dict]) -> str:
    *parts, largest, _ = made[0]["results"]
    students = [[row["results"][place]["top1"] for row in made] for place in range(1, len(parts), 2)]
    pairs = [
        f"{teacher['top1']:.1%} → {statistics.mean(student):.1%}"
        for teacher, student in zip(parts[::2], students, strict=True)
    ]
    whole = [row["results"][-1] for row in made]
    shares = [each["top1"] for each in whole]
    seconds = [statistics.mean(row["seconds"][part] for row in made) for part in ("synthesis", "training")]
    counts = " ".join(f"{each['correct']:,}" for each in whole) + f" of {whole[0]['total']:,}"
    spread = 100 * (max(shares) - min(shares))
    cells = [case, method, counts, f"{statistics.mean(shares):.2%}", f"{spread:.2f}", ", ".join(pairs)]
    cells += [f"{largest['top1']:.2%}", f"{seconds[0]:.0f} + {seconds[1]:.0f} s"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("teachers", "mnist", "fashion", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="for instance halves/paper")
    given = parser.parse_args()
    rows = Rows(given.output)
    for seed in range(given.seeds):
        for case in CASES:
            for row in ROWS:
                if not given.only or f"{case}/{row}" in given.only:
                    rows.make(partial(measure, given, case, row, seed), case=case, row=row, seed=seed)
    sys.stdout.write(table(rows.made) + "\n")
    for method in ROWS:
        for which in ("both know", "one knows"):
            shares = [f"{row['shared'][which]:.2%}" for row in rows.of(row=method) if "shared" in row]
            sys.stdout.write(f"two shared, {method}, digits that {which}: {', '.join(shares)}\n")


if __name__ == "__main__":
    main()
