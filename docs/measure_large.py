"""DeepInversion's tables on ImageNet, by the installed command on a CUDA machine: pruning and new classes. Not run.

    python docs/measure_large.py prune IMAGENET_VAL OUTPUT
    python docs/measure_large.py extend IMAGENET_VAL OUTPUT --cub FOLDER --flowers FOLDER

IMAGENET_VAL is an ImageFolder of the validation images; CUB and Flowers hold `train` and `test`, a folder a class in
each; the weights are torchvision's, from its cache. Every command is printed; results are appended to
OUTPUT/rows.jsonl, and rows that are there are not made again. Published (Yin et al. 2020): ResNet-50 (76.1 %) at −37 %
of its operations 73.3 %, at −71 % 60.7 %; ResNet-18 extended by CUB 67.61 %, by Flowers 80.85 %, in the mean over both
data sets. Images, steps and the batch size are ours.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from measuring import Rows, run

PRUNED = {"-37 %": "--flops 0.63", "-71 %": "--flops 0.29"}
HOW = {
    "adaptive": "--images 100000 --train-steps 100000 --train-batch-size 256",
    "plain": "--images 100000 --recipe deepinversion --second-recipe none --train-steps 100000 --train-batch-size 256",
}
METHODS = ("abd", "deepinversion", "rdfcil", "lwf-mc")


def pruned(given: argparse.Namespace, share: str, how: str) -> dict[str, Any]:
    """One row of the pruning table."""
    where = given.output / f"{share}-{how}".replace(" ", "").replace("%", "")
    line = f"prune torchvision:resnet50 {PRUNED[share]} {HOW[how]} --export onnx"
    result = run(f"{line} --eval-data {given.imagenet} -o {where} --overwrite")
    return {"seconds": result["seconds"], "results": result["evaluation"]["results"], "export": result["export"]}


def extended(given: argparse.Namespace, name: str, method: str) -> dict[str, Any]:
    """One row of the table of new classes: counts on ImageNet, on the new classes, and on all."""
    new, where = getattr(given, name), given.output / f"{name}-{method}"
    line = f"extend torchvision:resnet18 --new-data {new / 'train'} --method {method}"
    result = run(f"{line} --eval-data {given.imagenet} --eval-data {new / 'test'} -o {where} --overwrite")
    return {"seconds": result["seconds"], **result["evaluation"]}


def main() -> None:
    """Measure, and print every row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("prune", "extend"))
    parser.add_argument("imagenet", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cub", type=Path)
    parser.add_argument("--flowers", type=Path)
    given = parser.parse_args()
    rows = Rows(given.output)
    if given.what == "prune":
        for share in PRUNED:
            for how in HOW:
                rows.make(partial(pruned, given, share, how), row=f"{share}, {how}")
    else:
        for name in ("cub", "flowers"):
            for method in METHODS if getattr(given, name) else ():
                rows.make(partial(extended, given, name, method), row=f"{name}, {method}")
    for row in rows.made:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
