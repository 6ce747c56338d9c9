"""`SynthesisSpec`: one synthesis with everything resolved and checked, before any image is synthesized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.patches import knows_patches_alone, require_patches
from dfcompress.models.recorder import require_outputs
from dfcompress.models.statistics import require_statistics
from dfcompress.synthesis.labels import Labels, choose_labels
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.recipe import BY_PATCHES, COARSE, Recipe, RecipeChoice, Synthesis, choose_recipe
from dfcompress.synthesis.records import BN_EQUIVALENT, GAUSSIAN, SPECTRAL
from dfcompress.synthesis.records.bn_equivalent import with_statistics
from dfcompress.synthesis.records.gaussian import GaussianSampler, require_gaussians
from dfcompress.synthesis.records.record_file import Record, beside
from dfcompress.synthesis.records.spectral import SpectralSampler
from dfcompress.synthesis.records.targets import TargetSampler


@dataclass(frozen=True)
class SynthesisSpec:
    """What to synthesize and from what: the teacher (with the statistics of its record, if any), its record or None,
    the recipe with all settings, and the images' labels.
    """

    teacher: Classifier
    record: Record | None
    synthesis: Synthesis
    choice: RecipeChoice
    labels: Labels

    @property
    def images(self) -> int:
        """Number of images to synthesize."""
        assert self.synthesis.images is not None, "a verb says how many it makes by default"
        return self.synthesis.images

    @property
    def recipe(self) -> Recipe:
        """The recipe, built once."""
        return self.choice.recipe

    @property
    def batch_size(self) -> int:
        """Images of a batch: the recipe's number, or the number of kept images if that is smaller."""
        updates = self.recipe.student_updates
        return self.recipe.batch_size if updates and not updates.keep else min(self.recipe.batch_size, self.images)

    @property
    def batches(self) -> int:
        """Number of batches that are optimised: the batches of the set, or of all rounds if no image is kept."""
        updates = self.recipe.student_updates
        return updates.rounds * updates.every if updates and not updates.keep else -(-self.images // self.batch_size)

    @cached_property
    def sampler(self) -> TargetSampler | None:
        """The record's sampler of targets if the recipe wants targets, else None. It is made once, because a spectral
        record's sampler takes minutes.
        """
        if self.record is None or Want.TARGETS not in self.recipe.wants:
            return None
        family = SpectralSampler if self.record.about.kind in SPECTRAL else GaussianSampler
        return family(self.record, self.teacher)

    @property
    def inputs(self) -> list[Path]:
        """The files that are read besides the teacher."""
        return [self.record.path] if self.record and self.record.path else []

    def origin(self) -> dict[str, Any]:
        """Everything besides the teacher that the images depend on; a record counts by its content, not its path."""
        synthesis = asdict(replace(self.synthesis, preview_every=0, records=None))
        return {**synthesis, "recipe": asdict(self.choice), "record": self.record.identity if self.record else None}


def resolve(teacher: Classifier, synthesis: Synthesis) -> SynthesisSpec:
    """Find the record, choose the recipe and its settings, and check that they suit the teacher.

    Raises `BadInput` for unknown names and values, for a record of another teacher, for a recipe that needs statistics,
    targets, patches or layers that neither the model nor a record has, and for persistent images that the recipe cannot
    use.
    """
    record = _record(teacher, synthesis.records)
    if synthesis.recipe is None and record is None and knows_patches_alone(teacher):
        synthesis = replace(synthesis, recipe=BY_PATCHES)
    choice = choose_recipe(synthesis, teacher.card, record.about if record else None)
    choice = _at_sizes_it_takes(choice, teacher, asked=synthesis.settings)
    labels = choose_labels(synthesis.labels, synthesis.classes, teacher.card)
    recipe = choice.recipe
    kind = record.about.kind if record else None
    if Want.TARGETS in recipe.wants and kind in (None, BN_EQUIVALENT):
        raise BadInput(
            f"Recipe {choice.name} needs a record of activations.",
            "Give it with --records; `dfcompress record` makes one.",
        )
    if recipe.images.persistent and recipe.student_updates is None:
        raise BadInput(
            f"The images of recipe {choice.name} live on over batches; those of a set are made batch by batch.",
            "Let them start anew with every batch: persistent = False.",
        )
    if recipe.images.persistent and (len(recipe.phases) > 1 or Want.TARGETS in recipe.wants):
        raise BadInput(
            f"The images of recipe {choice.name} live on over batches, in one phase and without targets of a record.",
            "Use one phase, and losses without targets.",
        )
    if recipe.student_updates and not recipe.student_updates.keep and not recipe.images.persistent:
        raise BadInput(
            f"Recipe {choice.name} keeps no images, and its images begin anew with every batch.",
            "Let a generator go on learning (persistent = True), or keep its images.",
        )
    if record and (Want.MOMENTS if kind == BN_EQUIVALENT else Want.TARGETS) not in recipe.wants:
        console.notice(f"Recipe {choice.name} does not use the record of kind {kind}.")
        record = None
    elif record:
        console.notice(f"Using {record.path}: {kind} of {record.about.images:,} images.")
    if record and kind == BN_EQUIVALENT:
        teacher = with_statistics(teacher, record)
    elif record and kind in GAUSSIAN:
        require_gaussians(record, teacher)
    if Want.MOMENTS in recipe.wants:
        require_statistics(teacher)
    if Want.PATCHES in recipe.wants:
        require_patches(teacher)
    require_outputs(teacher, recipe.layers)
    return SynthesisSpec(teacher, record, synthesis, choice, labels)


# A quarter of ImageNet's 224 pixels: the smallest size at which the first phases were measured to help.
SMALLEST = 56


def _at_sizes_it_takes(choice: RecipeChoice, teacher: Classifier, *, asked: Mapping[str, Any]) -> RecipeChoice:
    """The choice without first phases on images that are too small for the network or for objects to be recognisable;
    steps at full size of the same total work replace them. Phases that the user set by name (`asked`) stay.
    """
    if teacher.card.small:
        return choice
    settings = dict(choice.settings)
    height, width = teacher.card.input_size[1:]
    for name, factor in COARSE.items():
        steps, smaller = settings.get(name), (height // factor, width // factor)
        if steps and name not in asked and (min(smaller) < SMALLEST or not _takes(teacher, smaller)):
            settings[name] = 0
            settings["steps"] += steps // factor**2
            console.notice(f"No steps at {smaller[0]} × {smaller[1]} pixels: too small for {teacher.name}.")
    return replace(choice, settings=settings)


@torch.no_grad()
def _takes(teacher: Classifier, size: tuple[int, int]) -> bool:
    """Whether a network gives logits for images of another height and width, as networks with global pooling do."""
    card = teacher.card
    smaller = torch.zeros(1, card.input_size[0], *size, device=teacher.mean.device)
    with evaluating(teacher):
        try:
            return bool(teacher(smaller).shape == (1, card.classes))
        except (RuntimeError, ValueError, AssertionError):
            return False


def _record(teacher: Classifier, records: str | Path | None) -> Record | None:
    if records is None:
        return None
    return find_record(teacher) if records == Synthesis.records else Record.load(Path(records), teacher)


def find_record(teacher: Classifier) -> Record | None:
    """The record beside the teacher's file, None if there is no such file; raises `BadInput` if it is unusable."""
    if teacher.path is None or not (found := beside(teacher.path)).exists():
        return None
    return Record.load(found, teacher)
