"""The line that a record keeps is that of our own command, and says all that was asked for."""

from __future__ import annotations

import json
import shlex
from typing import Any

import click
import pytest

from dfcompress.cli import root
from dfcompress.command_line import LEFT_OUT, line_of
from dfcompress.run import Run

COMMANDS = [name for name in root.list_commands(click.Context(root)) if name != "bench"]
TEXTS = {"budget": "30m"}  # Others take any text.


def context(words: list[str]) -> click.Context:
    """A command as it is called by the words after `dfcompress`; nothing runs."""
    above = click.Context(root, info_name="dfcompress")
    return root.get_command(above, words[0]).make_context(words[0], words[1:], parent=above)


def words(parameter: click.Parameter) -> list[str]:
    """A parameter with a value that is not its default."""
    if isinstance(parameter, click.Argument):
        return ["a model.pt", "other's.pt"] if parameter.nargs == -1 else ["a model.pt"]
    spelling = max(parameter.opts, key=len)
    if parameter.is_flag:
        return [parameter.secondary_opts[0] if parameter.secondary_opts else spelling]
    if isinstance(parameter.type, click.Choice):
        values = [parameter.type.choices[-1]]
    elif isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType):
        values = ["3"]
    else:
        values = [TEXTS.get(parameter.name, "a $b"), *(["none"] if parameter.multiple else [])]
    return [word for value in values for word in (spelling, value)]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_a_command_with_every_option_gives_the_same_values_again(name):
    parameters = root.get_command(click.Context(root), name).params
    told = [each for each in parameters if each.expose_value]
    asked = context([name, *(word for each in told for word in words(each))])
    again = context(shlex.split(line_of(asked))[1:])
    assert said(again) == said(asked)
    assert len(said(asked)) == len([each for each in told if each.name not in LEFT_OUT])


def said(called: click.Context) -> dict[str, Any]:
    return {name: value for name, value in called.params.items() if name not in LEFT_OUT}


def test_a_program_of_somebody_else_leaves_no_line_in_the_record(tmp_path):
    @click.command()
    @click.option("--password")
    def theirs(password: str) -> None:
        Run("invert", tmp_path / "run", {})

    theirs.main(["--password", "secret"], standalone_mode=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"] is None
