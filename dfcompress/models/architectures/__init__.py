"""Every architecture that has a name; one file a family, and the folder is the registry.

A family's file holds `ARCHITECTURES`, a list of `Architecture`.
Other packages add theirs through the entry-point group `dfcompress.architectures`, each entry such a list.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard

SMALL_INPUT = 64


@dataclass(frozen=True)
class Naming:
    """How a family of released files spells the tensors: regular expressions and what they become in our names.

    `mean` and `std` are those that everybody who uses this naming trained with, where that is known.
    """

    renames: tuple[tuple[str, str], ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under our names."""
        return {self._renamed(name): tensor for name, tensor in tensors.items()}

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class Architecture:
    """A network that can be built for any number of classes and input channels.

    `size` is the usual height and width of its input in pixels.
    `tensors` is the number of tensors in its state dict (without `num_batches_tracked`), where known: it spares
    building a network only to see that it is another one. `ignored` matches tensors that only training needs.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    size: int
    channels: int = 3
    tensors: int | None = None
    ignored: str | None = None
    namings: tuple[Naming, ...] = (Naming(),)

    def ignores(self, name: str) -> bool:
        """Whether a tensor is one that only training needs."""
        return self.ignored is not None and re.match(self.ignored, name) is not None


@cache
def architectures() -> dict[str, Architecture]:
    """All architectures by name."""
    found: list[Architecture] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").ARCHITECTURES
    for entry in metadata.entry_points(group="dfcompress.architectures"):
        found += entry.load()
    return {architecture.name: architecture for architecture in found}


@cache
def tensors_of(architecture: Architecture, classes: int, channels: int) -> dict[str, torch.Size]:
    """Names and shapes of an architecture's tensors, without `num_batches_tracked`, at next to no cost.

    Parameters lose their storage as they are registered, so no memory is touched and no initialiser does work.
    (Building under `torch.device("meta")` fails for networks that compute with tensors in their constructor.)
    """
    hook = register_module_parameter_registration_hook(_without_storage)
    try:
        network = architecture.make(classes, channels)
    finally:
        hook.remove()
    return {
        name: tensor.shape for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")
    }


def _without_storage(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def find(name: str) -> Architecture:
    """The architecture of that name; raises `BadInput` with the nearest names where there is none."""
    known = architectures()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        remedy = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(sorted(known))}."
        raise BadInput(f"There is no architecture {name!r}.", remedy)
    return known[name]


def named(spec: str) -> Architecture:
    """The architecture that `--arch` names: NAME, timm:NAME, file.py:factory or package.module:factory.

    Code runs only because the user named it; a factory is called without arguments.
    Raises `BadInput` where there is no such thing.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        return find(name)
    if place == "timm":
        return Architecture(spec, partial(_make_timm, name), 224)
    factory = getattr(_module_at(place), name, None)
    if not callable(factory):
        raise BadInput(f"--arch {spec}: {place} has no function {name!r}.", "Name a function that returns the network.")
    return Architecture(spec, lambda classes, channels: factory(), 224)


def _make_timm(name: str, classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise BadInput(f"--arch timm:{name} needs timm.", "Install it with: pip install 'dfcompress[timm]'.") from None
    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        raise BadInput(
            f"timm has no model {name!r}.", f"Did you mean {', '.join(close)}?" if close else "See timm's list."
        )
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return network


def _module_at(place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise BadInput(f"--arch: there is no module {place!r} ({error}).", "Check the spelling.") from None
    path = Path(place)
    if not path.is_file():
        raise BadInput(f"--arch: {place} does not exist.", "Name a Python file.")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def fit_student(name: str, card: ModelCard, *, seed: int) -> tuple[nn.Module, ModelCard, str]:
    """A freshly initialised network for the teacher's classes and input, its card, and a sentence on what was taken.

    At inputs of up to 64 pixels `resnet18` means its CIFAR form `cifar_resnet18`, and likewise for every name that has
    one. Raises `BadInput` for unknown names and inputs that the network cannot take.
    """
    channels, height, width = card.input_size
    small = f"cifar_{name}"
    taken = small if max(height, width) <= SMALL_INPUT and small in architectures() else name
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = find(taken).make(card.classes, channels)
    with torch.no_grad():
        try:
            network.eval()(torch.zeros(1, *card.input_size))
        except (RuntimeError, ValueError) as error:
            raise BadInput(
                f"{taken} cannot take images of {channels}x{height}x{width}: {error}.", "Name another --student."
            ) from None
    stem = " (its small-image form: 3x3 stem, no max-pool)" if taken != name else ""
    sentence = f"Student: {taken}{stem}, {card.classes} classes, input {channels}x{height}x{width}."
    origin = {**card.origin, "architecture": "given"}
    names = card.class_names
    return network, ModelCard(taken, card.classes, card.input_size, card.mean, card.std, names, origin), sentence
