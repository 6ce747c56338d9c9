"""Settings by name, from the command line and the configuration file: conversion of text, and errors for names."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dfcompress.errors import BadInput, unknown

Settings = TypeVar("Settings")
AUTO = "auto"


def parse(name: str, value: Any, default: Any) -> Any:
    """Convert `value` to the type of the setting's `default`.

    Raises `BadInput` for a value of another type, and for a number that is negative or not finite.
    """
    kind = type(default)
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is tuple and isinstance(value, str):
            return tuple(type(default[0])(part) for part in value.split(","))
        converted = kind(value)
        if kind is int and isinstance(value, float) and converted != value:
            raise ValueError(value)
    except (KeyError, ValueError, TypeError):
        raise BadInput(
            f"{name} = {value!r} is not a value of type {kind.__name__}.", f"Its default is {default!r}."
        ) from None
    if isinstance(converted, int | float) and (converted < 0 or not math.isfinite(converted)):
        raise BadInput(f"{name} = {value!r} is negative or not finite.", "Use a number from 0 up.")
    return converted


def named_function(spec: str, *, option: str, returns: str) -> Callable[..., Any]:
    """The function that `file.py:function` or `package.module:function` names; its module is executed.

    `option`: the command-line option, for messages. `returns`: what the function must return, for messages. Raises
    `BadInput` where the module cannot be run, or has no such function.
    """
    place, _, name = spec.rpartition(":")
    function = getattr(_module_at(place, option), name, None)
    if not callable(function):
        remedy = f"Name a function that returns {returns}."
        raise BadInput(f"{option} {spec}: {place} has no function {name!r}.", remedy)
    return function  # type: ignore[no-any-return]


def _module_at(place: str, option: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise BadInput(f"{option}: there is no module {place!r} ({error}).", "Check the spelling.") from None
    path = Path(place)
    if not path.is_file():
        raise BadInput(f"{option}: {place} does not exist.", "Name a Python file.")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # Whatever the user's own code raises.
        raise BadInput(
            f"{option} {place} cannot be run: {type(error).__name__}: {error}.", "Correct the file."
        ) from error
    return module


def one_or_more(given: Any) -> list[Any]:
    """A list of the given values: of one value, such as a path, or of the elements of a sequence (not of a string)."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def assignments(texts: Sequence[str], option: str) -> dict[str, str]:
    """Parse `NAME=VALUE` texts to values by name; raises `BadInput`, naming the option, for a text without '='."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"{option} {text!r} has no '='.", f"Write NAME=VALUE, for instance {option} lr=0.1.")
        values.pop(name.strip(), None)  # A repeated name moves to the end.
        values[name.strip()] = value.strip()
    return values


def replace_settings(settings: Settings, changes: Mapping[str, Any], what: str) -> Settings:
    """A copy of the frozen dataclass `settings` with changed fields, including fields of dataclasses inside it. Text is
    converted to the field's type. `what`: kind of setting, for messages.

    Raises `BadInput` for an unknown field (with a suggestion), for a field that the class lists as `REMOVED` (with the
    remedy), and for a value of the wrong type.
    """
    places = _fields(settings)
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name in getattr(settings, "REMOVED", {}):
            raise BadInput(f"The {what} {name!r} was removed.", settings.REMOVED[name])  # type: ignore[attr-defined]
        if name not in places:
            raise unknown(what, name, sorted(places))
        place, default = places[name]
        inner.setdefault(place, {})[name] = parse(name, value, default)
    outer = inner.pop("", {})
    parts = {place: dataclasses.replace(getattr(settings, place), **values) for place, values in inner.items()}
    return dataclasses.replace(settings, **outer, **parts)  # type: ignore[type-var]


def with_defaults(usual: Settings, given: Settings | Mapping[str, Any] | None) -> Settings:
    """`given` if it is a complete settings object, else the `usual` settings with the changes in `given`.

    Raises `BadInput` as `replace_settings` does.
    """
    if given is None or isinstance(given, Mapping):
        return replace_settings(usual, given or {}, "setting of training called")
    return given


def _fields(settings: Any) -> dict[str, tuple[str, Any]]:
    """Every field by name: the outer field whose dataclass holds it (or an empty text), and its value."""
    places: dict[str, tuple[str, Any]] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            places |= {name: (field.name, inner) for name, (_, inner) in _fields(value).items()}
        else:
            places[field.name] = ("", value)
    return places
