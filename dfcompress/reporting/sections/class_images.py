"""The images of each synthetic set by class, beside real images where there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dfcompress.data.image_source import ImageSource
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.reporting.page import Block, ClassPicture, Pictures, Text
from dfcompress.reporting.pictures import made_of, real_of, shown_classes, written
from dfcompress.reporting.runs import ReportedRun
from dfcompress.reporting.sections.parts import class_name

RealImages = Callable[[SyntheticSet], ImageSource | None]


def images(run: ReportedRun, real: RealImages) -> Iterator[Block]:
    """For each set of the run a text and the pictures of its classes, beside real images where `real` returns some."""
    for synthetic in run.sets.values():
        shards = written(synthetic)
        if not shards:
            continue
        labels = torch.cat([synthetic.read_shard(shard)[1] for shard in shards])
        classes, counts = shown_classes(labels), labels.bincount()
        made = made_of(synthetic, shards, classes)
        source = real(synthetic)
        beside = real_of(source, classes, (synthetic.size[1], synthetic.size[2])) if source else {}
        present = int((counts > 0).sum())
        of_many = f", {len(classes)} of {present:,} classes" if len(classes) < present else ""
        beside_them = "; real images on the right" if beside else ""
        unfinished = f" of {len(synthetic):,}, which are not finished" if len(labels) < len(synthetic) else ""
        recipe = synthetic.manifest["recipe"]["name"]
        yield Text(f"{len(labels):,} images{unfinished} by {recipe}{of_many}{beside_them}.")
        names = dict(enumerate(synthetic.class_names or ()))
        yield Pictures(
            [
                ClassPicture(class_name(names, label), f"{counts[label]:,}", made[label], beside.get(label))
                for label in classes
            ]
        )
