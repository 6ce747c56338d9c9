"""Gates: limits that a compressed model must meet; a command whose result misses one ends with exit code 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dfcompress import console
from dfcompress.arguments import require_fields
from dfcompress.errors import BadInput, GateNotMet
from dfcompress.verbs._finish import FEW_IMAGES, Compressed, TeacherReport
from dfcompress.verbs.evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits for a result; None sets no limit.

    `max_drop`: largest allowed loss of top-1 accuracy against the teacher on the real evaluation images, in percentage
    points from 0 to 100; after extending, on images of the old classes. `min_agreement`: smallest allowed share, in
    [0, 1], of held-out images on which the result and its teacher (each of several) predict the same class.
    """

    max_drop: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        """Raise `BadInput` for a limit that is not a number, or outside its range."""
        require_fields(self)
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise BadInput(
                f"--max-drop must be 0 or more percentage points; it is {self.max_drop:g}.",
                "1.0 allows 92.0 % for 93.0 %.",
            )
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise BadInput(
                f"--min-agreement must be a share from 0 to 1; it is {self.min_agreement:g}.", "Use for instance 0.95."
            )

    def require_images(self, eval_data: str | Path | None) -> None:
        """Raise `BadInput` where `max_drop` is set and `eval_data` is None."""
        if self.max_drop is not None and eval_data is None:
            raise BadInput("--max-drop needs real images to count on.", "Add --eval-data, or use --min-agreement.")

    def check(self, result: Compressed) -> None:
        """Raise `GateNotMet`, naming every limit that the result misses; also where there are no held-out images.

        Raises `BadInput` where `max_drop` is set and the result has no evaluation.
        """
        missed: list[GateNotMet] = []
        if self.min_agreement is not None:
            missed += [each for teacher in result.teachers for each in _disagreement(teacher, self.min_agreement)]
        if self.max_drop is not None:
            self.require_images(result.output if result.evaluation else None)
            assert result.evaluation
            missed += _loss(result.evaluation, self.max_drop)
        if missed:
            first, *others = missed
            raise GateNotMet(" ".join([first.problem, *map(str, others)]), first.remedy)


def _disagreement(teacher: TeacherReport, min_agreement: float) -> Iterator[GateNotMet]:
    if teacher.held_out is None:
        yield GateNotMet("There are too few images to hold any out for --min-agreement.", "Use at least 16.")
        return
    count = teacher.held_out_images
    of_all = f"{count} images" if count else "images"  # Version 0.1 did not store the number.
    if teacher.held_out < min_agreement:
        yield GateNotMet(
            f"The result agrees with {teacher.checkpoint} on {teacher.held_out:.2%} of the {of_all} held out, below "
            f"--min-agreement {min_agreement:.2%}."
        )
    elif count and count < FEW_IMAGES:
        console.notice(f"--min-agreement was judged by {count} images, one in 16: more --images tell more.")


def _loss(evaluation: Evaluation, max_drop: float) -> Iterator[GateNotMet]:
    of_teacher, *others = evaluation.results
    if of_teacher.images in ("new", "all"):
        yield GateNotMet("--max-drop counts old classes, and --eval-data has no image of an old class.")
        return
    of_student = others[0]
    # From counts: shares are not exact, and a loss equal to the limit is allowed.
    drop = 100 * (of_teacher.correct - of_student.correct) / of_student.total
    if drop > max_drop:
        yield GateNotMet(f"{of_student.checkpoint} loses {drop:.2f} points, more than --max-drop {max_drop:g}.")
