"""What the summary tells of a model."""

from __future__ import annotations

import pytest

from dfcompress.reporting.contents import sections_of
from dfcompress.reporting.runs import ReportedRun
from dfcompress.run import RunFile

CARD = {"architecture": "a", "classes": 3, "input_size": [1, 4, 4], "mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize(("right", "noise"), [(91, True), (80, False)])
def test_a_loss_that_mcnemars_test_may_call_noise_is_told_as_such(right, noise, tmp_path):
    """1 of 100 where 10 answers differ is no loss; 12 of 100 where 20 differ is one."""
    usual = {"total": 100, "top5": None, "standard_error": 0.0, "images": None}
    scores = [
        {"checkpoint": "teacher", "correct": 92, "top1": 0.92, "agreement": 1.0, **usual},
        {"checkpoint": "q", "correct": right, "top1": right / 100, "agreement": 0.9 if noise else 0.8, **usual},
    ]
    options = {"teacher": {"sha256": "0", "card": CARD}}
    measured = {"evaluation": {"results": scores}, "seconds": {"total": 1.0}}
    file = RunFile(folder=tmp_path, verb="distill", options=options, versions={}, finished=True, measurements=measured)
    (summary,) = sections_of([ReportedRun(name="q", file=file)], lambda synthetic: None)[0].parts
    assert f"{92 - right:.2f} points less accurate on 100 real images" in repr(summary)
    assert ("may be noise" in repr(summary)) == noise
