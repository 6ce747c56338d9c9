"""The errors of dfcompress, and their exit codes.

DfcompressError      the work failed                                     exit 1
├── BadInput         a file, an option or a model that cannot be used    exit 2
└── GateNotMet       a gate such as ``--fail-under`` was not met         exit 3

Every message has one sentence on the problem, with the value found and its place,
and one sentence on the remedy.
Insufficient memory also ends with exit code 1. Any other exception is a bug and keeps its traceback.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

IN_PLACE = re.compile(r"in-?place")
NOT_IN_PLACE = "Give layers that work in place inplace=False in the factory that --arch or --student names."


class DfcompressError(Exception):
    """The work could not be finished.

    `problem`: what is wrong, with the value found. `remedy`: what to do; may be empty.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem = problem
        self.remedy = remedy


class BadInput(DfcompressError):
    """A file, an option or a model that cannot be used; nothing was written."""

    exit_code = 2


class GateNotMet(DfcompressError):
    """The work is done, but a threshold the user set was not reached."""

    exit_code = 3


def unknown(what: str, name: str, known: Sequence[str]) -> BadInput:
    """The error for a name that is not one of the known names; it suggests the nearest one."""
    close = difflib.get_close_matches(name, known, 1)
    remedy = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
    return BadInput(f"There is no {what} {name!r}.", remedy)


def listed(names: Iterable[str], shown: int, separator: str = ", ") -> str:
    """The first `shown` names, and the number of the others: `a, b and 3 more`."""
    every = list(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return separator.join(every[:shown]) + more


def first_line(error: BaseException) -> str:
    """The message of another library's error as the end of a sentence: its first line, without torch's hint to
    programmers and without a full stop; the name of its class where the message is empty.
    """
    said = str(error).strip().partition(" Hint: ")[0]
    return (said or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """A text from a file; each character that could control a terminal is replaced by a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def is_of_layers_in_place(reason: str) -> bool:
    """Whether a network failed because a layer overwrote a tensor that its gradient needs; remedy: `NOT_IN_PLACE`."""
    return bool(IN_PLACE.search(reason))
