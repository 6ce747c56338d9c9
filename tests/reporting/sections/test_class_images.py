"""What the images of a set stand for, and which of them are shown."""

from __future__ import annotations

from pathlib import Path

import torch

from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.reporting import pictures
from dfcompress.reporting.contents import sections_of
from dfcompress.reporting.page import Pictures
from dfcompress.reporting.runs import ReportedRun
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
