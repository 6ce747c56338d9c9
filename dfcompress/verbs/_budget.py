"""The number of images and of training steps that fit into a given time on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.run import RUN_FILE, RunFile
from dfcompress.verbs._plan import Plan

# Share of the time for synthesis, for recipes whose images are kept; the rest is for training. Not measured.
SYNTHESIS = 0.5
# Share of the time that is left for saving, for comparison, and for the error of estimates from a few steps.
SPARE = 0.1
FEWEST = 32


@dataclass(frozen=True)
class Budget:
    """A time in `seconds`, and what fits into it: `images` to synthesize, training `steps`, and `rounds` of a generator
    (None for recipes whose images are kept).
    """

    seconds: float
    images: int
    steps: int
    rounds: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as `run.json` stores them."""
        return asdict(self)


def fit_budget(seconds: float, usual: Plan[Any], *, resume: bool) -> Budget:
    """The images and training steps that fit into `seconds`, from the estimates of the default plan `usual`, whose only
    step is a training. With `resume`, a run that was started before keeps its stored budget.

    Raises `BadInput` where `seconds` is not positive and finite, where the time is too short for `FEWEST` images and a
    training step, where several processes run, and where a resumed run was started with another budget.
    """
    if not 0 < seconds < math.inf:
        raise BadInput(f"--budget must be a time above 0 s; it is {seconds:g} s.", "Give for instance 30m.")
    if resume and (usual.folder / RUN_FILE).is_file():
        return _stored(RunFile.read(usual.folder).options, seconds, usual.folder)
    if world().world_size > 1:
        raise BadInput(
            f"--budget times steps of one process, and there are {world().world_size}.",
            "Leave it out, or use one process.",
        )
    estimates, training = usual.estimates(), usual.predicted()["training"] or 0.0
    steps_usual: int = usual.settings_json()["training"]["steps"]
    learnt = len(usual.options["synthesis"])  # Sets for training; the probe images come after them.
    specs = [each.spec for each in usual.synthesis[:learnt]]
    synthesis, asked = (sum(each.seconds for each in some) for some in (estimates[:learnt], estimates[learnt:]))
    time = (1 - SPARE) * seconds - asked
    number, made = next(((n, spec) for n, spec in enumerate(specs) if spec.recipe.student_updates), (0, specs[0]))
    images_usual, a_step = sum(spec.images for spec in specs), training / steps_usual
    updates = made.recipe.student_updates
    if updates and not updates.keep:
        of_rounds = estimates[number].seconds  # The other sets keep their size.
        rounds = max(0, int((time - synthesis + of_rounds) / (of_rounds + training) * updates.rounds))
        budget = Budget(seconds, images_usual, rounds * updates.steps, rounds)
    else:
        an_image = synthesis / images_usual
        images = SYNTHESIS * time / an_image if an_image else images_usual
        if updates:  # Every round needs a fixed number of training steps.
            rounds_an_image = made.images / images_usual / (updates.every * made.batch_size)
            images = min(images, time / (an_image + a_step * updates.steps * rounds_an_image))
        size = made.batch_size * len(specs) if images > made.batch_size * len(specs) else 1
        images = int(images) // size * size
        budget = Budget(seconds, images, int((time - images * an_image) / a_step))
    if budget.images < FEWEST or budget.steps < 1:
        raise BadInput(
            f"{seconds:.0f} s are too short for {FEWEST} images and a training step.",
            "Give a longer --budget, or fewer --steps.",
        )
    what = f"{budget.rounds} rounds of a generator" if budget.rounds else f"{budget.images} images"
    console.notice(f"{what} and {budget.steps} training steps fit into {seconds:.0f} s.")
    return budget


def _stored(options: Mapping[str, Any], seconds: float, folder: Path) -> Budget:
    stored = options.get("budget")
    if not stored or stored["seconds"] != seconds:
        began = f"{stored['seconds']:g} s" if stored else "no budget"
        raise BadInput(f"{folder} was begun with {began}.", "Resume with the same, or name another folder.")
    return Budget(**stored)
