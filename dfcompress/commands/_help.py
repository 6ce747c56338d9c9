"""Help pages: `--help` shows the main options, `--help-all` shows every option under its heading.

A command only sets `cls=Command`. Options get their heading by `under`; an option without a heading is a main option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import click

from dfcompress.command_line import line_of, started_by
from dfcompress.commands import _config

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

MAIN = "Options"
HEADINGS = (MAIN, "Model", "Images", "Recording", "Quantization", "Pruning", "Training", "Checks", "Output", "Machine")
ALL = "--help-all"
# A command with at most this number of options has a single help page, which shows all of them.
ONE_PAGE = 20
# Choices with more characters than this are listed in the sentence, and not in the column of names.
CHOICES_SHOWN = 40
LONG = "NAME"
# Names of options in other tools, or in other commands, and our names.
ELSEWHERE = {
    "--epochs": "--train-steps",
    "--iterations": "--steps",
    "--learning-rate": "--train-lr",
    "--num-images": "--images",
    "--dataset": "--data",
    "--calibration-data": "--data",
    "--output-dir": "--output",
    "--data": "--sets",
}
# Sentences start in this column; after a longer name, they start on the next line.
COLUMN = 30
SHOW_ALL = "dfcompress.show_all"


def under(heading: str, *options: Decorator) -> Decorator:
    """Add `options`, in the given order, under the `heading` of the help page, which is one of `HEADINGS`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        before = len(getattr(command, "__click_params__", []))
        for option in reversed(options):
            command = option(command)
        for parameter in command.__click_params__[before:]:  # type: ignore[attr-defined]
            parameter.heading = heading
        return command

    return decorate


class Argument(click.Argument):
    """An argument with an `explanation` on the help page; click's own arguments have none before version 8.4."""

    def __init__(self, *declarations: Any, explanation: str, **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.explanation = explanation


class Command(click.Command):
    """A command whose help page has headings, and that refuses unknown DFCOMPRESS_ variables before it runs."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's parameters, with `--help-all` where the options do not fit on one help page."""
        return super().get_params(ctx) + ([] if self._fits() else [_HELP_ALL])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; for an option name of another tool, the error suggests our name."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            ours = ELSEWHERE.get(error.option_name, "")
            if any(ours in parameter.opts for parameter in self.params):
                raise click.UsageError(f"No such option {error.option_name!r}. Did you mean {ours!r}?", ctx) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments and the options, under their headings."""
        arguments = [(each.human_readable_name, each.explanation) for each in self.params if isinstance(each, Argument)]
        if arguments:
            with formatter.section("Arguments"):
                _write(formatter, arguments)
        everything = self._fits() or ctx.meta.get(SHOW_ALL, False)
        for heading, options in by_heading(self.get_params(ctx)):
            if heading == MAIN or everything:
                with formatter.section(heading):
                    _write(formatter, [_row(describe(option)) for option in options])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; raises `BadInput` for a DFCOMPRESS_ variable that is not an option of any command."""
        _config.check_environment(ctx.find_root())
        with started_by(line_of(ctx)):
            return super().invoke(ctx)

    def _fits(self) -> bool:
        return sum(isinstance(each, click.Option) and not each.hidden for each in self.params) <= ONE_PAGE


def _show_all(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        ctx.meta[SHOW_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


_HELP_ALL = click.Option(
    [ALL],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show every option under its heading and exit.",
)


def by_heading(parameters: list[click.Parameter]) -> Iterator[tuple[str, list[click.Option]]]:
    """The visible options of each heading, in the order of `HEADINGS`."""
    shown = [each for each in parameters if isinstance(each, click.Option) and not each.hidden]
    for heading in HEADINGS:
        if options := [option for option in shown if getattr(option, "heading", MAIN) == heading]:
            yield heading, options


class Described(NamedTuple):
    """The description of an option on a page.

    `names`: its names. `value`: placeholder of its value, empty for a flag. `help`: its sentences. `default`: its
    default value, empty where it has none. `required`: whether it must be given. `repeatable`: whether it may be given
    several times.
    """

    names: str
    value: str
    help: str
    default: str
    required: bool
    repeatable: bool


def describe(option: click.Option) -> Described:
    """Describe an option for help pages and the reference."""
    value = "" if option.is_flag else _value(option)
    sentences = option.help or ""
    if isinstance(option.type, click.Choice) and value == LONG and not option.metavar:
        sentences += f" One of: {', '.join(option.type.choices)}."
    return Described(
        names=" / ".join(", ".join(names) for names in (option.opts, option.secondary_opts) if names),
        value=value,
        help=sentences,
        default=_default(option),
        required=option.required,
        repeatable=option.multiple,
    )


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        choices = "|".join(option.type.choices)
        return choices if len(choices) <= CHOICES_SHOWN else LONG
    kinds: list[tuple[type[click.ParamType[Any]], str]] = [
        (click.types.IntParamType, "N"),
        (click.types.FloatParamType, "NUMBER"),
        (click.Path, "PATH"),
    ]
    return next((name for kind, name in kinds if isinstance(option.type, kind)), "TEXT")


def _default(option: click.Option) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    return str(option.default) if option.show_default else ""


def _write(formatter: click.HelpFormatter, rows: Sequence[tuple[str, str]]) -> None:
    """Write names and sentences in two columns. Unlike click's `write_dl`, this does not break names at hyphens, and
    all lists of a page have the same columns.
    """
    for name, sentences in rows:
        start = " " * formatter.current_indent + name
        if len(start) > COLUMN - 2:
            formatter.write(start + "\n")
            start = ""
        lines = wrap(sentences, formatter.width - COLUMN, break_on_hyphens=False) or [""]
        formatter.write(start.ljust(COLUMN) + lines[0] + "\n")
        formatter.write("".join(" " * COLUMN + line + "\n" for line in lines[1:]))


def _row(told: Described) -> tuple[str, str]:
    extras = [f"default: {told.default}"] if told.default else []
    extras += ["required"] * told.required + ["repeatable"] * told.repeatable
    return f"{told.names} {told.value}".rstrip(), told.help + (f"  [{'; '.join(extras)}]" if extras else "")
