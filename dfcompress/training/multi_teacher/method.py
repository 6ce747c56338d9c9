"""`MergingMethod`: a distiller for several teachers, and its default settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import ClassMap
from dfcompress.training.distiller import Distiller
from dfcompress.training.settings import Training


@dataclass(frozen=True, kw_only=True)
class MergingMethod:
    """A method of merging.

    `distiller` is made from the teachers and the class map, and `training` from the number of images of each teacher
    and the number of teachers. By default `images` images are synthesized for each teacher, by `recipe` and `preset`
    (None: the defaults of synthesis), half of them by `second_recipe` (None: no second one). With `layer_init` the
    student begins with the layers of a teacher whose form fits (see `init_from_teacher`).
    """

    distiller: Callable[[Sequence[Classifier], ClassMap], Distiller]
    training: Callable[[int, int], Training]
    images: int
    recipe: str | None = None
    preset: str | None = None
    second_recipe: str | None
    layer_init: bool
