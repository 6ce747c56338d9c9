"""Table 3 of Haroush et al. 2020 with what is to be had, for docs/compare.md and docs/results.md.

    python docs/measure_similarity.py RESNET44 RESNET20 LENET --cifar FILE --jpeg FILE --mnist PLACE --fashion PLACE \\
        --output FOLDER

J_KL of each set under each model, raw and divided by J_KL of the model's own data: CIFAR-10 for the ResNets, MNIST for
LeNet-5. Then 100 images of other sets among 800 of the model's own: how many of them are its 100 outliers. Every
command is printed; results are kept in FOLDER/rows.jsonl and not made again.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Rows, run

from dfcompress.data.real import open_images
from dfcompress.models.checkpoint import load

# Of ResNet-44 trained on CIFAR-10, shown CIFAR-10, MNIST, random and FGSM images: tables 3 and 4.
PUBLISHED = {"cifar": (0.023, 1.0), "mnist": (0.151, 6.6), "random": (0.498, 21.7), "fgsm": (0.075, 3.3)}
PAIRS = (("lenet", "mnist", "fashion"), ("resnet20", "cifar", "mnist"), ("resnet20", "cifar", "fashion"))
OWN, FOREIGN = 800, 100
SETS = ("cifar", "jpeg", "mnist", "fashion", "random", "fgsm")


def measure(given: argparse.Namespace, model: Path, own: str) -> dict[str, Any]:
    """J_KL and its ratio for each set under one model."""
    places = {name: str(getattr(given, name)) for name in SETS[:4]}
    asked = {name: place if name == own else f"images:{place}" for name, place in places.items()}
    asked |= {"random": "random", "fgsm": f"fgsm:{places[own]}"}
    found = run(f"compare {model} --sets {' '.join(asked.values())} --own {asked[own]}")["results"]
    rows = zip(asked, found, strict=True)
    return {name: [row["bn_divergence"], row["divergence_ratio"], row["images"], row["top1"]] for name, row in rows}


def find_outliers(given: argparse.Namespace, model: Path, own: str, other: str) -> dict[str, Any]:
    """How many of the `FOREIGN` images furthest out are those of another set that were put among the model's own."""
    card = load(model).card
    sources = [
        (open_images(getattr(given, own), card), OWN),
        (open_images(getattr(given, other), card, labelled=False), FOREIGN),
    ]
    images = torch.cat([next(source.batches(count))[0] for source, count in sources])
    file = given.output / f"{other}-among-{own}.npz"
    np.savez(file, images=(images * 255).round().byte().numpy())
    (found,) = run(f"compare {model} --sets images:{file} --outliers {FOREIGN}")["results"]
    return {"found": sum(int(outlier["image"]) >= OWN for outlier in found["outliers"])}


def table(rows: Rows) -> str:
    """Markdown: a line for each model."""
    lines = [f"| J_KL (divided by that of own data) | {' | '.join(SETS)} |", "|---" * (len(SETS) + 1) + "|"]
    published = [f"{PUBLISHED[name][0]:.3f} ({PUBLISHED[name][1]})" if name in PUBLISHED else "" for name in SETS]
    lines.append(f"| ResNet-44, published | {' | '.join(published)} |")
    for row in (row for row in rows.made if "other" not in row):
        lines.append(f"| {row['model']} | {' | '.join(f'{row[name][0]:.4f} ({row[name][1]:.1f})' for name in SETS)} |")
    for row in (row for row in rows.made if "other" in row):
        lines.append(f"{row['model']}: {row['found']} of {FOREIGN} {row['other']} images among {OWN} of {row['own']}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser()
    for name in ("resnet44", "resnet20", "lenet"):
        parser.add_argument(name, type=Path)
    for name in (*SETS[:4], "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    rows = Rows(given.output)
    for model, own in (("lenet", "mnist"), ("resnet20", "cifar"), ("resnet44", "cifar")):
        rows.make(partial(measure, given, getattr(given, model), own), model=model, own=own)
    for model, own, other in PAIRS:
        path = getattr(given, model)
        rows.make(partial(find_outliers, given, path, own, other), model=model, own=own, other=other)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
