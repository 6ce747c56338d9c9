"""Steps that are taken to measure what a step of a synthesis takes: memory for each image, and seconds."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial

import torch

from dfcompress.machine.compiling import STEPS_BEFORE_CAPTURE
from dfcompress.machine.device import synchronize
from dfcompress.machine.execution import Execution
from dfcompress.machine.memory import Taken, count_growth
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.recipe import Recipe
from dfcompress.synthesis.records.targets import TargetSampler
from dfcompress.synthesis.synthesizer import Synthesizer


def try_step(
    recipe: Recipe,
    teacher: Classifier,
    execution: Execution,
    *,
    student: Classifier | None,
    sampler: TargetSampler | None,
) -> Taken:
    """Run eager steps of the recipe's last phase with two and with four images, and return the memory they take. An
    exception of a network that cannot run the step is passed on.
    """
    if not recipe.steps:
        return Taken(0.0)
    steps = {}
    for images in (2, 4):
        synthesizer = Synthesizer(recipe, teacher, replace(execution, compile=False), student=student, sampler=sampler)
        state = synthesizer.begin_last_phase({0: torch.arange(images) % teacher.card.classes})
        steps[images] = partial(synthesizer.step, state)
    return count_growth(lambda images: steps[images]())


def seconds_per_step(
    recipe: Recipe, teacher: Classifier, execution: Execution, batch_size: int, sampler: TargetSampler | None = None
) -> float:
    """Seconds of one step in the recipe's last phase: the least of a few steps without the first, captured ones
    included.
    """
    student = copy.deepcopy(teacher) if Want.STUDENT in recipe.wants else None
    synthesizer = Synthesizer(recipe, teacher, execution, student=student, sampler=sampler)
    state = synthesizer.begin_last_phase({0: torch.arange(batch_size) % teacher.card.classes})
    times = []
    for _ in range(min(recipe.phases[-1].steps, 3 + STEPS_BEFORE_CAPTURE * execution.capture)):
        started = time.perf_counter()
        synthesizer.step(state)
        synchronize(synthesizer.device)
        times.append(time.perf_counter() - started)
    return min(times[1:] or times)
