"""The class map: the output of a merged student that each class of each teacher becomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier

FORM = "It must hold one list of names for each teacher, in the order of its classes; equal names become one output."


@dataclass(frozen=True)
class ClassMap:
    """The student's outputs. `of` holds for each teacher the index of the output of each of its classes, `(classes,)`,
    int64. `count` is the number of outputs. `names` are their names, or None unless every class has a name.
    """

    of: tuple[Tensor, ...]
    count: int
    names: tuple[str, ...] | None = None


def join_classes(teachers: Sequence[Classifier], class_map: str | Path | None = None) -> ClassMap:
    """Make one output for each distinct class name, in the order in which the names first occur in the teachers.

    The names come from `class_map` (a JSON file with a list of names for each teacher), or by default from the cards.
    Where a teacher has no names, the classes of all teachers count as different, and the outputs are the classes of the
    first teacher, then of the second, and so on.
    Raises `BadInput` for a map that does not fit, for a teacher with two classes of one name, and for names on cards
    that differ in spelling alone.
    """
    lists = _read(Path(class_map), teachers) if class_map is not None else [each.card.class_names for each in teachers]
    named = [names for names in lists if names]
    if len(named) < len(teachers):
        unnamed = " and ".join(teacher.name for teacher, names in zip(teachers, lists, strict=True) if not names)
        console.notice(f"No class names in {unnamed}: the teachers' classes are taken for different ones, in order.")
        return _disjoint(teachers)
    _check_unique(teachers, named)
    if class_map is None:
        _check_spelling(named)
    places: dict[str, int] = {}
    for name in chain.from_iterable(named):
        places.setdefault(name, len(places))
    of = tuple(torch.tensor([places[name] for name in names]) for names in named)
    return ClassMap(of, len(places), tuple(places))


def _disjoint(teachers: Sequence[Classifier]) -> ClassMap:
    of, start = [], 0
    for teacher in teachers:
        of.append(torch.arange(start, start + teacher.card.classes))
        start += teacher.card.classes
    return ClassMap(tuple(of), start)


def _check_unique(teachers: Sequence[Classifier], named: Sequence[Sequence[str]]) -> None:
    for teacher, names in zip(teachers, named, strict=True):
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise BadInput(f"{teacher.name} has two classes of the name {twice!r}.", "Name them with --class-map.")


def _check_spelling(named: Sequence[Sequence[str]]) -> None:
    spelt: dict[str, str] = {}
    for name in chain.from_iterable(named):
        plain = "".join(letter for letter in name.casefold() if letter.isalnum()) or name
        if spelt.setdefault(plain, name) != name:
            raise BadInput(
                f"The class names {spelt[plain]!r} and {name!r} differ in spelling alone.",
                "Say with --class-map whether they are one class.",
            )


def _read(path: Path, teachers: Sequence[Classifier]) -> list[tuple[str, ...]]:
    try:
        lists: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"--class-map {path} cannot be read: {getattr(error, 'strerror', error)}.", FORM) from None
    if not isinstance(lists, list) or len(lists) != len(teachers):
        raise BadInput(f"--class-map {path} must hold a list with {len(teachers)} entries, one for each teacher.", FORM)
    for teacher, names in zip(teachers, lists, strict=True):
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise BadInput(f"--class-map {path}: the entry of {teacher.name} is not a list of names.", FORM)
        if len(names) != teacher.card.classes:
            raise BadInput(
                f"--class-map {path} names {len(names)} classes of {teacher.name}, which has {teacher.card.classes}.",
                FORM,
            )
    return [tuple(names) for names in lists]
