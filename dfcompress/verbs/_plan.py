"""A verb's plan: all options are resolved and checked before any work.

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
from dfcompress.synthesis.transfer_set import TransferSet
from dfcompress.synthesis.trial_steps import seconds_per_step
from dfcompress.training.loop import TIMED, Trained
from dfcompress.training.settings import Training
from dfcompress.verbs._verb import Options, Result, verb

Settings = Calibration | Reconstruction | Training | Pruning
Outcome = Calibrated | Reconstructed | Trained | Pruned


@dataclass(frozen=True)
class SynthesisEstimate:
    """Estimate of one synthetic set of a plan.

    `recipe`: recipe and settings. `images`, `batches`: size of the set. `steps`: optimisation steps of each batch.
    `execution`: how the set would be computed; its `chunk` is the number of images of a batch computed at once.
    `seconds`: estimated time of synthesis. `memory_bytes`: estimated peak memory of this process.
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
    """One synthetic set to make, by `spec` and `compute`; `student` is the network that its images compete with, None
    where the recipe has no student.
    """

    spec: SynthesisSpec
    compute: Compute
    student: Classifier | None = None

    def to_json(self) -> dict[str, Any]:
        """The recipe and the size of the set, as `run.json` stores them."""
        return {
            "recipe": asdict(self.spec.choice),
            "images": self.spec.images,
            "batches": self.spec.batches,
            "steps": self.spec.recipe.steps,
        }

    def estimate(self) -> SynthesisEstimate:
        """Time a few eager steps on some of the images, and scale the time to the whole set; nothing is written.

        Raises `BadInput` where a network fails in the requested precision, or in every precision.
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
    """A part of a verb's work that changes its student; it starts after the images were gathered."""

    @property
    def settings(self) -> Settings:
        """The settings of this step."""

    def predicted(self) -> float | None:
        """The estimated seconds of this step, None where no estimate is possible."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Outcome:
        """Take the step with images of the student's input size, one set for each teacher."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Generic[Result]):
    """The work that a verb will do: make the sets of `synthesis`, then take the `steps` in their order.

    `--dry-run` prints the plan, `execute` carries it out, and `run.json` stores it. A plan is executed once, because
    its steps hold the student that they change.
    `verb`: name of the verb. `folder`: folder of the result. `inputs`: paths that are read.
    `options`: the options that the result depends on, beside the settings of the steps; a resumed run must have the
    same options and settings. `synthesis`: synthetic sets to make. `steps`: steps by name; None marks a step that is
    left out. `work`: carries the plan out in an open run. `resume`: continue the interrupted run in `folder`.
    `overwrite`: replace the contents of `folder`.
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
        """The verb, the folder and the values of `to_json`, without the networks that the steps hold."""
        return f"Plan(verb={self.verb!r}, folder={str(self.folder)!r}, {self.to_json()})"

    @property
    def settings(self) -> dict[str, Settings | None]:
        """The settings of each step by its name, None for a step that is left out."""
        return {part: step.settings if step else None for part, step in self.steps.items()}

    def check_output(self) -> None:
        """Raise `BadInput` where the run could neither start nor continue in its folder."""
        check_output(self.folder, resume=self.resume, overwrite=self.overwrite)

    @usual_torch()
    def estimates(self) -> list[SynthesisEstimate]:
        """Estimate each synthetic set; raises `BadInput` where making the set would raise it."""
        return [each.estimate() for each in self.synthesis]

    @usual_torch()
    def predicted(self) -> dict[str, float | None]:
        """Estimated seconds of each step by its name; None for a step that has no estimate."""
        found = {part: step.predicted() for part, step in self.steps.items() if step}
        return {part: seconds if seconds is None else float(f"{seconds:.3g}") for part, seconds in found.items()}

    @usual_torch()
    def execute(self) -> Result:
        """Carry the plan out and return the verb's result; with `resume`, continue where the earlier run stopped.

        Raises what the verb raises.
        """
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
        """The synthetic sets and the settings of every step, as `run.json` stores them."""
        return {"synthesis": [each.to_json() for each in self.synthesis], **self.settings_json()}

    def settings_json(self) -> dict[str, Any]:
        """The settings of every step as JSON, None for a step that is left out."""
        return {part: asdict(settings) if settings else None for part, settings in self.settings.items()}


class Verb(Protocol[Options, Result]):
    """A verb: calling it makes a plan and executes it; `plan`, with the same arguments, only makes the plan."""

    plan: Callable[Options, Plan[Result]]

    def __call__(self, *args: Options.args, **options: Options.kwargs) -> Result:
        """Make the plan and execute it."""


def planned(plan: Callable[Options, Plan[Result]]) -> Verb[Options, Result]:
    """Turn a function that returns a plan into a verb; the verb has the function's signature and executes its plan."""

    plan = verb(plan)

    @functools.wraps(plan)
    def execute(*args: Options.args, **options: Options.kwargs) -> Result:
        return plan(*args, **options).execute()

    # The signature shows what the verb returns: `Compressed` in place of `Plan[Compressed]`.
    result = str(plan.__annotations__["return"]).removeprefix("Plan[").removesuffix("]")
    execute.__annotations__ = {**plan.__annotations__, "return": result}
    described = cast(Any, execute)
    described.__signature__ = inspect.signature(plan).replace(return_annotation=result)
    described.plan = plan
    return cast(Verb[Options, Result], execute)
