"""The contents of a report: its sections in their order."""

from __future__ import annotations

from collections.abc import Sequence

from dfcompress.reporting.page import Part, Section
from dfcompress.reporting.runs import ReportedRun
from dfcompress.reporting.sections.accuracy import accuracy, agreement, class_bias
from dfcompress.reporting.sections.class_images import RealImages, images
from dfcompress.reporting.sections.done import done, warnings
from dfcompress.reporting.sections.layers import layers
from dfcompress.reporting.sections.loss_curves import losses
from dfcompress.reporting.sections.machine import machine
from dfcompress.reporting.sections.parts import each_run
from dfcompress.reporting.sections.summary_table import summary


def sections_of(runs: Sequence[ReportedRun], real: RealImages) -> list[Section]:
    """Make the sections for which these runs have data. `real` returns the real images to show beside the images of a
    synthetic set, or None.
    """
    colours = {run.name: number for number, run in enumerate(runs)} if len(runs) > 1 else {}
    found = [
        Section("summary", "Summary", [Part("", list(summary(runs, colours)))]),
        Section("done", "What was done", each_run(runs, colours, done)),
        Section("warnings", "Health checks", warnings(runs, colours)),
        Section("accuracy", "Accuracy on real images", accuracy(runs, colours)),
        Section("images", "Images by class", each_run(runs, colours, lambda run: images(run, real))),
        Section("losses", "Losses", list(losses(runs, colours))),
        Section("agreement", "Agreement with the teacher", [Part("", list(agreement(runs, colours)))]),
        Section("class-bias", "Class bias", each_run(runs, colours, class_bias)),
        Section("layers", "Layers", each_run(runs, colours, layers)),
        Section("machine", "Time, versions and hardware", [Part("", list(machine(runs, colours)))]),
    ]
    return [section for section in found if any(part.blocks for part in section.parts)]
