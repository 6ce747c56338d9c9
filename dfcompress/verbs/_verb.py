"""What every verb is: its arguments are checked before any work, and PyTorch is as it starts meanwhile."""

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
# Whole numbers that cannot be 0; no other may be negative.
FROM_ONE = ("batch_size", "rounds", "round_to")


def verb(function: Callable[Options, Result]) -> Callable[Options, Result]:
    """Make a verb of a function: it refuses arguments of other types than annotated, and runs in `usual_torch`.

    Checkpoints are left to `as_classifier`, which says how a network becomes one.
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
    """Raise `BadInput` for a whole number that is below the smallest that makes sense."""
    for name, value in given.items():
        smallest = int(name in FROM_ONE)
        if isinstance(value, numbers.Integral) and value < smallest:
            raise refusal(name, value, owner, f"a whole number from {smallest} up")
        if name == "temperature" and value is not None and not 0 < value < math.inf:
            raise BadInput(f"--temperature {value} is not positive.", "4 is usual.")
