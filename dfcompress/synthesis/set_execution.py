"""How a set is computed on this machine: device, precision, batches side by side, and images at once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.device import Precision, is_cuda
from dfcompress.machine.execution import Compute, Execution, resolve_execution, tried
from dfcompress.machine.memory import GROWTH, Taken, images_at_once
from dfcompress.models.classifier import Classifier, work_of
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.recipe import Recipe
from dfcompress.synthesis.spec import SynthesisSpec
from dfcompress.synthesis.trial_steps import try_step

# Number of fp32 copies of a batch's images: noise, images, gradient, Adam's two moments, the finished images, and those
# of the batch before that are being written.
COPIES = 7
# Assumed, not measured: CUDA steps on less than 128 images of CIFAR's size spend most time on kernel launches, so
# batches are grouped up to this size. On a CPU grouping does not pay (docs/results/robustness.md).
PIXELS_A_STEP = 128 * 32 * 32


def _groups(spec: SynthesisSpec, execution: Execution) -> int:
    batch_size, batches = spec.batch_size, spec.batches
    if spec.recipe.lives_on or (execution.chunk and execution.chunk < batch_size):
        return 1
    if spec.synthesis.groups != "auto":
        return min(spec.synthesis.groups, batches)
    if not is_cuda(torch.device(execution.device)):
        return 1
    height, width = spec.teacher.card.input_size[1:]
    fit, for_everybody = PIXELS_A_STEP // (batch_size * height * width), batches // world().world_size
    return max(1, min(fit, for_everybody))


class Resolved(NamedTuple):
    """How a set is computed, and an estimate of the memory that this takes, in bytes."""

    execution: Execution
    memory_bytes: int


def execution_of(spec: SynthesisSpec, compute: Compute, student: Classifier | None = None) -> Resolved:
    """Make all automatic choices of a set's computation; `student` is the student that its images compete with, if any.

    One step tries the precision and counts the memory of an image. As many images as fit are computed at once; a larger
    batch is computed in chunks. Raises `BadInput` if the requested precision, or every precision, fails, if not one
    image fits into memory, and if a batch that cannot be computed in chunks does not fit.
    """
    teacher, recipe = spec.teacher, spec.recipe
    batch_size, batches = spec.batch_size, spec.batches
    work = work_in(recipe, teacher, batches * batch_size)
    execution = resolve_execution(compute, work, steps=batches * recipe.steps, sizes=recipe.sizes)
    student = (student or teacher) if Want.STUDENT in recipe.wants else None
    sampler = spec.sampler

    counted: dict[Precision, Taken] = {}

    def step(execution: Execution) -> None:
        counted[execution.precision] = try_step(recipe, teacher, execution, student=student, sampler=sampler)

    execution = tried(execution, compute, step, what=f"{teacher.name}{' or its student' if student else ''}")
    taken = counted.get(execution.precision, Taken(0.0))
    beside = COPIES * 4.0 * batch_size * math.prod(teacher.card.input_size)
    size = None if recipe.needs_whole_batch else teacher.card.input_size
    chunk = images_at_once(batch_size, taken, target=torch.device(execution.device), input_size=size, beside=beside)
    if chunk < batch_size and recipe.needs_whole_batch:
        raise BadInput(
            f"A batch of {batch_size} images does not fit into memory, and {spec.choice.name} computes it whole: "
            "a loss has a module of its own, or the images a generator.",
            f"Use --batch-size {chunk}.",
        )
    execution = replace(execution, chunk=chunk)
    execution = replace(execution, groups=_groups(spec, execution))
    return Resolved(execution, int(beside + GROWTH * (taken.beside + taken.each * chunk * execution.groups)))


def work_in(recipe: Recipe, teacher: Classifier, images: int) -> float:
    """The work of a synthesis, forward and backward to the input in each step, in the unit of `work_of`."""
    return 2.0 * work_of(teacher) * images * recipe.work
