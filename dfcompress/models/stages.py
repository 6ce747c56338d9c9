"""The stages of a network: its features just before each time the resolution falls, as distillation compares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, pass_once

Resolution = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """A module whose output `(N, channels, height, width)` is the last of its resolution."""

    module: str
    channels: int


def stages_of(classifier: Classifier) -> dict[Resolution, Stage]:
    """The stages by resolution, from the first to the last; outputs of one pixel are none, nor those of modules that
    run several times, nor those of a stem: a first resolution at which one convolution works, before others at which
    several do (ResNet-18 at 224 pixels has the four stages conv2 to conv5).
    """
    outputs: list[tuple[Resolution, Stage]] = []
    convolutions: Counter[Resolution] = Counter()

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
                resolution = (output.shape[2], output.shape[3])
                outputs.append((resolution, Stage(name, output.shape[1])))
                convolutions[resolution] += isinstance(module, _ConvNd)

        return note

    handles = [
        module.register_forward_hook(noting(name)) for name, module in classifier.network.named_modules() if name
    ]
    pass_once(classifier, handles)
    runs = Counter(stage.module for _, stage in outputs)
    stages = {resolution: stage for resolution, stage in outputs if runs[stage.module] == 1}
    first, *others = (convolutions[resolution] for resolution in stages) if stages else [0]
    if first == 1 and others and min(others) > 1:
        del stages[next(iter(stages))]
    return stages


def stages_in_common(student: Classifier, teacher: Classifier) -> list[tuple[Stage, Stage]]:
    """The stages of both at the resolutions that both have."""
    own, given = stages_of(student), stages_of(teacher)
    return [(own[size], given[size]) for size in own if size in given]


def shared_stages(student: Classifier, teacher: Classifier) -> list[tuple[Stage, Stage]]:
    """The stages of both at the resolutions that both have; raises `BadInput` where there are none."""
    pairs = stages_in_common(student, teacher)
    if not pairs:
        raise BadInput(
            f"{student.card.architecture} and {teacher.card.architecture} have no features of one resolution.",
            "Use objectives of the answers only, such as kd.",
        )
    return pairs


class StageOutputs:
    """Inside this context every forward pass of `network` leaves the outputs of the named modules here.

    It must be entered before the network is compiled: a compiled network does not see hooks that come later.
    """

    def __init__(self, network: nn.Module, modules: Sequence[str]) -> None:
        self.network, self.modules = network, list(modules)
        self.outputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name in self.modules:
            self._handles.append(self.network.get_submodule(name).register_forward_hook(self._keeping(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.outputs.clear()

    def _keeping(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.outputs[name] = output

        return keep

    def taken(self) -> tuple[Tensor, ...]:
        """The outputs of the last pass in fp32, in the order of the names."""
        return tuple(self.outputs[name].float() for name in self.modules)
