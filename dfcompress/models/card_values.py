"""The values of a model card: checked, and put together from arguments, file, sidecar, tensors and defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models.architecture import Architecture
from dfcompress.models.card import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MNIST_MEAN,
    MNIST_STD,
    SMALL_INPUT,
    ModelCard,
    Origin,
)
from dfcompress.models.recognition import Recognised

# Keeps the numbers of elements of tensors within 64 bits: 2^20 by 2^20 channels of 11x11 pixels.
WIDEST = 2**20
SIZES, SHARES = f"3 whole numbers from 1 to {WIDEST:,}, CxHxW", "one share of 1 a channel"
WIDTHS = f"the channels in and out of each layer, from 1 to {WIDEST:,}"


def checked_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The card fields present in `values`, validated; raises `BadInput` naming a field that is not valid."""
    listed = (list, tuple)
    kinds: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
        "architecture": (str, lambda value: True, "a name"),
        "classes": (int, _is_size, f"a whole number from 1 to {WIDEST:,}"),
        "input_size": (listed, lambda value: len(value) == 3 and all(map(_is_size, value)), SIZES),
        "mean": (listed, lambda value: all(_is_number(each) and 0 <= each <= 1 for each in value), SHARES),
        "std": (listed, lambda value: all(_is_number(each) and 0 < each <= 1 for each in value), SHARES),
        "class_names": (listed, lambda value: all(isinstance(name, str) for name in value), "a list of names"),
        "config": (dict, lambda value: isinstance(value.get("model_type"), str), "an object with a model_type"),
    }
    checked: dict[str, Any] = {}
    for name, (kind, is_right, form) in kinds.items():
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or not is_right(value):
            raise BadInput(f"{where}: {name} is {value!r}.", f"It must be {form}.")
        checked[name] = tuple(value) if isinstance(value, (list, tuple)) else value
    if values.get("widths") is not None:
        checked["widths"] = _widths(values["widths"], where)
    return checked


def class_names_in(path: Path) -> tuple[str, ...]:
    """The non-empty lines of a text file, stripped; raises `BadInput` if the file cannot be read."""
    try:
        return tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--class-names {path} cannot be read: {getattr(error, 'strerror', error)}.",
            "Name a text file with one class a line.",
        ) from None


def composed_card(fit: Recognised, stated: Mapping[str, Any], given: Mapping[str, Any]) -> ModelCard:
    """The card, from these sources in order of priority: arguments, file and sidecar, naming, defaults.

    `classes` is 0 for a network from a factory unless given: the width of its output is measured later.
    Raises `BadInput` if the values do not fit the weights or each other.
    """
    foreign = fit.architecture.foreign
    size = given.get("input_size", stated.get("input_size"))
    channels = size[0] if foreign and size else fit.channels
    classes = 0 if foreign else fit.classes
    implied = {"mean": fit.naming.mean, "std": fit.naming.std} if fit.naming.mean else {}
    layers: list[tuple[Origin, Mapping[str, Any]]] = [
        ("assumed", _usual(fit.architecture, channels)),
        ("recognised", {"architecture": fit.architecture.name, "classes": classes, **implied}),
        ("read", {name: value for name, value in stated.items() if name != "classes"}),
        ("given", given),
    ]
    values: dict[str, Any] = {"class_names": None}
    origin: dict[str, Origin] = {}
    for how, layer in layers:
        values |= layer
        origin |= dict.fromkeys(layer, how)
    # The name that the file states may be timm's or a later version's; recognition has found ours.
    values["architecture"] = fit.architecture.name
    values["widths"] = dict(fit.architecture.widths) or None
    _check_fits(values, fit)
    return ModelCard.from_json({**values, "origin": origin})


def say_assumed(card: ModelCard, architecture: Architecture, where: str) -> None:
    """Print which card values of a network for large images are assumed: the defaults of its architecture."""
    values = {
        "--mean": ("mean", ",".join(f"{value:g}" for value in card.mean)),
        "--std": ("std", ",".join(f"{value:g}" for value in card.std)),
        "--input-size": ("input_size", "x".join(map(str, card.input_size))),
    }
    assumed = {option: value for option, (name, value) in values.items() if card.origin.get(name) == "assumed"}
    if architecture.size is None or architecture.size <= SMALL_INPUT or not {"--mean", "--std"} & assumed.keys():
        return
    options = " ".join(f"{option} {value}" for option, value in assumed.items())
    console.notice(f"{where}: {options} assumed, as is usual for {architecture.name}; give what it was trained with.")


def _widths(values: object, where: str) -> dict[str, tuple[int, int]]:
    """The widths of a card; raises `BadInput` naming the layer whose widths are not valid."""
    if not isinstance(values, dict):
        raise BadInput(f"{where}: widths is {str(values)[:40]!r}.", f"It must be an object of {WIDTHS}.")
    for name, channels in values.items():
        is_pair = isinstance(channels, (list, tuple)) and len(channels) == 2
        if not is_pair or not all(map(_is_size, channels)):
            raise BadInput(f"{where}: the widths of {name!r} are {str(channels)[:40]}.", f"Give {WIDTHS}.")
    return {name: (c_in, c_out) for name, (c_in, c_out) in values.items()}


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= WIDEST


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _usual(architecture: Architecture, channels: int) -> dict[str, Any]:
    mean, std = (0.5,) * channels, (0.5,) * channels
    if channels == 1:
        mean, std = MNIST_MEAN, MNIST_STD
    elif channels == 3 and architecture.mean and architecture.std:
        mean, std = architecture.mean, architecture.std
    elif channels == 3:
        small = architecture.size is not None and architecture.size <= SMALL_INPUT
        mean, std = (CIFAR_MEAN, CIFAR_STD) if small else (IMAGENET_MEAN, IMAGENET_STD)
    size = {} if architecture.size is None else {"input_size": (channels, architecture.size, architecture.size)}
    return {"mean": mean, "std": std, **size}


def _check_fits(card: Mapping[str, Any], fit: Recognised) -> None:
    if "input_size" not in card:
        raise BadInput(f"The input size of {fit.architecture.name} is not known.", "Add --input-size CxHxW.")
    if card["input_size"][0] != fit.channels and not fit.architecture.foreign:
        size = "x".join(map(str, (fit.channels, *card["input_size"][1:])))
        raise BadInput(
            f"The input size {card['input_size']} does not fit weights of {fit.channels} channels.",
            f"Use --input-size {size}.",
        )
    for name in ("mean", "std"):
        if len(card[name]) != card["input_size"][0]:
            raise BadInput(
                f"{name} has {len(card[name])} values for {card['input_size'][0]} channels.", f"Correct --{name}."
            )
