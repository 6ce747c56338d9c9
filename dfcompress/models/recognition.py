"""Which architecture a file holds, from the names and shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.models.architectures import Architecture, Naming, architectures, tensors_of

SHOWN = 4


@dataclass(frozen=True)
class Recognised:
    """An architecture that fits, the tensors under its names, and what they say of classes and input channels."""

    architecture: Architecture
    naming: Naming
    classes: int
    channels: int
    tensors: dict[str, Tensor]


def recognise(tensors: Mapping[str, Tensor], where: str) -> Recognised:
    """The one architecture whose tensors have these names and shapes.

    Raises `BadInput` where several fit, naming them, or none, naming the nearest and where it first differs.
    """
    count = len(tensors)
    fits = [
        fit
        for architecture in architectures().values()
        if architecture.tensors in (None, count) or architecture.ignored
        if (fit := fit_to(architecture, tensors)) is not None
    ]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(fit.architecture.name for fit in fits)
        raise BadInput(
            f"{where} fits several architectures: {names}.",
            f"Say which, for instance --arch {fits[0].architecture.name}.",
        )
    alike = [architecture for architecture in architectures().values() if _may_be_near(architecture, count)]
    nearest = min(alike, key=lambda architecture: len(differences(architecture, tensors)))
    raise BadInput(
        f"{where} is none of the known architectures; the nearest is {nearest.name}: {describe(nearest, tensors)}.",
        "Name it with --arch timm:NAME or --arch file.py:factory.",
    )


def _may_be_near(architecture: Architecture, count: int) -> bool:
    """Whether it is worth building for comparison: half to twice as many tensors, or a number not known."""
    return architecture.tensors is None or count / 2 <= architecture.tensors <= 2 * count


def fit_to(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Recognised | None:
    """How the tensors fit the architecture, under one of its namings, or None where they do not."""
    for naming in architecture.namings:
        renamed = _needed(architecture, naming, tensors)
        classes, channels = _classes_and_channels(architecture, renamed)
        if {name: tensor.shape for name, tensor in renamed.items()} == tensors_of(architecture, classes, channels):
            return Recognised(architecture, naming, classes, channels, renamed)
    return None


def differences(architecture: Architecture, tensors: Mapping[str, Tensor]) -> list[str]:
    """What separates the tensors from the architecture under its best naming; empty where they fit."""
    return min((_differences(architecture, naming, tensors) for naming in architecture.namings), key=len)


def describe(architecture: Architecture, tensors: Mapping[str, Tensor]) -> str:
    """The first differences, in words."""
    found = differences(architecture, tensors)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _differences(architecture: Architecture, naming: Naming, tensors: Mapping[str, Tensor]) -> list[str]:
    renamed = _needed(architecture, naming, tensors)
    expected = tensors_of(architecture, *_classes_and_channels(architecture, renamed))
    missing = [f"{name} {_shape(shape)} is missing" for name, shape in expected.items() if name not in renamed]
    unequal = [
        f"{name} is {_shape(renamed[name].shape)}, expected {_shape(shape)}"
        for name, shape in expected.items()
        if name in renamed and renamed[name].shape != shape
    ]
    surplus = [
        f"{name} {_shape(tensor.shape)} is not in it" for name, tensor in renamed.items() if name not in expected
    ]
    return unequal + missing + surplus


def _needed(architecture: Architecture, naming: Naming, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in naming.apply(tensors).items() if not architecture.ignores(name)}


def _classes_and_channels(architecture: Architecture, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Classes from the last weight of the network, channels from its first convolution.

    The file's own order says nothing: safetensors sorts names.
    """
    expected = tensors_of(architecture, 10, architecture.channels)
    head = ["", *(name for name, shape in expected.items() if len(shape) >= 2)][-1]
    stem = next((name for name, shape in expected.items() if len(shape) == 4), "")
    classes = tensors[head].shape[0] if head in tensors and tensors[head].dim() >= 2 else 10
    channels = tensors[stem].shape[1] if stem in tensors and tensors[stem].dim() == 4 else architecture.channels
    return classes, channels


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a scalar"
