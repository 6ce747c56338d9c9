"""What a section shows of the runs that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.reporting import pictures
from dfcompress.reporting.page import Pictures
from dfcompress.reporting.runs import ReportedRun
from dfcompress.reporting.sections import sections_of
from dfcompress.run import RunFile

CARD = {"architecture": "a", "classes": 3, "input_size": [1, 4, 4], "mean": [0.5], "std": [0.5]}


def test_images_of_each_set_have_the_names_of_its_own_teacher(tmp_path, monkeypatch):
    """And of each class the first that were written are shown, over all shards that are there."""
    names = {"teacher-1": ["zero", "one", "two"], "teacher-2": ["a", "b", "c"]}
    sets = {}
    for place, its_names in names.items():
        card = {**CARD, "class_names": its_names}
        manifest = {"card": card, "shards": [12, 12, 4], "recipe": {"name": "bns"}}
        sets[place] = SyntheticSet.create(tmp_path / place, manifest)
        for shard in (0, 1):
            images = torch.arange(12 * shard, 12 * shard + 12).to(torch.uint8)[:, None, None, None].expand(12, 1, 4, 4)
            sets[place].write_shard(shard, images, torch.tensor([0, 2] * 6))
    shown = []
    monkeypatch.setattr(pictures, "_tiles", lambda images: shown.append((255 * images[:, 0, 0, 0]).round().tolist()))
    options = {"teachers": [{"card": {**CARD, "class_names": names["teacher-1"]}, "sha256": "a"}] * 2}
    file = RunFile(folder=Path(), verb="merge", options=options, versions={})
    sections = sections_of([ReportedRun(name="merged", file=file, sets=sets)], lambda synthetic: None)
    (part,) = next(section for section in sections if section.name == "images").parts
    captions = [[each.name for each in block.classes] for block in part.blocks if isinstance(block, Pictures)]
    assert captions == [["zero", "two"], ["a", "c"]]
    assert shown == 2 * [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]


def test_shares_that_nothing_was_held_out_for_are_left_out(tmp_path):
    teacher = {"checkpoint": "a", "agreement": 0.5, "held_out": None, "probe": None, "blocks": [None, None]}
    other = {**teacher, "checkpoint": "b", "held_out": 1.0, "blocks": [0.25, None]}
    options = {"teachers": [{"sha256": "0", "card": CARD}] * 2, "outputs": [[0, 1, 2]] * 2}
    measured = {"teachers": [teacher, other], "seconds": {"total": 1.0}}
    file = RunFile(folder=tmp_path, verb="merge", options=options, versions={}, finished=True, measurements=measured)
    sections = sections_of([ReportedRun(name="m", file=file)], lambda synthetic: None)
    (section,) = (each for each in sections if each.name == "agreement")
    assert "25.00 %" in repr(section)


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
