"""Labelled images of new classes for a model, and the output of the extended model for each class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dfcompress.data.image_source import ImageSource, Part
from dfcompress.data.real import folder_names, open_images
from dfcompress.data.synthetic_set import as_stored
from dfcompress.errors import BadInput, listed
from dfcompress.models.card import ModelCard
from dfcompress.models.card_values import class_names_in

ANY = 2**63  # A number of classes above every label: labels are checked here, not by `open_images`.
READ = 256  # Number of images held in memory as floats while a set is read: 154 MB at 224 x 224 pixels.


@dataclass(frozen=True)
class NewImages:
    """Labelled images of new classes.

    `source`: the images. `labels`: outputs of the extended model, int64 `(N,)`. `class_names`: classes of the extended
    model, those of the old model first.
    """

    source: ImageSource
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def stored(self) -> Tensor:
        """All images `(N, C, H, W)`, uint8; raises `BadInput` where one cannot be decoded."""
        return torch.cat([as_stored(images, in_range=True) for images, _ in self.source.batches(READ)])


def open_new_images(
    path: str | Path,
    card: ModelCard,
    *,
    names_file: str | Path | None = None,
    also_old: bool = False,
    part: Part = "train",
) -> NewImages:
    """The labelled images at `path`, fitted to the input of the model with this `card`.

    The class name of label i is line i (from 0) of `names_file`; without a file it is the name of the folder or of the
    synthetic set's class, or the label itself. Classes of a model without names are called 0, 1, 2 and so on. With
    `also_old`, images whose class name the model knows count for that class. `part`: part of IDX or CIFAR files to
    read.
    Raises `BadInput` for a known class name without `also_old`, for images without a new class, for a name that occurs
    twice, and for labels without a name.
    """
    folders = folder_names(path)
    given = class_names_in(Path(names_file)) if names_file else None
    if given and len(set(given)) < len(given):
        raise BadInput(f"--class-names {names_file} has a name twice.", "Give every class a name of its own.")
    source = open_images(path, replace(card, classes=ANY, class_names=folders and (given or folders)), part=part)
    known = card.class_names or tuple(str(number) for number in range(card.classes))
    labels, places = source.labels.unique(return_inverse=True)
    names = [_name(label, given or source.class_names, path) for label in labels.tolist()]
    shared = [name for name in names if name in known]
    if shared and not also_old:
        raise BadInput(
            f"{path}: the model already knows {listed(map(repr, shared), 3)}.",
            "Give other names with --class-names, or --also-old where the images are more of those classes.",
        )
    class_names = (*known, *(name for name in names if name not in known))
    if len(class_names) == len(known):
        raise BadInput(f"{path} holds no class that the model does not know.", "Give images of new classes.")
    outputs = torch.tensor([class_names.index(name) for name in names])
    return NewImages(source, outputs[places], class_names)


def _name(label: int, names: tuple[str, ...] | None, path: str | Path) -> str:
    if names is None:
        return str(label)
    if label >= len(names):
        raise BadInput(f"{path} has the label {label}, and there are {len(names)} names.", "Name every label, from 0.")
    return names[label]
