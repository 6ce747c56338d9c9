"""Common behaviour of verbs: arguments are checked before any work, and PyTorch's settings are its defaults inside."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_type_hints

from dfcompress.arguments import refusal, require_types
from dfcompress.errors import BadInput
from dfcompress.machine.process import usual_torch

Options = ParamSpec("Options")
Result = TypeVar("Result")
# Integer arguments that must be at least 1; all others must be at least 0.
FROM_ONE = ("batch_size", "rounds", "round_to")


def verb(function: Callable[Options, Result]) -> Callable[Options, Result]:
    """Turn a function into a verb, which checks its arguments by their annotations, and runs in `usual_torch`.

    The verb raises `BadInput` for an argument of another type, an integer below its minimum, and a `temperature` that
    is not positive and finite. Checkpoints are left to `as_classifier`, whose message says how to wrap a network.
    """
    positional = list(function.__annotations__)
    hints = {
        name: hint
        for name, hint in get_type_hints(function).items()
        if "Classifier" not in function.__annotations__[name]
    }

    @functools.wraps(function)
    def checked(*args: Options.args, **options: Options.kwargs) -> Result:
        given = dict(zip(positional, args, strict=False)) | options
        require_types(given, hints, function.__name__)
        _require_counts(given, function.__name__)
        with usual_torch():
            return function(*args, **options)

    return checked


def _require_counts(given: dict[str, Any], owner: str) -> None:
    """Raise `BadInput` for an integer below its minimum, and for a temperature that is not positive and finite."""
    for name, value in given.items():
        smallest = int(name in FROM_ONE)
        if isinstance(value, numbers.Integral) and value < smallest:
            raise refusal(name, value, owner, f"a whole number from {smallest} up")
        if name == "temperature" and value is not None and not 0 < value < math.inf:
            raise BadInput(f"--temperature {value} is not positive.", "4 is usual.")
