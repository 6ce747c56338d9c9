"""The tables of docs/results/extend.md, by the installed command.

    python docs/measure_extending.py TEACHERS MNIST FASHION OUTPUT [--seeds N] [--only CASE/ROW ...]
    python docs/measure_extending.py TEACHERS MNIST FASHION OUTPUT --colour RESNET20 CIFAR --only colour/default
    python docs/measure_extending.py TEACHERS MNIST FASHION OUTPUT --cifar10 FOLDER --only cifar/default cifar/oracle

TEACHERS is what docs/train_mnist_teachers.py wrote (`lenet5_bn-01234 lenet5_bn-56789 lenet5_bn-01 lenet5_bn`), and for
the case `cifar` docs/train_cifar_teachers.py (`--epochs 16 cifar_resnet20-01234`). Every row is one `dfcompress extend`
a step, which is printed; results are appended to OUTPUT/rows.jsonl, and rows that are there are not made again. The
images of the old classes are made by the first row of a case and seed, and the other rows replay the same, but
`deepdream`: DeepInversion's losses on DeepDream's images. RESNET20 is the released checkpoint, CIFAR its test images
(`cifar10-test-846.npz`); FOLDER holds `train` and `test`, a folder a class in each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
from measuring import Rows, run

from dfcompress.data.arrays import read_idx
from dfcompress.data.image_source import Part

# As a user's first command does it, and every method in as many steps.
METHODS = {"default": ""} | {
    name: f"--method {name} --train-steps 1000" for name in ("abd", "deepinversion", "lwf-mc", "rdfcil", "oracle")
}
METHODS["deepdream"] = f"{METHODS['deepinversion']} --recipe deepdream --second-recipe none"
OWN_IMAGES = ("default", "lwf-mc", "oracle", "deepdream")  # The others replay those of `default`.
# Of every case the digits that each step brings; the first ones are the teacher's.
DIGITS = {
    "halves": ("01234", "56789"),
    "halves in the other order": ("56789", "01234"),
    "few-shot": ("01234", "56789"),
    "five steps": ("01", "23", "45", "67", "89"),
}
FEW = 50
CASES = (*DIGITS, "fashion", "colour", "cifar")


def digits_file(given: argparse.Namespace, digits: str, part: Part, order: str = "", few: int = 0) -> Path:
    """Images of these digits as an .npz, labelled by themselves or, with an `order`, by their places in it."""
    file = given.output / f"{digits}-{part}{f'-of-{order}' if order else ''}{f'-{few}' if few else ''}.npz"
    if not file.exists():
        whole = read_idx(given.mnist, part)
        images, labels = whole.images.numpy(), whole.labels.numpy()
        chosen = {digit: np.flatnonzero(labels == int(digit))[: few or None] for digit in digits}
        named = [np.full(len(places), (order or "0123456789").index(digit)) for digit, places in chosen.items()]
        np.savez(file, images=images[np.concatenate([*chosen.values()])], labels=np.concatenate(named))
    return file


def colour_file(given: argparse.Namespace, part: Part) -> Path:
    """MNIST in colour: every digit in a colour of its own on another one, drawn by seed 0."""
    file = given.output / f"colour-{part}.npz"
    if not file.exists():
        whole, random = read_idx(given.mnist, part), np.random.default_rng(0)
        ink = whole.images.numpy().astype(np.float32)[:, 0, :, :, None] / 255
        paper, pen = (random.uniform(*ends, (len(ink), 1, 1, 3)) for ends in ((0, 120), (135, 255)))
        coloured = (paper + ink * (pen - paper)).round().astype(np.uint8)
        np.savez(file, images=coloured, labels=whole.labels.numpy())
    return file


def cifar_folder(given: argparse.Namespace, part: Part, new: bool) -> Path:
    """The last five classes of CIFAR-10, or the first, as a folder of links."""
    folder = given.output / f"cifar-{part}-{'new' if new else 'old'}"
    names = sorted((given.cifar10 / part).iterdir())
    folder.mkdir(exist_ok=True)
    for each in names[5:] if new else names[:5]:
        if not (folder / each.name).exists():
            (folder / each.name).symlink_to(each.resolve())
    return folder


def names_file(given: argparse.Namespace, what: str) -> Path:
    """The names of ten classes, one a line."""
    file = given.output / f"{what}.txt"
    file.write_text("".join(f"{what}-{number}\n" for number in range(10)))
    return file


def measure(given: argparse.Namespace, case: str, method: str, seed: int) -> dict:
    """One row: the evaluation after the last step, the seconds of all, and the forgetting of each old class."""
    if case in DIGITS:
        return steps_of_digits(given, case, method, seed)
    if case == "cifar":
        real = f" --old-data {cifar_folder(given, 'train', new=False)}" if method == "oracle" else ""
        old, new = given.teachers / "cifar_resnet20-01234", cifar_folder(given, "train", new=True)
        return extended(
            given, case, method, seed, [f"{old} --new-data {new} --eval-data {given.cifar10 / 'test'}{real}"]
        )
    old, tests, new, what = given.teachers / "lenet5_bn", [given.mnist, given.fashion], given.fashion, "fashion"
    if case == "colour":
        resnet20, cifar = given.colour
        old, tests, new, what = resnet20, [cifar, colour_file(given, "test")], colour_file(given, "train"), "digit"
    shown = " ".join(f"--eval-data {test}" for test in tests)
    real = f" --old-data {given.mnist}" if method == "oracle" else ""
    line = f"{old} --new-data {new} --class-names {names_file(given, what)} {shown}{real}"
    return extended(given, case, method, seed, [line])


def steps_of_digits(given: argparse.Namespace, case: str, method: str, seed: int) -> dict:
    """Every step on the model of the step before."""
    first, *others = DIGITS[case]
    model, known, lines = given.teachers / f"lenet5_bn-{first}", first, []
    for number, digits in enumerate(others):
        order = known + digits
        new = digits_file(given, digits, "train", few=FEW if case == "few-shot" else 0)
        real = f" --old-data {digits_file(given, known, 'train', known)}" if method == "oracle" else ""
        lines.append(f"{model} --new-data {new} --eval-data {digits_file(given, order, 'test', order)}{real}")
        known, model = order, folder(given, case, method, seed, number)
    return extended(given, case, method, seed, lines)


def folder(given: argparse.Namespace, case: str, method: str, seed: int, number: int) -> Path:
    """Where a step's result is kept."""
    return given.output / f"{case.replace(', ', '-').replace(' ', '-')}-{method}-{seed}-{number}"


