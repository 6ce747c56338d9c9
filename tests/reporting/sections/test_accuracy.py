"""What is shown of the answers of a model."""

from __future__ import annotations

from dfcompress.reporting.contents import sections_of
from dfcompress.reporting.runs import ReportedRun
from dfcompress.run import RunFile

CARD = {"architecture": "a", "classes": 3, "input_size": [1, 4, 4], "mean": [0.5], "std": [0.5]}


def test_shares_that_nothing_was_held_out_for_are_left_out(tmp_path):
    teacher = {"checkpoint": "a", "agreement": 0.5, "held_out": None, "probe": None, "blocks": [None, None]}
    other = {**teacher, "checkpoint": "b", "held_out": 1.0, "blocks": [0.25, None]}
    options = {"teachers": [{"sha256": "0", "card": CARD}] * 2, "outputs": [[0, 1, 2]] * 2}
    measured = {"teachers": [teacher, other], "seconds": {"total": 1.0}}
    file = RunFile(folder=tmp_path, verb="merge", options=options, versions={}, finished=True, measurements=measured)
    sections = sections_of([ReportedRun(name="m", file=file)], lambda synthetic: None)
    (section,) = (each for each in sections if each.name == "agreement")
    assert "25.00 %" in repr(section)
