"""Fingerprints: find the architectures of torchvision and timm that have the tensors of a file.

`fingerprints.json` lists them, so that the fitting one is found without building networks or importing libraries;
`docs/index_architectures.py` writes it.
An architecture has two fingerprints: one of its tensors' names and shapes, one of their shapes in order.
Both are independent of the numbers of classes and input channels.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_suffix(".json")
# Hexadecimal digits, 40 bits: a network that is not listed has a listed fingerprint with a chance of 1 in 10^9.
DIGITS = 10

# The parts that torch's own wrappers insert into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Names of architectures that compute the same, the default name first.
Twins = tuple[str, ...]
Shape = Sequence[int]


class Index(NamedTuple):
    """The index of all listed architectures.

    `versions` are the versions of the libraries when the index was made. Each entry of `heads` has the names of the
    tensors of an architecture that depend on the number of classes, each entry of `stems` those that depend on the
    number of image channels. `by_names` and `by_order` map a fingerprint to its architectures, grouped by what they
    compute.
    """

    versions: dict[str, str]
    heads: list[list[str]]
    stems: list[list[str]]
    by_names: dict[str, list[Twins]]
    by_order: dict[str, list[Twins]]


@cache
def index() -> Index:
    """The index that is shipped with the package."""
    stored = json.loads(FILE.read_text())
    found = Index(stored["versions"], stored["heads"], stored["stems"], defaultdict(list), defaultdict(list))
    for fingerprints, groups in stored["architectures"].items():
        by_name, by_order = fingerprints.split()
        twins = [tuple(names.split()) for names in groups]
        found.by_names[by_name] += twins
        found.by_order[by_order] += twins
    return found


def unwrapped(name: str) -> str:
    """A tensor's name without the parts of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def of_names(shapes: Mapping[str, Shape], head: Collection[str], stem: Collection[str]) -> str:
    """The fingerprint of tensors by name, without the head's tensors and the stem's number of input channels."""
    lines = (
        f"{name} {_text(shape, free=1 if name in stem else None)}"
        for name, shape in sorted(shapes.items())
        if name not in head
    )
    return _digest(lines)


def of_order(shapes: Sequence[Shape]) -> str:
    """The fingerprint of shapes in order.

    The first shape of four dimensions is taken for the stem's; the last shape of two dimensions or more and all shapes
    after it are taken for the head's.
    """
    stem = next((place for place, shape in enumerate(shapes) if len(shape) == 4), None)
    head = max((place for place, shape in enumerate(shapes) if len(shape) >= 2), default=0)
    return _digest(
        _text(shape, free=1 if place == stem else 0 if place >= head else None) for place, shape in enumerate(shapes)
    )


def fitting_names(shapes: Mapping[str, Shape]) -> list[Twins]:
    """The architectures that have exactly these tensors under the same names, with or without a head."""
    listed = index()
    found: list[Twins] = []
    for stem in [each for each in listed.stems if shapes.keys() >= {*each}]:
        for head in [(), *(each for each in listed.heads if shapes.keys() >= {*each})]:
            found += [twins for twins in listed.by_names.get(of_names(shapes, head, stem), []) if twins not in found]
    return found


def fitting_order(shapes: Sequence[Shape]) -> list[Twins]:
    """The architectures whose tensors have these shapes in this order."""
    return index().by_order.get(of_order(shapes), [])


def _text(shape: Shape, *, free: int | None) -> str:
    return "x".join("*" if place == free else str(size) for place, size in enumerate(shape))


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGITS]
