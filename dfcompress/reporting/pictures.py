"""Images of a class as one small PNG inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dfcompress.data.image_source import ImageSource
from dfcompress.data.synthetic_set import SyntheticSet, as_float

CLASSES = 10  # The most classes that are shown; of more classes, evenly spaced ones are taken.
IMAGES, LARGE_IMAGES, COLUMNS = 8, 4, 4
# An image of 224 pixels takes 100 KB as PNG. Averaged to 112 pixels, a page of ten classes with four images is 1.5 MB.
SIDE = 112
GAP = 1
READ = 64  # Images of a source that are read together to find one.


def shown_classes(labels: Tensor) -> list[int]:
    """The classes among the labels `(N,)` that a page shows: all, or `CLASSES` evenly spaced ones of more."""
    present: list[int] = labels.unique().tolist()
    if len(present) <= CLASSES:
        return present
    return [present[number * (len(present) - 1) // (CLASSES - 1)] for number in range(CLASSES)]


def written(synthetic: SyntheticSet) -> list[int]:
    """The shards of the set that are already written."""
    missing = set(synthetic.missing_shards())
    return [shard for shard in synthetic.shards if shard not in missing]


def made_of(synthetic: SyntheticSet, shards: Sequence[int], classes: Sequence[int]) -> dict[int, str]:
    """The first images of each class in these shards, as one picture for each class (a data URL). Only one shard is in
    memory at a time.
    """
    count = _count(synthetic.size[1:])
    found: dict[int, list[Tensor]] = {label: [] for label in classes}
    for shard in shards:
        images, labels = synthetic.read_shard(shard)
        for label, kept in found.items():
            kept.extend(images[(labels == label).nonzero()[: count - len(kept), 0]])
        if all(len(kept) == count for kept in found.values()):
            break
    return {label: _tiles(as_float(torch.stack(kept))) for label, kept in found.items()}


def real_of(source: ImageSource, classes: Sequence[int], size: tuple[int, int]) -> dict[int, str]:
    """Evenly spaced real images of each class that has any, as one picture for each class (a data URL); `size` is the
    images' height and width.
    """
    wanted: dict[int, list[int]] = {}
    for label in classes:
        of_class = (source.labels == label).nonzero()[:, 0]
        if len(of_class):
            wanted[label] = of_class[:: -(-len(of_class) // _count(size))].tolist()
    read = dict(_read(source, sorted({index for indices in wanted.values() for index in indices})))
    return {label: _tiles(torch.stack([read[index] for index in indices])) for label, indices in wanted.items()}


def _read(source: ImageSource, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    for batch, together in groupby(indices, key=lambda index: index // READ):
        images, _ = next(iter(source.batches(READ, first=batch)))
        yield from ((index, images[index % READ]) for index in together)


def _count(size: Sequence[int]) -> int:
    return IMAGES if min(size) <= SIDE else LARGE_IMAGES


def _tiles(images: Tensor) -> str:
    """A picture (data URL) of float images `(N, C, H, W)` in rows of four, with transparent gaps. Images whose channels
    are neither grey nor RGB are averaged to grey.
    """
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    images = F.avg_pool2d(images, max(1, min(images.shape[2:]) // SIDE)).expand(-1, 3, -1, -1)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1] + GAP, pixels.shape[2] + GAP
    picture = Image.new("RGBA", (COLUMNS * width - GAP, -(-len(pixels) // COLUMNS) * height - GAP))
    for number, image in enumerate(pixels):
        picture.paste(Image.fromarray(image), (number % COLUMNS * width, number // COLUMNS * height))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
