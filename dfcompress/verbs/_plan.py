"""A verb's plan: everything resolved and checked before anything is done.

plan = dfcompress.distill.plan("resnet44.pt", student="half")
plan.settings["training"].steps, [each.seconds for each in plan.estimates()]     # what `--dry-run` prints
plan.execute()                                                                   # as dfcompress.distill(...) does
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, cast

from dfcompress.machine.device import resolve_device
from dfcompress.machine.execution import Compute, Execution, predicted_seconds
from dfcompress.machine.memory import peak_memory_bytes
from dfcompress.machine.process import usual_torch
from dfcompress.models.classifier import Classifier, work_of
from dfcompress.pruning.budget import Pruned, Pruning
from dfcompress.quantization.calibration import Calibrated, Calibration
from dfcompress.quantization.reconstruction import Reconstructed, Reconstruction
from dfcompress.run import Run, check_output, running
from dfcompress.synthesis.recipe import RecipeChoice
from dfcompress.synthesis.set_execution import execution_of
from dfcompress.synthesis.spec import SynthesisSpec
from dfcompress.synthesis.synthesizer import seconds_per_step
from dfcompress.synthesis.transfer_set import TransferSet
from dfcompress.training.loop import TIMED, Trained
from dfcompress.training.settings import Training
from dfcompress.verbs._verb import Options, Result, verb

Settings = Calibration | Reconstruction | Training | Pruning
Outcome = Calibrated | Reconstructed | Trained | Pruned


@dataclass(frozen=True)
class SynthesisEstimate:
    """One set that a plan makes, how it would be computed (`chunk` images of a batch at once), and an estimate of its
    seconds and of this process's memory in bytes.
    """

    recipe: RecipeChoice
    images: int
    batches: int
    steps: int
    execution: Execution
    seconds: float
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The fields as `--dry-run --json` prints them."""
        return asdict(self)


@dataclass(frozen=True)
class Synthesize:
    """One synthetic set to make; `student` is the network that its images compete with, None where there is none."""

    spec: SynthesisSpec
    compute: Compute
    student: Classifier | None = None

    def to_json(self) -> dict[str, Any]:
        """What is made, as `run.json` keeps it."""
        return {
            "recipe": asdict(self.spec.choice),
            "images": self.spec.images,
            "batches": self.spec.batches,
            "steps": self.spec.recipe.steps,
        }

    def estimate(self) -> SynthesisEstimate:
        """Time a few eager steps of some images, and scale; nothing is written.

        Raises `BadInput` where a network fails in the precision that was asked for, or in any.
        """
        recipe, batches, batch_size = self.spec.recipe, self.spec.batches, self.spec.batch_size
        before = peak_memory_bytes(resolve_device(self.compute.device))
        execution, taken = execution_of(self.spec, self.compute, self.student)
        eager, seconds = replace(execution, compile=False), 0.0
        if recipe.steps:
            chunk = execution.chunk or batch_size
            timed = min(chunk, max(1, int(TIMED // (2 * work_of(self.spec.teacher)))))
            seconds = seconds_per_step(recipe, self.spec.teacher, eager, timed, self.spec.sampler)
            seconds *= batch_size / timed
        seconds = predicted_seconds(execution, seconds * recipe.work * batches, sizes=recipe.sizes)
        return SynthesisEstimate(
            self.spec.choice,
            self.spec.images,
            batches,
            recipe.steps,
            execution,
            float(f"{seconds:.3g}"),
            before + taken,
        )


class Step(Protocol):
    """A part of a verb's work that changes its student, once there are images."""

    @property
    def settings(self) -> Settings:
        """Everything that can be set of it."""

    def predicted(self) -> float | None:
        """An estimate of its seconds, None where there is none."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Outcome:
        """Do it with images in the student's form, one set for each teacher."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Generic[Result]):
    """What a verb will do: make the sets of `synthesis`, then take the `steps`, in this order; None stands for a part
    that is left out.

    `--dry-run` prints it, `execute` does it, and `run.json` keeps it. `options`, and the steps' settings, are what the
    result depends on: a resumed run must have the same. `inputs` are the paths that are read, `folder` is where the
    result goes. `work` does in an open run what the plan says. A plan is executed once, because its steps hold the
    student that they change.
    """

    verb: str
    folder: Path
    options: Mapping[str, Any]
    inputs: Sequence[str | Path | None]
    synthesis: Sequence[Synthesize]
    steps: Mapping[str, Step | None] = field(default_factory=dict)
    work: Callable[[Plan[Result], Run], Result]
    resume: bool = False
    overwrite: bool = False

    def __repr__(self) -> str:
        """The verb, the folder, and what `to_json` tells; not the networks that the steps hold."""
        return f"Plan(verb={self.verb!r}, folder={str(self.folder)!r}, {self.to_json()})"

    @property
    def settings(self) -> dict[str, Settings | None]:
        """The settings of each step by the name of its part."""
        return {part: step.settings if step else None for part, step in self.steps.items()}

    def check_output(self) -> None:
        """Raise `BadInput` where the run could not begin, or go on, in its folder."""
        check_output(self.folder, resume=self.resume, overwrite=self.overwrite)

    @usual_torch()
    def estimates(self) -> list[SynthesisEstimate]:
        """What each set will take; raises `BadInput` as making it would."""
        return [each.estimate() for each in self.synthesis]

    @usual_torch()
    def predicted(self) -> dict[str, float | None]:
        """Estimates of the seconds of the steps, by the name of their part; None where there is no estimate."""
        found = {part: step.predicted() for part, step in self.steps.items() if step}
        return {part: seconds if seconds is None else float(f"{seconds:.3g}") for part, seconds in found.items()}

    @usual_torch()
    def execute(self) -> Result:
        """Do it, from wherever an earlier run of the same plan was left; raises as the verb does."""
        with running(
            self.verb,
            self.folder,
            {**self.options, **self.settings_json()},
            inputs=self.inputs,
            plan=self.to_json(),
            resume=self.resume,
            overwrite=self.overwrite,
        ) as run:
            return self.work(self, run)

    def to_json(self) -> dict[str, Any]:
        """The sets and the settings of every part, as `run.json` keeps them."""
        return {"synthesis": [each.to_json() for each in self.synthesis], **self.settings_json()}

    def settings_json(self) -> dict[str, Any]:
        """The settings of every part as JSON, None for one that is left out."""
        return {part: asdict(settings) if settings else None for part, settings in self.settings.items()}


class Verb(Protocol[Options, Result]):
    """A verb: called, it does what its plan says; `plan`, called the same way, only says what would be done."""

    plan: Callable[Options, Plan[Result]]

    def __call__(self, *args: Options.args, **options: Options.kwargs) -> Result:
        """Make the plan and execute it."""


def planned(plan: Callable[Options, Plan[Result]]) -> Verb[Options, Result]:
    """Make the verb of a function that plans it: one signature, and one resolution of its options, serves both."""

    plan = verb(plan)

    @functools.wraps(plan)
    def execute(*args: Options.args, **options: Options.kwargs) -> Result:
        return plan(*args, **options).execute()

    # A reader of the signature sees what the verb gives: `Compressed` of `Plan[Compressed]`.
    result = str(plan.__annotations__["return"]).removeprefix("Plan[").removesuffix("]")
    execute.__annotations__ = {**plan.__annotations__, "return": result}
    described = cast(Any, execute)
    described.__signature__ = inspect.signature(plan).replace(return_annotation=result)
    described.plan = plan
    return cast(Verb[Options, Result], execute)