def extended(given: argparse.Namespace, case: str, method: str, seed: int, lines: list[str]) -> dict:
    """Take the steps; the images of a first step are those of the first method that made some."""
    seconds, results = 0.0, []
    for number, line in enumerate(lines):
        where, made = folder(given, case, method, seed, number), folder(given, case, "default", seed, number)
        shared = number == 0 and made.exists() and method not in OWN_IMAGES
        images = f" --old-images {made}" if shared else ""
        result = run(f"extend {line}{images} {METHODS[method]} --seed {seed} -o {where} --overwrite")
        seconds += result["seconds"]["total"]
        results.append({**result["evaluation"], "probe": result["teachers"][0]["probe"]})
    return {"seconds": seconds, "after": results}


def table(rows: list[dict]) -> str:
    """Markdown: a line for each case and method, after the last step."""
    columns = ("case", "method", "old classes", "new classes", "all classes", "mean", "forgotten", "agrees", "seconds")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case in CASES:
        for method in METHODS:
            made = [row for row in rows if (row["case"], row["row"]) == (case, method)]
            if made:
                lines.append(_line(case, method, made))
    return "\n".join(lines)


def _line(case: str, method: str, made: list[dict]) -> str:
    last = [row["after"][-1] for row in made]

    def counts(images: str) -> str:
        found = [[score for score in each["results"] if score["images"] == images][-1] for each in last]
        return " ".join(f"{score['correct']:,}" for score in found) + f" of {found[0]['total']:,}"

    shares = [each["results"][-1]["top1"] for each in last]
    lost = [statistics.mean(old["before"] - old["after"] for old in each["forgetting"]) for each in last]
    probe = [each["probe"] for each in last if each["probe"] is not None]
    cells = [case, method, counts("old"), counts("new"), counts("all"), f"{statistics.mean(shares):.2%}"]
    cells += [f"{100 * statistics.mean(lost):.2f}", f"{statistics.mean(probe):.1%}" if probe else ""]
    cells += [f"{statistics.mean(row['seconds'] for row in made):.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("teachers", "mnist", "fashion", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--colour", type=Path, nargs=2, metavar=("RESNET20", "CIFAR"))
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="for instance halves/abd")
    given = parser.parse_args()
    rows = Rows(given.output)
    for seed in range(given.seeds):
        for case in CASES:
            for method in METHODS:
                possible = {
                    "colour": given.colour and method != "oracle",
                    "cifar": given.cifar10,
                }.get(case, True)
                if possible and (not given.only or f"{case}/{method}" in given.only):
                    rows.make(partial(measure, given, case, method, seed), case=case, row=method, seed=seed)
    sys.stdout.write(table(rows.made) + "\n")


if __name__ == "__main__":
    main()
