"""All architectures with a name; each family has a file, and the folder is the registry.

The file of a family defines `ARCHITECTURES`, a list of `Architecture`.
Other packages add architectures through the entry-point group `dfcompress.architectures`; each entry is such a list.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from importlib import metadata
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from dfcompress.errors import BadInput
from dfcompress.models.architecture import Architecture, Naming
from dfcompress.models.huggingface import TRANSFORMERS, architecture_of
from dfcompress.models.plain import make_plain
from dfcompress.models.resizing import half_of, resized
from dfcompress.settings import named_function

HALF, TORCHVISION = "half:", "torchvision:"


@cache
def architectures() -> dict[str, Architecture]:
    """All architectures by name."""
    found: list[Architecture] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").ARCHITECTURES
    for entry in metadata.entry_points(group="dfcompress.architectures"):
        found += entry.load()
    return {architecture.name: architecture for architecture in found}


def find(name: str) -> Architecture:
    """The architecture with this name; raises `BadInput` with the nearest names if there is none."""
    known = architectures()
    if name not in known:
        close = difflib.get_close_matches(name, [*known, HALF.rstrip(":")], 3)
        remedy = f"Did you mean {', '.join(close)}?" if close else "The page of `inspect` says which names there are."
        if name.endswith(".py"):
            remedy = f"Name the function too that returns the network: {name}:FUNCTION."
        raise BadInput(f"There is no architecture {name!r}.", remedy)
    return known[name]


def named(
    spec: str, config: Mapping[str, Any] | None = None, widths: Mapping[str, tuple[int, int]] | None = None
) -> Architecture:
    """The architecture that `--arch` or a card names.

    `--arch` takes NAME (also torchvision:NAME), timm:NAME, file.py:factory, package.module:factory, or half: before any
    of these for half the channels. A card may also name `transformers:TYPE`, which is built from the card's `config`.
    `widths` are the card's widths of layers that differ from the named architecture.
    Code runs only if the user named it; a factory is called without arguments, or with `num_classes` if the number is
    known and the factory takes it.
    Raises `BadInput` if there is no such architecture.
    """
    if widths:
        return replace(named(spec, config), widths=tuple(widths.items()), tensors=None, namings=(Naming(),))
    if spec.startswith(HALF):
        whole = named(spec.removeprefix(HALF), config)
        return replace(whole, name=spec, make=partial(_make_half, whole), tensors=None, namings=(Naming(),))
    if spec.startswith(TRANSFORMERS):
        return architecture_of(spec, config)
    place, _, name = spec.rpartition(":")
    if place in ("", "torchvision"):
        return find(name)
    if place == "timm":
        return _from_timm(name)
    factory = named_function(spec, option="--arch", returns="the network")
    return Architecture(spec, partial(_make_foreign, factory, spec), size=None, foreign=True)


def plain(architecture: Architecture) -> Architecture:
    """The same architecture with plain weights (see `make_plain`), the form in which results are saved."""
    return replace(architecture, make=partial(_make_plain, architecture.make))


def runs_code(spec: str) -> bool:
    """Whether an architecture's name refers to code, which only the user may name."""
    while spec.startswith(HALF):
        spec = spec.removeprefix(HALF)
    return ":" in spec.removeprefix("timm:").removeprefix("torchvision:").removeprefix(TRANSFORMERS)


def _make_plain(make: Callable[[int, int], nn.Module], classes: int, channels: int) -> nn.Module:
    return make_plain(make(classes, channels))


def _make_half(whole: Architecture, classes: int, channels: int) -> nn.Module:
    network = make_plain(whole.make(classes, channels))
    return resized(network, half_of(network))


def _make_foreign(factory: Callable[..., object], spec: str, classes: int, channels: int) -> nn.Module:
    network = _called(factory, classes)
    if not isinstance(network, nn.Module):
        raise BadInput(f"--arch {spec} gave a {type(network).__name__}.", "It must give a torch.nn.Module.")
    tensors = chain(network.named_parameters(), network.named_buffers())
    if lazy := next((name for name, tensor in tensors if is_lazy(tensor)), None):
        raise BadInput(
            f"--arch {spec} gave a network whose {lazy} has no shape yet.",
            "Let the factory show a batch of images to its lazy layers before it gives the network.",
        )
    return network


def _called(factory: Callable[..., object], classes: int) -> object:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # Some classes written in C have no signature.
        return factory()
    if classes and "num_classes" in parameters:
        return factory(num_classes=classes)
    if classes and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        with suppress(TypeError):  # torchvision's functions pass keywords on; others refuse them.
            return factory(num_classes=classes)
    return factory()


def _from_timm(name: str) -> Architecture:
    try:
        import timm
    except ImportError:
        raise BadInput(f"--arch timm:{name} needs timm.", "Install it with: pip install 'dfcompress[timm]'.") from None
    # Names only: create_model would also accept an address and download from it.
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        remedy = f"Did you mean {', '.join(close)}?" if close else "timm.list_models() gives the names."
        raise BadInput(f"timm has no model {name!r}.", remedy)
    released = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    channels, size, _ = released.input_size
    make = partial(_make_timm, name)
    return Architecture(f"timm:{name}", make, size, channels, mean=tuple(released.mean), std=tuple(released.std))


def _make_timm(name: str, classes: int, channels: int) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return network
