"""`Job`: one synthesis with everything resolved and checked, before anything is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.models.statistics import require_statistics
from dfcompress.synthesis.labels import Labels, choose_labels
from dfcompress.synthesis.recipe import Recipe, RecipeChoice, Synthesis, choose_recipe
from dfcompress.synthesis.records import BN_EQUIVALENT
from dfcompress.synthesis.records.bn_equivalent import with_statistics
from dfcompress.synthesis.records.record import Record, beside
from dfcompress.synthesis.records.source import RecordSource


@dataclass(frozen=True)
class Job:
    """What to make and from what: the teacher (with the statistics of its record, if any), its record, the recipe's
    settings, and the images' labels.
    """

    teacher: Classifier
    record: Record | None
    synthesis: Synthesis
    choice: RecipeChoice
    labels: Labels

    def recipe(self) -> Recipe:
        """A fresh recipe."""
        return self.choice.build()

    def source(self) -> RecordSource | None:
        """The record made ready to draw from."""
        return RecordSource(self.record, self.teacher) if self.record else None


def resolve(teacher: Classifier, synthesis: Synthesis) -> Job:
    """Find the record, choose the recipe and its settings, and check that they suit the teacher.

    Raises `BadInput` for unknown names and values, for a record of another teacher, and where the recipe needs what
    neither the model nor a record knows.
    """
    record = _record(teacher, synthesis.records)
    choice = choose_recipe(synthesis, teacher.card, record.about if record else None)
    labels = choose_labels(synthesis.labels, synthesis.classes, teacher.card)
    if record and record.about.kind == BN_EQUIVALENT:
        teacher = with_statistics(teacher, record.about.layers, record.tensors)
    recipe = choice.build()
    if recipe.needs_targets and (record is None or record.about.kind == BN_EQUIVALENT):
        raise BadInput(
            f"Recipe {choice.name} needs a record of activations.",
            "Give it with --records; `dfcompress record` makes one.",
        )
    if recipe.needs_moments:
        require_statistics(teacher)
    return Job(teacher, record, synthesis, choice, labels)


def _record(teacher: Classifier, records: str | Path | None) -> Record | None:
    if records is None:
        return None
    if records != Synthesis.records:
        return Record.load(Path(records), teacher)
    record = find_record(teacher)
    if record and record.path:
        about = record.about
        console.notice(
            f"Using the record {record.path.name} beside the checkpoint: {about.kind} of {about.images:,} images"
            " (--no-records does not)."
        )
    return record


def find_record(teacher: Classifier) -> Record | None:
    """The record beside the teacher's file, None where there is none; raises `BadInput` where it is unusable."""
    if teacher.path is None or not (found := beside(teacher.path)).exists():
        return None
    return Record.load(found, teacher)
