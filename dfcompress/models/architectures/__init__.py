"""Every architecture that has a name; one file a family, and the folder is the registry.

A family's file holds `ARCHITECTURES`, a list of `Architecture`.
Other packages add theirs through the entry-point group `dfcompress.architectures`, each entry such a list.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard

SMALL_INPUT = 64


@dataclass(frozen=True)
class Naming:
    """How a family of released files spells the tensors: regular expressions and what they become in our names.

    `mean` and `std` are those that everybody who uses this naming trained with, where that is known.
    """

    renames: tuple[tuple[str, str], ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under our names."""
        return {self._renamed(name): tensor for name, tensor in tensors.items()}

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class Architecture:
    """A network that can be built for any number of classes and input channels.

    `size` is the usual height and width of its input in pixels.
    `tensors` are the possible numbers of tensors in its state dict (without `num_batches_tracked`), where known:
    they spare building a network only to see that it is another one.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    size: int
    channels: int = 3
    tensors: tuple[int, ...] | None = None
    namings: tuple[Naming, ...] = (Naming(),)


@cache
def architectures() -> dict[str, Architecture]:
    """All architectures by name."""
    found: list[Architecture] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").ARCHITECTURES
    for entry in metadata.entry_points(group="dfcompress.architectures"):
        found += entry.load()
    return {architecture.name: architecture for architecture in found}


def find(name: str) -> Architecture:
    """The architecture of that name; raises `BadInput` with the nearest names where there is none."""
    known = architectures()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        remedy = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(sorted(known))}."
        raise BadInput(f"There is no architecture {name!r}.", remedy)
    return known[name]


def fit_student(name: str, card: ModelCard, *, seed: int) -> tuple[nn.Module, ModelCard, str]:
    """A freshly initialised network for the teacher's classes and input, its card, and a sentence on what was taken.

    At inputs of up to 64 pixels `resnet18` means its CIFAR form `cifar_resnet18`, and likewise for every name that has
    one. Raises `BadInput` for unknown names and inputs that the network cannot take.
    """
    channels, height, width = card.input_size
    small = f"cifar_{name}"
    taken = small if max(height, width) <= SMALL_INPUT and small in architectures() else name
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = find(taken).make(card.classes, channels)
    with torch.no_grad():
        try:
            network.eval()(torch.zeros(1, *card.input_size))
        except (RuntimeError, ValueError) as error:
            raise BadInput(
                f"{taken} cannot take images of {channels}x{height}x{width}: {error}.", "Name another --student."
            ) from None
    stem = " (its small-image form: 3x3 stem, no max-pool)" if taken != name else ""
    sentence = f"Student: {taken}{stem}, {card.classes} classes, input {channels}x{height}x{width}."
    origin = {**card.origin, "architecture": "given"}
    names = card.class_names
    return network, ModelCard(taken, card.classes, card.input_size, card.mean, card.std, names, origin), sentence
