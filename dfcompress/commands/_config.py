"""Defaults for every option: `--config FILE.toml`, or `dfcompress.toml` in the current folder; the environment.

    images = 512            # for every command that has it
    [quantize]
    bits = "4w4a"

    DFCOMPRESS_IMAGES=512   # for every command that has it

Click ignores unknown keys and variables; here they are errors with a suggestion.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from dfcompress.errors import BadInput

DEFAULT_FILE = Path("dfcompress.toml")
PREFIX = "DFCOMPRESS_"
OF_THE_TESTS = "DFCOMPRESS_TEST_DATA"
# Other environment variables that dfcompress, or a library that it calls, reads.
OTHER_VARIABLES = {
    "OMP_NUM_THREADS": "Number of threads of a process on the CPU; without it, small steps take one thread.",
    "CUDA_VISIBLE_DEVICES": "The GPUs that a process sees, in CUDA's own form.",
    "CC, CXX": "The C and C++ compilers that torch.compile takes; gcc and g++ without them.",
    "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT": "Set by torchrun for each process.",
    "SLURM_*": "Read where srun started several tasks and torchrun did not set the variables above.",
    "TORCH_HOME, HF_HOME": "Where the libraries keep released weights that `torchvision:NAME` and `timm:NAME` fetch.",
    OF_THE_TESTS: "Folder of the released checkpoints that the test suite reads; no command reads it.",
}


def variable(parameter: click.Parameter) -> str:
    """The environment variable that sets an option or argument: DFCOMPRESS_BATCH_SIZE for `--batch-size`."""
    return PREFIX + _spelling(parameter).upper()


def check_environment(root: click.Context) -> None:
    """Raise `BadInput` for a DFCOMPRESS_ variable that is not an option of any command."""
    given = sorted(name for name in os.environ if name.startswith(PREFIX) and name != OF_THE_TESTS)
    known = {p.envvar for several in parts(root).values() for part in several for p in part.params} if given else ()
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, [each for each in known if isinstance(each, str)], 1)
            remedy = f"Did you mean {close[0]}?" if close else "Unset it."
            raise BadInput(f"The environment has {name}, which is not an option of any command.", remedy)


def _use(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the values of the configuration file the defaults of this command.

    Raises `BadInput` for a file that cannot be read, an unknown key, and a value of the wrong type.
    """
    if path is None and not DEFAULT_FILE.exists():
        return
    values = _read(path or DEFAULT_FILE)
    commands = parts(ctx.find_root())
    names = {name: {_spelling(p) for part in commands[name] for p in part.params} for name in commands}
    everywhere = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    _check(path or DEFAULT_FILE, everywhere, set().union(*names.values()), "option")
    _check(path or DEFAULT_FILE, tables, names, "command")
    for command, table in tables.items():
        _check(path or DEFAULT_FILE, table, names[command], f"option of {command}")
    command = ctx.command_path.split()[1]
    chosen = {key.replace("-", "_"): value for key, value in {**everywhere, **tables.get(command, {})}.items()}
    parameters = {_spelling(parameter): parameter for parameter in ctx.command.params}
    ctx.default_map = {
        str(parameters[key].name): _as_typed(path or DEFAULT_FILE, parameters[key], value)
        for key, value in chosen.items()
        if key in parameters
    }


option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_use,
    help=f"TOML file with options. By default {DEFAULT_FILE} in the current folder, where there is one.",
)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"--config {path} cannot be read: {error.strerror}.", "Name a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}.", "Correct it, or name another file with --config.") from None


def parts(root: click.Context) -> dict[str, list[click.Command]]:
    """The click commands behind each command name: three for `bench`, one for every other name."""
    assert isinstance(root.command, click.Group)
    commands = {name: root.command.get_command(root, name) for name in root.command.list_commands(root)}
    return {
        name: list(command.commands.values()) if isinstance(command, click.Group) else [command]
        for name, command in commands.items()
        if command
    }


def _spelling(parameter: click.Parameter) -> str:
    """The name of a parameter on the command line, with underscores: `batch_size` for `--batch-size`."""
    longest = max(parameter.opts, key=len)
    return longest.lstrip("-").replace("-", "_")


def _as_typed(path: Path, parameter: click.Parameter, value: Any) -> Any:
    """A value from the file in the form that the command line would give; raises `BadInput` for the wrong type."""
    several = parameter.multiple or parameter.nargs != 1
    values = value if several and isinstance(value, list) else [value]
    flag = isinstance(parameter, click.Option) and parameter.is_flag
    if any(isinstance(each, dict | list) or isinstance(each, bool) != flag for each in values):
        wanted = "true or false" if flag else "numbers or texts" if several else "one number or text"
        raise BadInput(f"{path}: {value!r} is not a value of {_spelling(parameter)}.", f"Write {wanted}.")
    typed = values if flag else [str(each) for each in values]
    return typed if several else typed[0]


def _check(path: Path, values: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    for key in values:
        if key.replace("-", "_") not in known:
            close = difflib.get_close_matches(key, known, 1)
            remedy = f"Did you mean {close[0]!r}?" if close else "Remove it."
            raise BadInput(f"{path}: {key!r} is no {what}.", remedy)
