"""`Architecture`: a network that can be built for any number of classes, and how released files spell its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dfcompress.models.plain import make_plain
from dfcompress.models.resizing import resized
from dfcompress.models.safe_reading import without_counters


@dataclass(frozen=True)
class Naming:
    """How a family of released files spells the tensors: regular expressions and what they become in our names.

    `mean` and `std` are those that everybody who uses this naming trained with, where that is known.
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

    `size` is the usual height and width of its input in pixels, None where it is not known.
    `tensors` is the number of tensors in its state dict (without `num_batches_tracked`), where known: it spares
    building a network only to see that it is another one. `ignored` matches tensors that only training needs.
    `mean` and `std` are what its released weights expect, where that is not what is usual for the size.
    `foreign` networks come from a factory of the user's. They have the channels that it gives them, and its number of
    classes where 0 are asked for, or where it takes no `num_classes`.
    `make` gives a network of the usual widths; `widths` are those of layers that have others (see `resizing`).
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
    foreign: bool = False
    widths: tuple[tuple[str, tuple[int, int]], ...] = ()

    def build(self, classes: int, channels: int) -> nn.Module:
        """The network, its weights as they are initialised; raises `BadInput` where it cannot have the widths."""
        network = self.make(classes, channels)
        return resized(make_plain(network), dict(self.widths)) if self.widths else network

    def ignores(self, name: str) -> bool:
        """Whether a tensor is one that only training needs."""
        return self.ignored is not None and re.match(self.ignored, name) is not None

    def make_empty(self, classes: int, channels: int) -> nn.Module:
        """The network with parameters on the meta device, where they take neither memory nor time to initialise; its
        buffers are real. One that computes with its parameters in its constructor is built as it is.
        """
        if not self.foreign:
            for network in self._without_memory(classes, channels):
                if not any(buffer.is_meta for buffer in network.buffers()):
                    return network
        return self.build(classes, channels)

    def make_shape(self, classes: int, channels: int) -> nn.Module:
        """The network for its tensors' names and shapes alone: its buffers, too, may be on the meta device."""
        made = iter(()) if self.foreign else self._without_memory(classes, channels)
        network = next(made, None)
        return self.build(classes, channels) if network is None else network

    def _without_memory(self, classes: int, channels: int) -> Iterator[nn.Module]:
        """The network built in the two ways that take no memory, as far as its constructor goes along with them: with
        parameters on the meta device, where most do, and with everything there, where hybrids and Swin v2 of timm do.
        """
        for place in (_parameters_on_meta(), torch.device("meta")):
            with suppress(RuntimeError):  # NotImplementedError, which meta tensors raise, is one.
                with place:
                    network = self.build(classes, channels)
                yield network


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    # torch types the hook as giving nothing, and documents that what it gives replaces the parameter.
    hook = register_module_parameter_registration_hook(_without_storage)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _without_storage(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


@cache
def tensors_of(architecture: Architecture, classes: int, channels: int) -> dict[str, torch.Size]:
    """Names and shapes of an architecture's tensors, without counters, at next to no cost."""
    network = replace(architecture, widths=()).make_shape(classes, channels)
    if architecture.widths:
        # Buffers, too, take no memory then: widths come from strangers' files.
        network = resized(make_plain(network).to("meta"), dict(architecture.widths))
    return {name: tensor.shape for name, tensor in without_counters(network.state_dict()).items()}
