"""Curves as inline SVG of a page: it uses the page's colours, also in dark mode, and its text stays text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from dfcompress.reporting.runs import Curve

WIDTH, HEIGHT = 2.9, 1.75  # Inches of 72 units: on a phone of 400 pixels a figure is enlarged, never reduced.
TEXT = 8.0
COLOURS = 8  # `--line-0` to `--line-7` of page.html; with more runs the colours repeat.
INK = "#0000ff"  # Placeholder that is replaced by the page's text colour after the SVG is written.
LOG_FROM = 20.0  # Least ratio of the largest to the smallest value for a logarithmic axis.


def loss_figure(curves: Sequence[tuple[int, Curve]]) -> str:
    """Draw the curves of one loss, each with the number of its colour, as an `<svg>` element without a title."""
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context():
        rcdefaults()  # The user's own matplotlib style does not apply here.
        rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dfcompress", "font.size": TEXT})
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for colour, curve in curves:
            marker = "o" if len(curve.steps) == 1 else None
            width = 1.2 if len(curves) <= COLOURS else 0.5
            axes.plot(curve.steps, curve.values, color=_placeholder(colour), lw=width, marker=marker, markersize=3)
        values = [value for _, curve in curves for value in curve.values if math.isfinite(value)]
        if values and min(values) > 0 and max(values) / min(values) > LOG_FROM:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=2.5, width=0.6)
        for side in ("left", "bottom"):
            axes.spines[side].set(color=INK, linewidth=0.6)
        axes.tick_params(which="minor", length=0, labelleft=False)
        axes.locator_params(axis="x", nbins=4)
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
            written, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    return _inline(written.getvalue())


def _placeholder(colour: int) -> str:
    return f"#0001{colour % COLOURS:02x}"


def _inline(svg: str) -> str:
    """The `<svg>` of an SVG file as an element of a page, without size, background, metadata and unused ids, and in the
    colours of the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    used = set(re.findall(r"#([\w-]+)\)", svg)) | set(re.findall(r'href="#([\w-]+)"', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'<g>\s*<path d="[^"]*" style="fill: #ffffff[^"]*"/>\s*</g>', "", svg)  # The background.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)  # It would apply to the whole page.
    while svg != (svg := re.sub(r"<g>\s*(<g/>\s*)*</g>|<g>\s*</g>|<g/>", "", svg)):
        pass
    svg = svg.replace(INK, "currentColor")
    for colour in range(COLOURS):
        svg = svg.replace(_placeholder(colour), f"var(--line-{colour})")
    return re.sub(r"\n\s*", "\n", svg)
