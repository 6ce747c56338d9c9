"""`--config FILE.toml`, or `dfcompress.toml` in the current folder: defaults for every option.

    images = 512            # for every command that has it
    [quantize]
    bits = "4w4a"

Click ignores keys it does not know; here they are an error with a suggestion.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from dfcompress.errors import BadInput

DEFAULT_FILE = Path("dfcompress.toml")


def _use(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the file's values this command's defaults."""
    if path is None and not DEFAULT_FILE.exists():
        return
    values = _read(path or DEFAULT_FILE)
    names = _options_by_command(ctx.find_root())
    everywhere = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    _check(path or DEFAULT_FILE, everywhere, set().union(*names.values()), "option")
    _check(path or DEFAULT_FILE, tables, names, "command")
    for command, table in tables.items():
        _check(path or DEFAULT_FILE, table, names[command], f"option of {command}")
    command = ctx.command_path.split()[1]
    chosen = {key.replace("-", "_"): value for key, value in {**everywhere, **tables.get(command, {})}.items()}
    ctx.default_map = {_parameter(ctx, key): value for key, value in chosen.items()}


option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_use,
    help=f"Options from a TOML file; default is {DEFAULT_FILE} in the current folder, if it is there.",
)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"--config {path} cannot be read: {error.strerror}.", "Name a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}.", "Correct it, or name another file with --config.") from None


def _options_by_command(root: click.Context) -> dict[str, set[str]]:
    assert isinstance(root.command, click.Group)
    commands = {name: root.command.get_command(root, name) for name in root.command.list_commands(root)}
    return {name: {_spelling(p) for part in _parts(command) for p in part.params} for name, command in commands.items()}


def _parts(command: click.Command | None) -> Iterable[click.Command]:
    return command.commands.values() if isinstance(command, click.Group) else [command] if command else []


def _spelling(parameter: click.Parameter) -> str:
    """How the command line spells a parameter, with underscores: `batch_size` for `--batch-size`."""
    longest = max(parameter.opts, key=len)
    return longest.lstrip("-").replace("-", "_")


def _parameter(ctx: click.Context, spelling: str) -> str:
    """The name under which click keeps an option."""
    names = {_spelling(parameter): parameter.name for parameter in ctx.command.params}
    return names.get(spelling) or spelling


def _check(path: Path, values: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    for key in values:
        if key.replace("-", "_") not in known:
            close = difflib.get_close_matches(key, known, 1)
            remedy = f"Did you mean {close[0]!r}?" if close else "Remove it."
            raise BadInput(f"{path}: {key!r} is no {what}.", remedy)
