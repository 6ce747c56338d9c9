"""The stages of a network: its last features of each resolution, which distillation compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_outputs, kept_outputs

Resolution = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """A `module`, by name, whose output `(N, channels, height, width)` is the last one of its resolution."""

    module: str
    channels: int


def stages_of(classifier: Classifier) -> dict[Resolution, Stage]:
    """The stages by resolution (height, width), from the first to the last.

    Outputs whose height or width is 1, modules that run several times, and a stem do not count. A stem is a first
    resolution with one convolution, if every other resolution has several (ResNet-18 at 224 pixels has the four stages
    conv2 to conv5).
    """
    outputs: list[tuple[Resolution, Stage]] = []
    convolutions: Counter[Resolution] = Counter()

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
            resolution = (output.shape[2], output.shape[3])
            outputs.append((resolution, Stage(name, output.shape[1])))
            convolutions[resolution] += isinstance(classifier.network.get_submodule(name), _ConvNd)

    names = [name for name, _ in classifier.network.named_modules() if name]
    with hooked_outputs(classifier.network, names, note):
        pass_once(classifier)
    runs = Counter(stage.module for _, stage in outputs)
    stages = {resolution: stage for resolution, stage in outputs if runs[stage.module] == 1}
    first, *others = (convolutions[resolution] for resolution in stages) if stages else [0]
    if first == 1 and others and min(others) > 1:
        del stages[next(iter(stages))]
    return stages


def stages_in_common(student: Classifier, teacher: Classifier) -> list[tuple[Stage, Stage]]:
    """Pairs of the student's and the teacher's stage at each resolution that both have."""
    of_student, of_teacher = stages_of(student), stages_of(teacher)
    return [(of_student[size], of_teacher[size]) for size in of_student if size in of_teacher]


def shared_stages(student: Classifier, teacher: Classifier) -> list[tuple[Stage, Stage]]:
    """As `stages_in_common`; raises `BadInput` if there is no common resolution."""
    pairs = stages_in_common(student, teacher)
    if not pairs:
        raise BadInput(
            f"{student.card.architecture} and {teacher.card.architecture} have no features of one resolution.",
            "Use objectives of the answers only, such as kd.",
        )
    return pairs


@dataclass
class StageOutputs:
    """Copies in fp32 of the outputs of `modules`, by name, in the last forward pass within `stage_outputs`."""

    modules: list[str]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def taken(self) -> tuple[Tensor, ...]:
        """The outputs in the order of `modules`, which are not kept: they would keep the graph of the pass."""
        return tuple(self.outputs.pop(name) for name in self.modules)


@contextmanager
def stage_outputs(network: nn.Module, modules: Sequence[str]) -> Iterator[StageOutputs]:
    """Within this context, every forward pass of `network` stores the named modules' outputs in the `StageOutputs`.

    Enter it before the network is compiled: a compiled network does not call hooks that are registered later.
    """
    heard = StageOutputs(list(modules))
    # Copies, because the network's code may change the output of a stage in place, as `x.relu_()` does.
    with kept_outputs(network, heard.modules, heard.outputs.__setitem__, dtype=torch.float32):
        try:
            yield heard
        finally:
            heard.outputs.clear()
