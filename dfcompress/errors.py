"""What can go wrong, and the exit code it ends with.

DfcompressError      the work failed                                     exit 1
├── BadInput         a file, an option or a model that cannot be used    exit 2
└── GateNotMet       a gate such as ``--fail-under`` was not met         exit 3

Every message is one sentence of what is wrong, with the value found and where,
and one sentence of what to do about it.
Any other exception is a bug and keeps its traceback.
"""


class DfcompressError(Exception):
    """The work could not be finished.

    `problem` says what is wrong, with the value found; `remedy` says what to do.
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
