"""`Architecture`: a network that can be built for any number of classes, and its tensors' names in released files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from dfcompress.models.plain import make_plain
from dfcompress.models.resizing import resized
from dfcompress.models.safe_reading import without_counters


@dataclass(frozen=True)
class Naming:
    """The names of tensors in a family of released files.

    `renames` are pairs (regular expression, replacement) that turn them into our names. `mean` and `std` are the values
    with which all models of this naming were trained, or None if they are unknown.
    """

    renames: tuple[tuple[str, str], ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def renamed(self, name: str) -> str:
        """A tensor's name in our spelling."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class Architecture:
    """A network that can be built for any number of classes and input channels.

    `make(classes, channels)` builds the network with its default widths; `widths` are the widths of layers that differ
    from the default (see `resizing`). `size` is the default height and width of its input in pixels, None if unknown.
    `channels` is the default number of input channels.
    `tensors` is the number of tensors in its state dict (without `num_batches_tracked`), None if unknown: other
    architectures are ruled out by it without being built. `ignored` is a regular expression for the names of tensors
    that only training needs. `namings` are the known names of its tensors in files.
    `mean` and `std` are the values that its released weights expect, if they differ from the default for the size.
    `library` names the library that builds the network and is imported for it, which takes seconds.
    `foreign` networks come from a user's factory, which decides the channels, and also the number of classes if 0
    classes are requested or if it takes no `num_classes`.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    size: int | None
    channels: int = 3
    tensors: int | None = None
    ignored: str | None = None
    namings: tuple[Naming, ...] = (Naming(),)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    library: str | None = None
    foreign: bool = False
    widths: tuple[tuple[str, tuple[int, int]], ...] = ()

    def build(self, classes: int, channels: int) -> nn.Module:
        """The network with initial weights; raises `BadInput` if it cannot have the widths."""
        network = self.make(classes, channels)
        return resized(make_plain(network), dict(self.widths)) if self.widths else network

    def ignores(self, name: str) -> bool:
        """Whether only training needs the tensor of this name."""
        return self.ignored is not None and re.match(self.ignored, name) is not None

    def make_empty(self, classes: int, channels: int) -> nn.Module:
        """The network with parameters on the meta device, where they take no memory and no time; its buffers are real.

        A network whose constructor computes with its parameters is built with real parameters, too.
        """
        if not self.foreign:
            for network in self._without_memory(classes, channels):
                if not any(buffer.is_meta for buffer in network.buffers()):
                    return network
        return self.build(classes, channels)

    def make_shape(self, classes: int, channels: int) -> nn.Module:
        """The network for the names and shapes of its tensors: its buffers may be on the meta device, too."""
        made = iter(()) if self.foreign else self._without_memory(classes, channels)
        network = next(made, None)
        return self.build(classes, channels) if network is None else network

    def _without_memory(self, classes: int, channels: int) -> Iterator[nn.Module]:
        """The network built in the two ways that take no memory, if its constructor works with them.

        The first has its parameters on the meta device (works for most networks), the second all tensors (works for
        timm's hybrids and Swin v2, too).
        """
        for place in (_parameters_on_meta(), torch.device("meta")):
            with suppress(RuntimeError):  # NotImplementedError, which meta tensors raise, is a RuntimeError.
                with place, _WithoutInitialValues():
                    network = self.build(classes, channels)
                yield network


class _WithoutInitialValues(TorchFunctionMode):
    """Inside, tensors on the meta device get no initial values: to draw them, torch imports its compiler."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function in _DRAWING or getattr(function, "__module__", "") == init.__name__:
            tensor: Tensor = arguments[0] if arguments else options["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*arguments, **options)


_DRAWING = {Tensor.normal_, Tensor.uniform_}


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    # torch types the hook as returning None, but documents that a returned value replaces the parameter.
    hook = register_module_parameter_registration_hook(_without_storage)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _without_storage(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


@cache
def tensors_of(architecture: Architecture, classes: int, channels: int) -> dict[str, torch.Size]:
    """Names and shapes of an architecture's tensors, without counters; they take next to no memory and time."""
    network = replace(architecture, widths=()).make_shape(classes, channels)
    if architecture.widths:
        # On the meta device buffers take no memory, too: the widths come from untrusted files.
        network = resized(make_plain(network).to("meta"), dict(architecture.widths))
    return {name: tensor.shape for name, tensor in without_counters(network.state_dict()).items()}
