"""Labelled images that bring new classes to a model, and which output each of these becomes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dfcompress.data.real import ImageSource, Part, folder_names, open_images
from dfcompress.data.synthetic_set import as_stored
from dfcompress.errors import BadInput, listed
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import class_names_in

ANY = 2**63  # So many classes: labels are looked at here, not by `open_images`.
READ = 256  # Images that are in memory as floats while a set is read: 154 MB at 224².


@dataclass(frozen=True)
class NewImages:
    """Labelled images: `labels` `(N,)` are the outputs of a model whose classes are `class_names`, the known ones
    first.
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
    """The labelled images at `path`, fitted to the model's input.

    The name of a label is the line of `names_file` with its number, from 0; else its folder's, its synthetic set's, or
    the label itself. The classes of a model without names are called 0, 1, 2 and so on. A name that the model knows is
    its class, where `also_old` allows that.
    Raises `BadInput` for such a name without it, for images without any new class, and for labels without a name.
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
