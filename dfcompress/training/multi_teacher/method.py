"""`MergingMethod`: a distiller of several teachers, and what belongs to it where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import ClassMap
from dfcompress.training.distiller import Distiller
from dfcompress.training.settings import Training


@dataclass(frozen=True, kw_only=True)
class MergingMethod:
    """A way to merge.

    `distiller` takes the teachers and the class map, `training` the number of images of each teacher and of teachers.
    `images` are synthesized for each teacher, by `recipe` and `preset` (None: the usual ones), half of them by
    `second_recipe`. With `layer_init` the student begins with layers of a teacher that has its form.
    """

    distiller: Callable[[Sequence[Classifier], ClassMap], Distiller]
    training: Callable[[int, int], Training]
    images: int
    recipe: str | None = None
    preset: str | None = None
    second_recipe: str | None
    layer_init: bool
