"""Curves that are part of a page."""

from __future__ import annotations

import re

import pytest

from dfcompress.reporting.runs import Curve

pytest.importorskip("matplotlib")
from dfcompress.reporting.figures import loss_figure


def test_a_figure_has_the_colours_of_the_page_and_no_size_of_its_own():
    svg = loss_figure([(0, Curve([0, 4], [1000.0, 0.5])), (9, Curve([0, 4], [900.0, float("nan")]))])
    assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg)) == {
        "currentColor",
        "none",
        "var(--line-0)",
        "var(--line-1)",
    }
    assert re.search(r"<svg[^>]* (width|height)=", svg) is None
    assert set(re.findall(r'#([\w-]+)["\)]', svg)) <= set(re.findall(r' id="([^"]+)"', svg))
    assert re.findall(r">(1+0*)</text>", svg) == ["1", "10", "100", "1000"]  # Of the logarithmic axis.
