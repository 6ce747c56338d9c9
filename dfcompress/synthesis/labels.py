"""The class that each image of a set shall have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.randomness import generator

BALANCED, RANDOM = "balanced", "random"


@dataclass(frozen=True)
class Labels:
    """Labels as a pure function of a set's seed and an image's number: the classes of `cycle` in turn, repeated, or
    with `random` drawn from them.
    """

    cycle: Sequence[int]
    random: bool = False

    def of_batch(self, batch: int, size: int, *, seed: int) -> Tensor:
        """Labels `(size,)` of the images of a batch, int64."""
        cycle = torch.tensor(self.cycle)
        if self.random:
            places = torch.randint(len(cycle), (size,), generator=generator("labels", seed, batch))
        else:
            places = torch.arange(batch * size, (batch + 1) * size) % len(cycle)
        return cycle[places]


def choose_labels(how: str, classes: Sequence[str], card: ModelCard) -> Labels:
    """Resolve `how`: `balanced`, `random`, or a file with a class for every image. The first two use all classes or the
    given ones. A file has one class per line, or several separated by spaces; a shorter list is repeated.

    Classes are numbers or, if the card has them, names. For images of more than 64 pixels a side, whose sets often have
    fewer images than there are classes, all classes are taken in a spread order. Raises `BadInput` for an unknown
    class, for a file that cannot be read or is empty, and for a file together with `classes`.
    """
    every = range(card.classes) if card.small else spread(card.classes)
    allowed = [_class(name, card) for name in classes] or list(every)
    if how in (BALANCED, RANDOM):
        return Labels(allowed, random=how == RANDOM)
    try:
        text = Path(how).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"--labels {how!r} is not a file that can be read.", "Use balanced, random or a file.") from None
    lines = [line.strip() for line in text.splitlines()]
    known = card.class_names or ()  # Names may have spaces.
    listed = [_class(name, card) for line in lines for name in ([line] if line in known else line.split())]
    if not listed:
        raise BadInput(f"--labels {how} is empty.", "Write one class for every image into it.")
    if classes:
        raise BadInput("--labels FILE and --classes exclude each other.", "Give one of them.")
    return Labels(listed)


def spread(classes: int) -> list[int]:
    """All classes in an order whose every part covers the whole list. ImageNet's classes are sorted by kind: the first
    128 are fish, birds and reptiles, and a batch of one kind has other statistics than one of all kinds.
    """
    step = round(classes * 0.618034)  # Multiples of the golden ratio are spread evenly.
    while math.gcd(step, classes) > 1:
        step += 1
    return [step * place % classes for place in range(classes)]


def _class(name: str, card: ModelCard) -> int:
    if name in (card.class_names or ()):
        return list(card.class_names or ()).index(name)
    if name.isdecimal() and int(name) < card.classes:
        return int(name)
    names = f" or a name such as {card.class_names[0]!r}" if card.class_names else ""
    raise BadInput(f"There is no class {name!r}.", f"Use 0 to {card.classes - 1}{names}.")
