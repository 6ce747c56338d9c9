"""The command line: finds the commands, and turns errors into one line and an exit code.

A command is imported only when it is named, and imports torch only when it runs, so `--help`, completion and usage
errors take no time.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from typing import Any

import click

from dfcompress import commands, console
from dfcompress.commands import _config
from dfcompress.errors import DfcompressError, first_line

INTERRUPTED = 130
SMALLER = "Free memory, or use a smaller --batch-size or fewer images."
# The order of the commands in `dfcompress --help`; a command that is not listed here stands under the last heading.
ORDER = {
    "See and measure": ["inspect", "evaluate", "compare", "report"],
    "Make images": ["invert", "record"],
    "Make a smaller model": ["quantize", "prune", "distill", "merge", "export"],
    "Teach new classes": ["extend"],
    "Try it and this machine": ["demo", "doctor", "bench"],
}


class Commands(click.Group):
    """The group whose commands are the files of `dfcompress/commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if module.name[0] != "_")

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the command's file; None for an unknown name."""
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(importlib.import_module(f"{commands.__name__}.{name}"), name)
        for part in [command, *getattr(command, "commands", {}).values()]:
            _take_environment(part)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings, each with its first sentence."""
        known = self.list_commands(ctx)
        others = [name for name in known if name not in {each for names in ORDER.values() for each in names}]
        for heading, names in ORDER.items():
            found = [name for name in names if name in known] + (others if heading == list(ORDER)[-1] else [])
            commands = [(name, self.get_command(ctx, name)) for name in found]
            with formatter.section(heading):
                formatter.write_dl([(name, each.get_short_help_str(200)) for name, each in commands if each])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command; for an unknown name, raise a usage error that suggests the nearest command."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


def _take_environment(command: click.Command) -> None:
    """Let the environment set every option, by the variable with the option's name."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            parameter.envvar = _config.variable(parameter)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dfcompress")
def root() -> None:
    """Compress released image classifiers without the data they were trained on.

    Every option can also be set by an environment variable (DFCOMPRESS_STEPS for --steps) or in the file
    dfcompress.toml. The command line overrides the environment, and the environment overrides the file.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code; only this function turns errors into a line on stderr."""
    console.configure(console.NORMAL)
    try:
        root.main(args, prog_name="dfcompress", standalone_mode=False)
    except DfcompressError as error:
        if console.speaks():
            click.echo(console.shown(f"dfcompress: {error}"), err=True)
        return error.exit_code
    except click.ClickException as error:
        if console.speaks():
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        if console.speaks():
            click.echo(
                "dfcompress: interrupted; add --resume to the same line to go on, where the command has it.", err=True
            )
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        from dfcompress.machine.memory import is_out_of_memory  # Imports torch, which this error shows is there.

        if not is_out_of_memory(error):
            raise
        if console.speaks():
            click.echo(f"dfcompress: memory did not suffice: {first_line(error)}. {SMALLER}", err=True)
        return DfcompressError.exit_code
    return 0
