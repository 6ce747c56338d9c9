"""The table of docs/results/record.md: records, synthesis and distillation, by the installed command.

    python docs/measure_records.py TEACHERS_FOLDER MNIST_FOLDER OUTPUT_FOLDER [--seeds N] [--only TEACHER/ROW ...]

TEACHERS_FOLDER is what docs/train_mnist_teachers.py wrote. Every row is one `dfcompress distill`, which is printed; its
result is appended to OUTPUT_FOLDER/rows.jsonl, and rows that are there are not made again. At the end the table, and
a picture OUTPUT_FOLDER/images-of-records-TEACHER.png: of each kind the classes' mean images and two images of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from measuring import Rows, run
from PIL import Image
from torchvision.utils import make_grid

from dfcompress.data.synthetic_set import SyntheticSet, as_float

GAUSSIAN_AND_SPECTRAL = ("top-layer", "all-layers", "spectral-all", "spectral-pairs")
# Of every teacher its student, and the rows; `real` is the ceiling.
TEACHERS = {
    "hinton_mlp": ("hinton_mlp_small", ("real", "noise", *GAUSSIAN_AND_SPECTRAL, "all-layers-dropout")),
    "lenet5": ("lenet5_half", ("real", "noise", *GAUSSIAN_AND_SPECTRAL, "bn-equivalent")),
    "lenet5_bn": ("lenet5_half", ("real", "batchnorm")),
}
TRAINING = "--objective kd --temperature 8 --train-steps 2500 --train-lr 0.02 --train-batch-size 128"
IMAGES = 2560


class Students:
    """The rows that are there, and the commands that make the others."""

    def __init__(self, teachers: Path, mnist: Path, output: Path) -> None:
        self.teachers, self.mnist, self.output = teachers, mnist, output
        self.rows = Rows(output)

    def record(self, teacher: str, kind: str) -> Path:
        """The record of a kind, made by the owner's command where it is not there."""
        file = self.output / f"{teacher}-{kind}.records.safetensors"
        if not file.exists():
            line = f"record {self.teachers / teacher} --data {self.mnist} --kind {kind} -o {file} --overwrite"
            file.with_suffix(".json").write_text(json.dumps(run(line)))
        return file

    def measure(self, teacher: str, name: str, seed: int) -> dict:
        """One row; the images of every record, and the noise, are as many."""
        if name == "real":
            images = f"--data {self.mnist}"
        elif name == "noise":
            images = f"--recipe gaussian --set mean=0.15 --set std=0.1 --images {IMAGES}"
        elif name == "batchnorm":
            images = f"--images {IMAGES}"
        else:
            images = f"--records {self.record(teacher, name)} --images {IMAGES}"
        where = f"-o {self.output / f'{teacher}-{name}-{seed}'} --overwrite --seed {seed} --eval-data {self.mnist}"
        student, _ = TEACHERS[teacher]
        result = run(f"distill {self.teachers / teacher} --student {student} {images} {TRAINING} {where}")
        before, after = (each["correct"] for each in result["evaluation"]["results"])
        return {"before": before, "after": after, "seconds": result["seconds"]}

    def of(self, teacher: str, name: str) -> list[dict]:
        """The seeds of one row."""
        return self.rows.of(teacher=teacher, row=name)

    def table(self) -> str:
        """Markdown: counts of the seeds, their mean and spread, and the share of the same teacher's ceiling."""
        columns = ("teacher", "images", "correct of 10,000", "mean", "spread", "of the ceiling", "synthesis + training")
        lines = [f"| {' | '.join((*columns, 'bytes of record', 'seconds to record'))} |", "|---" * 9 + "|"]
        for teacher, (_, names) in TEACHERS.items():
            ceiling = [row["after"] for row in self.of(teacher, "real")]
            for name in names:
                rows = self.of(teacher, name)
                if not rows:
                    continue
                counts = [row["after"] for row in rows]
                mean = statistics.mean(counts)
                share = f"{mean / statistics.mean(ceiling):.1%}" if ceiling else ""
                parts = [statistics.mean(row["seconds"][part] for row in rows) for part in ("synthesis", "training")]
                told = self.output / f"{teacher}-{name}.records.json"
                record = json.loads(told.read_text()) if told.exists() else None
                cells = [teacher, name, " ".join(f"{count:,}" for count in counts), f"{mean / 100:.2f} %"]
                cells += [f"{(max(counts) - min(counts)) / 100:.2f}", share, f"{parts[0]:.0f} + {parts[1]:.0f} s"]
                cells += [f"{record['bytes']:,}", f"{record['seconds']:.0f}"] if record else ["", ""]
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def picture(self, teacher: str) -> Image.Image | None:
        """Three rows for every kind, a column a class: mean and two images of seed 0; None where none is there."""
        bands = []
        for name in TEACHERS[teacher][1]:
            folder = self.output / f"{teacher}-{name}-0" / "synthetic"
            if name != "noise" and folder.exists():
                made = SyntheticSet(folder)
                own = [as_float(made.images[made.labels == label]) for label in range(10)]
                columns = [(some.mean(0), some[0], some[1]) for some in own]
                images = torch.cat([torch.stack(row) for row in zip(*columns, strict=True)])
                bands.append(make_grid(images.clamp(0, 1), nrow=10, padding=1, pad_value=0.4))
        if not bands:
            return None
        pixels = (torch.cat(bands, 1) * 255).round().byte().permute(1, 2, 0)
        return Image.fromarray(pixels.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("teachers", "mnist", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="for instance hinton_mlp/top-layer")
    given = parser.parse_args()
    students = Students(given.teachers, given.mnist, given.output)
    for seed in range(given.seeds):
        for teacher, (_, names) in TEACHERS.items():
            for name in names:
                if not given.only or f"{teacher}/{name}" in given.only:
                    measure = partial(students.measure, teacher, name, seed)
                    students.rows.make(measure, teacher=teacher, row=name, seed=seed)
    sys.stdout.write(students.table() + "\n")
    for teacher in TEACHERS:
        if picture := students.picture(teacher):
            picture.save(given.output / f"images-of-records-{teacher}.png")


if __name__ == "__main__":
    main()
