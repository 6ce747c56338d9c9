"""Bars of loops that run inside of one another, and streams that cannot be written."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from dfcompress import console
from dfcompress.errors import DfcompressError


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console.configure(console.NORMAL)
    yield
    console.configure(console.QUIET)


def test_a_loop_inside_of_another_one_has_its_bar_below(terminal, capsys):
    """A terminal has one live display; a second one would be refused."""
    with console.progress("outer", 2) as outer:
        for number in range(2):
            with console.progress(f"inner {number}", 3) as inner:
                inner.update(3, loss=1.0)
            outer.update(number + 1)
    shown = capsys.readouterr().err
    assert "outer" in shown
    with console.progress("after", 1) as after:
        after.update(1)
    assert "after" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verbosity", "bars"), [(console.QUIET, False), (console.NORMAL, False), (console.NORMAL, True)]
)
def test_a_value_may_have_the_name_of_a_parameter(verbosity, bars, terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bars)
    console.configure(verbosity)
    with console.progress("loop", 1) as loop:
        loop.update(1, done=0.25, self=0.5)
    assert ("done 0.25  self 0.5" in capsys.readouterr().err) == (verbosity == console.NORMAL)


def test_nothing_is_said_where_stderr_is_closed(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    console.notice("noticed")
    console.last_words("last")
    with console.progress("loop", 1) as loop:
        loop.update(1)
    assert capsys.readouterr().out == ""


def test_names_that_stdout_cannot_encode_are_written_with_escapes(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    console.configure(console.QUIET)
    console.table(["class"], [["caf\u00e9"]])
    assert out.buffer.getvalue() == b"class\ncaf\\xe9\n"


def test_names_cannot_steer_a_terminal(capsys, terminal):
    console.result("cat \x1b[31m\nnext line")
    console.notice("dog \x1b]0;title\x07")
    shown = capsys.readouterr()
    assert shown.out == "cat ?[31m\nnext line\n"
    assert shown.err == "dog ?]0;title?\n"


def test_a_full_disk_behind_stdout_is_said(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(DfcompressError, match="stdout cannot be written: No space left"):
        console.result("one line")


def test_an_amount_has_the_noun_in_the_right_number():
    assert [console.amount(count, "step") for count in (0, 1, 2048)] == ["0 steps", "1 step", "2,048 steps"]
    assert [console.amount(count, "batch", "batches") for count in (1, 2)] == ["1 batch", "2 batches"]
