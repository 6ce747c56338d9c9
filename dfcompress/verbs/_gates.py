"""Thresholds that a compressed model must keep, for scripts: a miss ends with exit code 3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dfcompress.errors import BadInput, GateNotMet
from dfcompress.verbs._finish import Compressed


@dataclass(frozen=True, kw_only=True)
class Gates:
    """`max_drop` is how many points of top-1 the result may lose on the real images it is evaluated on, after extending
    on those of the old classes; `min_agreement` the share in [0, 1] of held-out images on which it must answer as its
    teacher (as each of them) does. None asks nothing.
    """

    max_drop: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        """Raise `BadInput` for thresholds that are none."""
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise BadInput(f"--max-drop {self.max_drop:g} is no number of points.", "1.0 allows 92.0 % for 93.0 %.")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise BadInput(f"--min-agreement {self.min_agreement:g} is no share.", "Use for instance 0.95.")

    def require_images(self, eval_data: str | Path | None) -> None:
        """Raise `BadInput` where accuracy is asked for and there is nothing to count it on."""
        if self.max_drop is not None and eval_data is None:
            raise BadInput("--max-drop needs real images to count on.", "Add --eval-data, or use --min-agreement.")

    def check(self, result: Compressed) -> None:
        """Raise `GateNotMet` where the result misses one, or no image was held out to tell."""
        if self.min_agreement is not None:
            for teacher in result.teachers:
                self._check_agreement(teacher.checkpoint, teacher.held_out)
        if self.max_drop is not None:
            self.require_images(result.output if result.evaluation else None)
            assert result.evaluation
            of_teacher, *others = result.evaluation.results
            if of_teacher.images in ("new", "all"):
                raise GateNotMet("--max-drop is of the old classes, and no image of --eval-data is of one.")
            of_student = others[0]
            # By counts: shares are not exact, and a loss of just so many points is allowed.
            drop = 100 * (of_teacher.correct - of_student.correct) / of_student.total
            if drop > self.max_drop:
                raise GateNotMet(
                    f"{of_student.checkpoint} loses {drop:.2f} points, more than --max-drop {self.max_drop:g}."
                )

    def _check_agreement(self, teacher: str, held_out: float | None) -> None:
        if held_out is None:
            raise GateNotMet("There are too few images to hold any out for --min-agreement.", "Use at least 16.")
        assert self.min_agreement is not None
        if held_out < self.min_agreement:
            raise GateNotMet(
                f"The result agrees with {teacher} on {held_out:.2%} of the images held out, below --min-agreement "
                f"{self.min_agreement:.2%}."
            )
