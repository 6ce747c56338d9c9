"""The command line that started a run, including options from the environment and the configuration file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import click
from click.core import ParameterSource

# Options that do not change what is computed.
LEFT_OUT = {"resume", "overwrite", "as_json", "dry_run"}

_line: ContextVar[str | None] = ContextVar("line", default=None)


def command_line() -> str | None:
    """The command line that started the current work; None where a verb was called from Python."""
    return _line.get()


@contextmanager
def started_by(line: str | None) -> Iterator[None]:
    """Set `line` as the command line of the work inside the block; None: no command line started it."""
    before = _line.set(line)
    try:
        yield
    finally:
        _line.reset(before)


def line_of(context: click.Context) -> str:
    """The command, with the arguments and options it was called with, as a line for a shell."""
    arguments: list[str] = []
    options: list[str] = []
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name in LEFT_OUT or name not in context.params:
            continue
        if context.get_parameter_source(name) in (ParameterSource.DEFAULT, None):
            continue
        if isinstance(parameter, click.Option):
            options += _words(parameter, context.params[name])
        else:
            arguments += map(str, _each(context.params[name]))
    return shlex.join([*context.command_path.split(), *arguments, *options])


def _words(option: click.Option, value: Any) -> Iterator[str]:
    spelling = max(option.opts, key=len)
    if option.is_flag:
        yield from [spelling] if value else option.secondary_opts[:1]
        return
    for one in _each(value):
        yield from (spelling, "none" if one is None else str(one))


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
