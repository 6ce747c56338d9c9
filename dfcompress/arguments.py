"""Arguments of the Python interface, checked against their annotations before any work."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dfcompress.errors import BadInput

# The types that are accepted for an annotated type: also NumPy's numbers, other libraries' paths, and lists for tuples.
TAKEN: Mapping[Any, type] = {int: numbers.Integral, float: numbers.Real, Path: os.PathLike, tuple: Sequence}
WORDS: Mapping[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    Path: "a path",
    NoneType: "None",
}
SHOWN = 60  # Characters of a value in a message: a network's `repr` has hundreds of lines.


def require_types(given: Mapping[str, Any], hints: Mapping[str, Any], owner: str) -> None:
    """Raise `BadInput` for the first value in `given` whose type is not the annotated type in `hints`, both by name.

    `owner`: name of the function or class, for the message. A `Literal` accepts its words alone.
    """
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            raise refusal(name, value, owner, _described(hints[name]))


def require_fields(settings: Any) -> None:
    """Raise `BadInput` for a field of a dataclass whose value is not of the annotated type."""
    kind: Any = type(settings)
    require_types(vars(settings), _hints(kind), kind.__name__)


def refusal(name: str, value: Any, owner: str, needed: str) -> BadInput:
    """The error for the argument `name` of `owner`, a function or a class; `needed`: text for what must be given."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."
    return BadInput(f"{name}={shown} is not a valid argument of {owner}.", f"Give {needed}.")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is Any:
        return True
    if kind is Literal:
        return value in inner
    if isinstance(value, bool) or not isinstance(value, TAKEN.get(kind, kind)):
        return isinstance(value, bool) and kind is bool
    if issubclass(kind, Mapping):
        return all(_fits(each, inner[1]) for each in value.values())
    if issubclass(kind, Sequence) and kind is not str:
        return not isinstance(value, str) and all(_fits(each, inner[0]) for each in value)
    return True


def _described(hint: Any) -> str:
    """The values that an annotation allows, in words: `a string, a path or None`."""
    *others, last = _alternatives(hint)
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(hint: Any) -> list[str]:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return list(dict.fromkeys(word for each in inner for word in _alternatives(each)))
    if kind is Literal:
        return [repr(word) for word in inner]
    if kind in WORDS:
        return [WORDS[kind]]
    if issubclass(kind, Mapping):
        return ["a dict" if inner[1] is Any else f"a dict of {_several(inner[1])}"]
    if issubclass(kind, Sequence):
        return [f"a list of {_several(inner[0])}"]
    return [f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"]


def _several(hint: Any) -> str:
    """The values that an annotation allows, in the plural: `strings or paths`."""
    return " or ".join(f"{word.partition(' ')[2]}s" for word in _alternatives(hint))
