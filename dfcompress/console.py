"""The only place that prints: results on stdout, progress and notices on stderr.

Used as a library, dfcompress is silent; the command line calls `configure` first.
Only rank 0 of a distributed run prints.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from dfcompress.errors import DfcompressError, printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

QUIET, NORMAL, VERBOSE = -1, 0, 1
LINE_EVERY_SECONDS = 5.0
BAR = 12  # Characters.

_verbosity = QUIET
_bars: list[RichProgress] = []  # The display on the screen, which holds a bar for each loop.


def configure(verbosity: int) -> None:
    """Set how much is printed on stderr: `QUIET`, `NORMAL` or `VERBOSE`.

    Characters that the encoding of stdout lacks, for instance in class names, are printed as backslash escapes.
    """
    global _verbosity
    _verbosity = verbosity
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def silent() -> Iterator[None]:
    """Print no notices and no progress inside the block."""
    global _verbosity
    before, _verbosity = _verbosity, QUIET
    try:
        yield
    finally:
        _verbosity = before


def speaks() -> bool:
    """Whether this process prints: the only process of its job, or the process of rank 0."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def notice(text: str, *, level: int = NORMAL) -> None:
    """Print one line on stderr, about a decision or a fact that the user should know, from verbosity `level` on."""
    if speaks() and _verbosity >= level and sys.stderr:  # `sys.stderr` is None where a daemon has closed it.
        print(shown(text), file=sys.stderr, flush=True)


def last_words(text: str) -> None:
    """Write a line to stderr from a signal handler or a thread, in a process of any rank, just before it ends."""
    if sys.stderr:
        os.write(sys.stderr.fileno(), f"{text}\n".encode())


def result(text: str) -> None:
    """Print a line of the result on stdout; raises `DfcompressError` where stdout cannot be written."""
    if speaks():
        try:
            print(shown(text), flush=True)
        except BrokenPipeError:  # The reader has closed the pipe, as `| head` does.
            raise
        except OSError as error:
            raise DfcompressError(f"stdout cannot be written: {error.strerror}.", "What was made is there.") from None


def shown(text: str) -> str:
    """The text without characters that could control a terminal; names of classes and layers come from files."""
    return "\n".join(map(printable, text.split("\n")))


def amount(count: int, one: str, several: str = "") -> str:
    """A count with its noun: `1 batch`, `2,048 batches`. The default of the plural `several` is `one` with an s."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def result_json(values: Mapping[str, Any]) -> None:
    """Print the whole result as one JSON object on stdout."""
    result(json.dumps(values, indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain-text table on stdout; the first column is left-aligned, the others are right-aligned."""
    lines = [list(map(printable, row)) for row in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        result("  ".join(cells).rstrip())


class Progress(Protocol):
    """The progress of a loop."""

    def update(self, done: int, /, **values: float) -> None:
        """Report that `done` units of the total are finished; `values`: the latest measurements by name."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """Show the progress of a loop of `total` units on stderr: a bar in a terminal, else a line every few seconds."""
    if not speaks() or _verbosity < NORMAL or not sys.stderr:
        yield _Silence()
    elif sys.stderr.isatty():
        yield from _bar(what, total)
    else:
        yield _Lines(what, total)


class _Silence:
    def update(self, done: int, /, **values: float) -> None:
        pass


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.started = self.spoke = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, /, **values: float) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = done, now
        if done < self.total and now - self.spoke < LINE_EVERY_SECONDS:
            return
        self.spoke = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        left = f", {(self.total - done) / rate:.0f} s left" if rate and done < self.total else ""
        print(f"{self.what}: {done}/{self.total}{_formatted(values)}{left}", file=sys.stderr, flush=True)


def _bar(what: str, total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    whole, rest = partial(Column, no_wrap=True), Column(ratio=1, no_wrap=True)  # Only the values are cut.
    columns = (
        TextColumn("{task.description}", table_column=whole()),
        BarColumn(BAR, table_column=whole(min_width=BAR)),
        MofNCompleteColumn(table_column=whole(min_width=len(f"{total}/{total}"))),
        TimeRemainingColumn(table_column=whole(min_width=len("0:00:00"))),
        TextColumn("{task.fields[values]}", table_column=rest),
    )
    inner = bool(_bars)
    with ExitStack() as stack:
        if not inner:  # The bar of a loop inside another loop stands below the other bar.
            bars = RichProgress(*columns, console=Console(stderr=True), expand=True)
            _bars.append(stack.enter_context(bars))
            stack.callback(_bars.clear)
        bar = _bars[0]
        task = bar.add_task(what, total=total, values="")
        if inner:
            stack.callback(bar.remove_task, task)

        class Bar:
            def update(self, done: int, /, **values: float) -> None:
                bar.update(task, completed=done, values=_formatted(values))

        yield Bar()


def _formatted(values: Mapping[str, float]) -> str:
    return "".join(f"  {name} {value:.4g}" for name, value in values.items())
