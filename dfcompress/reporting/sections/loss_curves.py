"""The losses of each phase over its steps, with the curves of all runs in one figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dfcompress.reporting.figures import loss_figure
from dfcompress.reporting.page import Figure, Figures, Part
from dfcompress.reporting.runs import Curve, ReportedRun


def losses(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Part]:
    """A part for each phase, with a figure for each of its losses, which has the curves of all runs with this loss."""
    phases: dict[str, dict[str, list[tuple[str, Curve]]]] = {}
    for run in runs:
        for of_phase in run.losses:
            for name, curves in of_phase.curves.items():
                phases.setdefault(of_phase.phase, {}).setdefault(name, []).extend((run.name, each) for each in curves)
    for phase, found in sorted(phases.items(), key=lambda each: each[0].startswith("training")):
        figures = [_figure(phase, name, curves, colours) for name, curves in found.items()]
        shown = {run for curves in found.values() for run, _ in curves}
        legend = [(run, colour) for run, colour in colours.items() if run in shown]
        yield Part(phase[0].upper() + phase[1:], [Figures(figures, legend)])


def _figure(phase: str, name: str, curves: Sequence[tuple[str, Curve]], colours: Mapping[str, int]) -> Figure:
    several = f", {len(curves)} curves" if len(curves) > 1 else ""
    ends = "" if several else f"{curves[0][1].values[0]:.4g} → {curves[0][1].values[-1]:.4g}"
    svg = loss_figure([(colours.get(run, 0), curve) for run, curve in curves])
    return Figure(svg, name.replace("_", " "), ends, f"{name} of {phase} over the steps{several} {ends}".strip())
