"""The tables of "Activation records" in docs/results.md: records, synthesis and distillation, by the installed command.

    python docs/measure_records.py TEACHERS_FOLDER MNIST_FOLDER OUTPUT_FOLDER [--seeds N] [--only TEACHER/ROW ...]

TEACHERS_FOLDER is what docs/train_mnist_teachers.py wrote. Every row is one `dfcompress distill`, which is printed; its
result is appended to OUTPUT_FOLDER/rows.jsonl, and rows that are there are not made again. At the end the table, and
a picture OUTPUT_FOLDER/images-of-records-TEACHER.png: of each kind the classes' mean images and two images of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

from dfcompress.data.synthetic_set import SyntheticSet, as_float

STUDENTS = {"hinton_mlp": "hinton_mlp_small", "lenet5": "lenet5_half"}
KINDS = ("top-layer", "all-layers", "all-layers-dropout", "spectral-all", "spectral-pairs")
BASELINES = ("real", "noise")
TRAINING = "--temperature 8 --train-steps 2500 --train-lr 0.02 --train-batch-size 128"
IMAGES = 2560


def command(teacher: str, row: str, seed: int, folders: argparse.Namespace) -> list[str]:
    """The line that makes one row; the images of every record, and the noise, are as many."""
    images = {
        "real": f"--data {folders.mnist}",
        "noise": f"--recipe gaussian --set mean=0.15 --set std=0.1 --images {IMAGES}",
    }.get(row, f"--records {record_file(teacher, row, folders)} --images {IMAGES}")
    output = folders.output / f"{teacher}-{row}-{seed}"
    where = f"-o {output} --overwrite --seed {seed} --eval-data {folders.mnist}"
    line = f"distill {folders.teachers / teacher} --student {STUDENTS[teacher]} {images} {TRAINING} {where}"
    return ["dfcompress", *line.split()]


def record_file(teacher: str, kind: str, folders: argparse.Namespace) -> Path:
    """Where a record is kept."""
    return folders.output / f"{teacher}-{kind}.records.safetensors"


def make_record(teacher: str, kind: str, folders: argparse.Namespace) -> None:
    """The owner's command."""
    file = record_file(teacher, kind, folders)
    line = f"record {folders.teachers / teacher} --data {folders.mnist} --kind {kind} -o {file} --overwrite"
    told = run(["dfcompress", *line.split()])
    file.with_suffix(".json").write_text(json.dumps(told))


def run(line: list[str]) -> dict:
    """Run a command with --json; its object."""
    sys.stderr.write(" ".join(line) + "\n")
    return json.loads(subprocess.run([*line, "--json", "-q"], check=True, capture_output=True, text=True).stdout)


def measure(folders: argparse.Namespace) -> list[dict]:
    """All rows, those that are there already included."""
    log = folders.output / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    there = {(row["teacher"], row["row"], row["seed"]) for row in rows}
    for seed in range(folders.seeds):
        for teacher in STUDENTS:
            for name in (*BASELINES, *KINDS):
                skipped = folders.only and f"{teacher}/{name}" not in folders.only
                dropout_only = name == "all-layers-dropout" and teacher != "hinton_mlp"
                if skipped or dropout_only or (teacher, name, seed) in there:
                    continue
                if name in KINDS and not record_file(teacher, name, folders).exists():
                    make_record(teacher, name, folders)
                result = run(command(teacher, name, seed, folders))
                before, after = (each["correct"] for each in result["evaluation"]["results"])
                row = {"teacher": teacher, "row": name, "seed": seed, "before": before, "after": after}
                rows.append({**row, "seconds": result["seconds"]})
                with log.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


def table(rows: list[dict], folders: argparse.Namespace) -> str:
    """Markdown: mean and spread of the seeds, and the share of the same teacher's ceiling."""
    lines = ["| teacher | row | correct of 10,000 | mean | of the ceiling | seconds | record's bytes | its seconds |"]
    lines += ["|---" * 8 + "|"]
    for teacher in STUDENTS:
        ceiling = statistics.mean(row["after"] for row in rows if (row["teacher"], row["row"]) == (teacher, "real"))
        for name in (*BASELINES, *KINDS):
            own = [row for row in rows if (row["teacher"], row["row"]) == (teacher, name)]
            if not own:
                continue
            counts = [row["after"] for row in own]
            told = record_file(teacher, name, folders).with_suffix(".json")
            record = json.loads(told.read_text()) if told.exists() else {"bytes": "", "seconds": ""}
            mean = statistics.mean(counts)
            seconds = statistics.mean(row["seconds"]["total"] for row in own)
            cells = [teacher, name, " ".join(f"{count:,}" for count in counts), f"{mean / 100:.2f} %"]
            cells += [f"{mean / ceiling:.1%}", f"{seconds:.0f}", f"{record['bytes']}", f"{record['seconds']}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(teacher: str, folders: argparse.Namespace) -> Image.Image:
    """Three rows for every kind, a column a class: the mean, and two samples, of seed 0."""
    bands = []
    for kind in KINDS:
        folder = folders.output / f"{teacher}-{kind}-0" / "synthetic"
        if folder.exists():
            made = SyntheticSet(folder)
            images, labels = as_float(made.images), made.labels
            own = [images[labels == label] for label in range(10)]
            rows = [
                torch.stack([some.mean(0) for some in own]),
                *(torch.stack([some[i] for some in own]) for i in (0, 1)),
            ]
            bands.append(make_grid(torch.cat(rows).clamp(0, 1), nrow=10, padding=1, pad_value=0.4))
    grid = torch.cat(bands, 1)
    pixels = (grid * 255).round().byte().permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return Image.fromarray(pixels.numpy())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("teachers", "mnist", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*")
    folders = parser.parse_args()
    folders.output.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(table(measure(folders), folders) + "\n")
    for teacher in STUDENTS:
        if (folders.output / f"{teacher}-{KINDS[0]}-0").exists():
            picture(teacher, folders).save(folders.output / f"images-of-records-{teacher}.png")


if __name__ == "__main__":
    main()
