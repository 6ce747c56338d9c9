"""Fingerprints: which of all of torchvision's and timm's architectures have the tensors of a file.

`fingerprints.json` lists them, so that no network is built and no library imported to find the one that fits;
`docs/index_architectures.py` makes it.
One fingerprint of an architecture is of its tensors' names and shapes, another of their shapes in order.
The number of classes and of input channels plays no part in either.
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
# 40 bits: that a network which is not listed has a listed fingerprint has a chance of 1 in 10^9.
DIGITS = 10

# What torch's own wrappers put between the parts of a name.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Architectures that compute the same, the most usual name first.
Twins = tuple[str, ...]
Shape = Sequence[int]


class Index(NamedTuple):
    """What is listed.

    `versions` are those of the libraries when the index was made. `heads` are the tensors that depend on the number of
    classes, `stems` those that depend on the channels of the images, of one architecture each. `by_names` and
    `by_order` give the architectures of a fingerprint, those that compute the same together.
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
    """A tensor's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def of_names(shapes: Mapping[str, Shape], head: Collection[str], stem: Collection[str]) -> str:
    """The fingerprint of tensors by name, but for the head's, and for the channels that go into the stem."""
    lines = (
        f"{name} {_text(shape, free=1 if name in stem else None)}"
        for name, shape in sorted(shapes.items())
        if name not in head
    )
    return _digest(lines)


def of_order(shapes: Sequence[Shape]) -> str:
    """The fingerprint of shapes in order. The first of four dimensions is taken for the stem's, the last of two or more
    and all behind it for the head's.
    """
    stem = next((place for place, shape in enumerate(shapes) if len(shape) == 4), None)
    head = max((place for place, shape in enumerate(shapes) if len(shape) >= 2), default=0)
    return _digest(
        _text(shape, free=1 if place == stem else 0 if place >= head else None) for place, shape in enumerate(shapes)
    )


def fitting_names(shapes: Mapping[str, Shape]) -> list[Twins]:
    """The architectures that have these tensors, with or without a head, all of them under their own names."""
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
