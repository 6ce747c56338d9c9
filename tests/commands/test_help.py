"""Help pages: short first, everything with --help-all, in sentences; names of the environment that are none."""

from __future__ import annotations

import re

import click
import pytest

from dfcompress.cli import root, run
from dfcompress.commands import _config, _help

PARTS = [(name, part) for name, several in _config.parts(click.Context(root)).items() for part in several]
OPTIONS = {
    f"{name} {option.opts[-1]}": option
    for name, part in PARTS
    for option in part.params
    if isinstance(option, click.Option) and not option.hidden
}


def page(part: click.Command, *, everything: bool) -> str:
    """A help page as it is printed."""
    context = click.Context(part, info_name=part.name)
    context.meta[_help.SHOW_ALL] = everything
    return part.get_help(context)


@pytest.mark.parametrize("part", [part for _, part in PARTS], ids=lambda part: part.name)
def test_the_first_page_is_short_and_the_second_has_every_option(part):
    assert isinstance(part, _help.Command)
    spellings = [max(p.opts, key=len) for p in part.params if isinstance(p, click.Option) and not p.hidden]
    everything = page(part, everything=True)
    assert all(re.search(rf"^  .*{spelling}\b", everything, re.M) for spelling in spellings)
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", page(part, everything=False), re.M)
    assert len(shown) <= _help.ONE_PAGE + 1
    assert ("--help-all" in shown) == (len(spellings) > _help.ONE_PAGE)


def test_every_option_is_explained_in_sentences():
    for where, option in OPTIONS.items():
        told = _help.describe(option)
        assert re.fullmatch(r"[A-Z][^;]+\.", told.help), where
        assert not re.search(r"[(;]", told.default), where
        assert getattr(option, "heading", _help.MAIN) in _help.HEADINGS, where


def test_an_unknown_variable_of_the_environment_is_refused_with_the_nearest(capsys, monkeypatch):
    monkeypatch.setenv("DFCOMPRESS_TEST_DATA", "read by the tests alone")
    assert run(["doctor", "--help"]) == 0
    monkeypatch.setenv("DFCOMPRESS_BTIS", "4w4a")
    assert run(["doctor"]) == 2
    assert "not an option of any command. Did you mean DFCOMPRESS_BITS?" in capsys.readouterr().err
