"""Bars of loops that run inside of one another."""

from __future__ import annotations

import sys

import pytest

from dfcompress import console


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
