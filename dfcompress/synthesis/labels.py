"""Which class each image of a set shall have."""

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
    """Labels as a pure function of a set's seed and an image's number: `cycle` one after the other and again, or
    drawn from it with `random`.
    """

    cycle: Sequence[int]
    random: bool = False

    def of_batch(self, batch: int, size: int, *, seed: int) -> Tensor:
        """Labels `(size,)` of the images of a batch; int64."""
        cycle = torch.tensor(self.cycle)
        if self.random:
            places = torch.randint(len(cycle), (size,), generator=generator("labels", seed, batch))
        else:
            places = torch.arange(batch * size, (batch + 1) * size) % len(cycle)
        return cycle[places]


def choose_labels(how: str, classes: Sequence[str], card: ModelCard) -> Labels:
    """`balanced`, `random`, or a file with a class for every image, out of all classes or the named ones. In a file
    they stand a line each, or between spaces; a shorter list begins again.

    Classes are numbers or, where the card has them, names. Where images have more than 64 pixels a
    side, and so a set often fewer images than there are classes, all classes are taken in a spread order.
    Raises `BadInput` for what is none of them.
    """
    every = range(card.classes) if card.small else spread(card.classes)
    allowed = [_class(name, card) for name in classes] or list(every)
    if how in (BALANCED, RANDOM):
        return Labels(allowed, random=how == RANDOM)
    try:
        text = Path(how).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"--labels {how!r} is no file that can be read.", "Use balanced, random or a file.") from None
    lines = [line.strip() for line in text.splitlines()]
    known = card.class_names or ()  # Names may have spaces.
    listed = [_class(name, card) for line in lines for name in ([line] if line in known else line.split())]
    if not listed:
        raise BadInput(f"--labels {how} is empty.", "Write one class for every image into it.")
    if classes:
        raise BadInput("--labels FILE and --classes exclude each other.", "Give one of them.")
    return Labels(listed)


def spread(classes: int) -> list[int]:
    """All classes in an order any piece of which comes from all over the list: ImageNet's is sorted by kind, its first
    128 being fish, birds and reptiles, and the statistics of a batch of one kind are not those of all.
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
