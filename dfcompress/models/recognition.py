"""Recognise the architecture of a file from the names and shapes of its tensors alone.

Training programs wrap networks: `model.module.backbone.conv1.weight` stands for `conv1.weight`, and a file may also
hold the tensors of a loss or a metric. So architectures are searched for by the endings of the file's names. An
architecture fits if the file has all of its tensors with their shapes, and no layer is left over.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.errors import BadInput, listed
from dfcompress.models.architecture import Architecture, Naming, tensors_of
from dfcompress.models.architectures import architectures, named
from dfcompress.models.fingerprints import WRAPPERS, Twins, fitting_names, fitting_order, index, unwrapped

SHOWN = 4
MISSING = "is missing"
# The greatest number of prefixes in a file: one for the network's body and another for its head.
PARTS = 2
# Buffers that thop, a counter of operations, leaves in every module.
COUNTED = ("total_ops", "total_params")

# The number of parent folders whose names count: Hugging Face's cache has files in
# models--timm--NAME/snapshots/REVISION.
FOLDERS = 3
# The least share of a file's tensors that the nearest architecture must have. Our choice: any two networks have some
# names and shapes in common, such as `fc.bias`.
NEAR = 1 / 4
# EfficientNets with this tensor name (from efficientnet_pytorch and similar) are TensorFlow's, whose padding differs.
OF_TENSORFLOW, TENSORFLOW = "_conv_stem.weight", "timm:tf_"

# The place of a name in a file: its prefix, and the wrappers inside the name.
Place = tuple[str, str]


@dataclass(frozen=True)
class Recognised:
    """An architecture that fits, the tensors under its names, and the classes and input channels that follow from them.

    `classes` may be 0 for a user's factory: the width of its network's output then gives the number.
    """

    architecture: Architecture
    naming: Naming
    classes: int
    channels: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Match:
    """The comparison of a file's tensors with an architecture, under one of its namings.

    `unequal`, `missing` and `surplus` describe the differences. `only_head_missing` means that the missing tensors are
    exactly those of the last layer and no shape differs. `shared` is the number of tensors with the architecture's
    names and shapes; `moved` maps the names of a head's tensors to the file's own names; `beside` are names of tensors
    outside the network, `layers` those among them that belong to a layer; `twins` are two prefixes under which the file
    has the same tensors with different values.
    """

    found: Recognised
    unequal: list[str]
    missing: list[str]
    surplus: list[str]
    only_head_missing: bool
    shared: int
    moved: Mapping[str, str]
    beside: list[str]
    layers: list[str]
    twins: tuple[str, str] | None

    @property
    def differences(self) -> list[str]:
        """All differences between the file and the architecture."""
        return self.unequal + self.missing + self.surplus

    @property
    def complete(self) -> bool:
        """Whether the file has every tensor of the architecture with its shape, and the network has no others."""
        return not self.differences


class _File:
    """The tensors of a file, indexed by the endings of their names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._endings: dict[Naming, Mapping[str, Mapping[Place, str]]] = {}

    def endings(self, naming: Naming) -> Mapping[str, Mapping[Place, str]]:
        """For every ending of a name, in our spelling, the places where it occurs and the full name at each place."""
        if naming not in self._endings:
            found: dict[str, dict[Place, str]] = defaultdict(dict)
            for name in self.tensors:
                parts = name.split(".")
                for start in range(len(parts)):
                    unwrapped = [part for part in parts[start:] if part not in WRAPPERS]
                    if unwrapped and unwrapped[0] == parts[start]:
                        inner = "".join(f"{part}." for part in parts[start:] if part in WRAPPERS)
                        prefix = "".join(f"{part}." for part in parts[:start])
                        found[naming.renamed(".".join(unwrapped))][prefix, inner] = name
            self._endings[naming] = found
        return self._endings[naming]

    def fitting(self) -> list[Twins]:
        """The architectures of the index that fit the tensors under one prefix, the last layer left out."""
        endings = self.endings(Naming())
        prefixes = {prefix for stem in index().stems for name in stem for prefix, _ in endings.get(name, {})}
        found: list[Twins] = []
        for prefix in sorted(prefixes | {""}):
            inside = [name for name in self.tensors if name.startswith(prefix) and _leaf(name) not in COUNTED]
            shapes = {unwrapped(name.removeprefix(prefix)): self.tensors[name].shape for name in inside}
            found += [twins for twins in fitting_names(shapes) if twins not in found]
        return found

    def same(self, name: str, other: str) -> bool:
        """Whether two names belong to the same tensor or to two tensors with the same values."""
        one, two = self.tensors[name], self.tensors[other]
        return one is two or (one.shape == two.shape and not one.is_meta and torch.equal(one, two))


def recognise(tensors: Mapping[str, Tensor], where: str) -> Recognised:
    """The one architecture whose tensors have these names and shapes.

    Tensors outside the network are left out with a notice. If several architectures fit and the file or a folder around
    it is named after one of them, that one is taken. `where` is the file's path, also used in messages.
    Raises `BadInput` if several fit and the name does not decide (the message lists them), if none fits (it names those
    whose shapes fit in order, or the nearest and its first differences), and if the file holds a network twice or
    layers beside it.
    """
    file, count = _File(tensors), len(tensors)
    known = architectures().values()
    likely = [each for each in known if each.tensors in (None, count) or each.ignored]
    # A library is imported last: of its architectures, the index finds those whose names are in the file as they are.
    listed_names = {name for twins in file.fitting() for name in twins}
    matches = _complete([each for each in likely if not each.library or each.name in listed_names], file)
    if not any(_is_clear(match) for match in matches):
        matches = _complete(likely, file)
    if not any(_is_clear(match) for match in matches) and (match := _listed(file, where)):
        if _is_clear(match):
            return _taken(match, where)
        matches = [match]
    if not matches and (proposed := _in_order(file)):
        raise BadInput(
            f"{where} is none of the known architectures by the names of its tensors, but their shapes in order are "
            f"those of {' and of '.join(proposed)}.",
            f"If it is {'that network' if len(proposed) == 1 else 'one of them'}, type --arch {proposed[0]} "
            "--match-by-order: its layers must be connected alike, which shapes do not tell. "
            "If you have its code, type --arch file.py:FUNCTION.",
        )
    if not any(_is_clear(match) for match in matches):
        # Few tensors are outside the network, so the largest architectures are tried first.
        smaller = {each.tensors for each in known if each.tensors and each.tensors < count}
        for size in sorted(smaller, reverse=True):
            matches += _complete([each for each in known if each.tensors == size], file)
            if any(_is_clear(match) for match in matches):
                break
    clear = [match for match in matches if _is_clear(match)]
    if len(clear) == 1:
        return _taken(_usual_or_named(clear[0], file, where), where)
    if clear:
        names = ", ".join(match.found.architecture.name for match in clear)
        raise BadInput(
            f"{where} fits several architectures: {names}.",
            f"Say which, for instance --arch {clear[0].found.architecture.name}.",
        )
    if matches:
        _refuse_unclear(max(matches, key=lambda match: match.shared), where)
    raise _unknown(file, where)


def fit_to(
    architecture: Architecture, tensors: Mapping[str, Tensor], where: str, classes: int = 0
) -> Recognised | None:
    """The tensors matched to an architecture that the user named, or None if they do not fit.

    Tensors outside the network are left out with a notice, even layers: the user named the part to use. `classes` is
    the number of classes of a user's factory.
    Raises `BadInput` if the file holds the network twice.
    """
    match = _best(architecture, _File(tensors), classes)
    if not match.complete:
        return None
    if match.twins:
        _refuse_unclear(match, where)
    return _taken(match, where)


def differences(architecture: Architecture, tensors: Mapping[str, Tensor], classes: int = 0) -> list[str]:
    """The differences between the tensors and the architecture under its best naming; empty if they fit."""
    return _best(architecture, _File(tensors), classes).differences


def why_in_part(
    architecture: Architecture, tensors: Mapping[str, Tensor], where: str, classes: int = 0
) -> BadInput | None:
    """The error for a file that lacks only the last layer of an architecture, or has further layers; else None."""
    return _why_in_part(_best(architecture, _File(tensors), classes), where, len(tensors))


def _listed(file: _File, where: str) -> _Match | None:
    """The match of the index's architecture for a file, or None if no architecture of the index fits.

    Raises `BadInput` if several fit, if timm would have to build it and is missing or too old, and for a body without
    its last layer.
    """
    fitting = file.fitting()
    if not fitting:
        return None
    name = _decided(fitting, where)
    if name is None:
        names = [twins[0] for twins in fitting]
        raise BadInput(
            f"{where} fits several architectures, which compute differently: {', '.join(names)}.",
            f"Say which, for instance --arch {names[0]}; a file or folder of such a name needs no --arch.",
        )
    match = _best(_of_library(name, where), file)
    if match.complete:
        return match
    if refused := _why_in_part(match, where, len(file.tensors)):
        raise refused
    return None


def _usual_or_named(usual: _Match, file: _File, where: str) -> _Match:
    """The match of the default architecture for the tensors, or of another fitting one that the file is named after.

    Several architectures may have the same tensors: timm has ResNets that differ from torchvision's only in operations
    without tensors.
    """
    fitting = file.fitting()
    if not any(usual.found.architecture.name in twins for twins in fitting):
        return usual
    name = _decided(fitting, where) or usual.found.architecture.name
    if any({name, usual.found.architecture.name} <= {*twins} for twins in fitting):
        return usual
    named_match = _best(_of_library(name, where), file)
    return named_match if named_match.complete else usual


def _decided(fitting: Sequence[Twins], where: str) -> str | None:
    """Decide among the fitting architectures: the file's name, else the only one, else, with a notice, the only one of
    torchvision or of ours; None if this does not decide.
    """
    if name := _named_by(where, fitting):
        return name
    if len(fitting) == 1:
        return fitting[0][0]
    usual = [twins[0] for twins in fitting if twins[0] in architectures()]
    if len(usual) != 1:
        return None
    others = [twins[0] for twins in fitting if twins[0] != usual[0]]
    console.notice(
        f"{where}: taken for {usual[0]}. The tensors fit {' and '.join(others)} as well, which compute otherwise: "
        f"if it is {'that' if len(others) == 1 else 'one of them'}, name it with --arch."
    )
    return usual[0]


def _named_by(where: str, fitting: Iterable[Twins]) -> str | None:
    """The architecture that a file or one of the folders around it is named after; None if there is not exactly one.

    A name counts if no letter or digit adjoins it, and if it is not part of another found name.
    """
    path = Path(where)
    for part in (path.stem, *(parent.name for parent in [*path.parents][:FOLDERS])):
        names = {_bare(name): name for twins in reversed([*fitting]) for name in reversed(twins)}
        found = [bare for bare in names if re.search(rf"(?<![a-zA-Z0-9]){re.escape(bare)}(?![a-zA-Z0-9])", part)]
        longest = [bare for bare in found if not any(bare != other and bare in other for other in found)]
        if found:
            return names[longest[0]] if len(longest) == 1 else None
    return None


def _bare(name: str) -> str:
    return name.rpartition(":")[2]


def _of_library(name: str, where: str) -> Architecture:
    """An architecture of the index; raises `BadInput` if building it needs timm, which is missing or too old."""
    if name in architectures():
        return architectures()[name]
    try:
        import timm
    except ImportError:
        raise BadInput(
            f"{where} holds weights of timm's {_bare(name)}, and timm is not installed.",
            "Install it with: pip install 'dfcompress[timm]'.",
        ) from None
    if not timm.is_model(_bare(name)):
        raise BadInput(
            f"{where} holds weights of timm's {_bare(name)}, which timm {timm.__version__} does not know.",
            f"Install timm {index().versions['timm']} or a newer one.",
        )
    return named(name)


def _complete(candidates: Iterable[Architecture], file: _File) -> list[_Match]:
    return [match for each in candidates if (match := _best(each, file)).complete]


def _is_clear(match: _Match) -> bool:
    return not match.twins and not match.layers


def _best(architecture: Architecture, file: _File, classes: int = 0) -> _Match:
    matches = [_match(architecture, naming, file, classes) for naming in architecture.namings]
    return min(matches, key=lambda match: (len(match.differences), len(match.moved)))


def _taken(match: _Match, where: str) -> Recognised:
    if match.moved:
        moved = ", ".join(f"{theirs} taken for {name}" for name, theirs in match.moved.items())
        console.notice(f"{where}: {moved} of {match.found.architecture.name}.")
    if match.beside:
        left = listed(match.beside, SHOWN)
        console.notice(f"{where}: {left} left out, because {match.found.architecture.name} has no such tensors.")
    return match.found


def _refuse_unclear(match: _Match, where: str) -> None:
    name = match.found.architecture.name
    if match.twins:
        one, two = (f"{prefix!r}" if prefix else "no prefix" for prefix in match.twins)
        raise BadInput(
            f"{where} holds {name} twice, with different weights: under {one} and under {two}.",
            "Save the tensors of one alone, without the prefix.",
        )
    raise BadInput(
        f"{where} holds {name} and layers beside it: {listed(match.layers, SHOWN)}.",
        f"Add --arch {name} to use that part alone, or name the whole network with --arch file.py:factory.",
    )


def _why_in_part(match: _Match, where: str, count: int) -> BadInput | None:
    name = match.found.architecture.name
    if match.only_head_missing and not match.surplus:
        return BadInput(
            f"{where} holds the body of {name} without its last layer, so it is not a classifier: "
            f"{listed(match.missing, SHOWN, '; ')}.",
            "Use a file that has the last layer, too.",
        )
    if match.surplus and not match.unequal and (match.only_head_missing or not match.missing):
        return BadInput(
            f"{where} is none of the known architectures; the nearest is {name}, which has "
            f"{match.shared} of its {count} tensors: {listed(match.missing + match.surplus, SHOWN, '; ')}.",
            f"{name} has no such layers: name the whole network with --arch file.py:factory, or timm:NAME if it is "
            "another one of timm's.",
        )
    return None


def _unknown(file: _File, where: str) -> BadInput:
    """The error that no architecture fits; it names the nearest, which shares most names and shapes with the file."""
    count = len(file.tensors)
    near = [_best(each, file) for each in architectures().values() if _may_be_near(each, count)]
    nearest = max(near, key=lambda match: (match.shared, -len(match.differences)), default=None)
    remedy = "Name it with --arch timm:NAME or --arch file.py:factory."
    if nearest is None or nearest.shared < NEAR * count:
        return BadInput(
            f"{where} is none of the known architectures, and has too little in common with any: it begins with "
            f"{listed([f'{name} {_shape(tensor.shape)}' for name, tensor in file.tensors.items()], SHOWN)}.",
            remedy,
        )
    if refused := _why_in_part(nearest, where, count):
        return refused
    return BadInput(
        f"{where} is none of the known architectures; the nearest is {nearest.found.architecture.name}, which has "
        f"{nearest.shared} of its {count} tensors: {listed(nearest.differences, SHOWN, '; ')}.",
        remedy,
    )


def _in_order(file: _File) -> list[str]:
    """The default names of the architectures whose shapes in order equal the file's, the most likely first."""
    shapes = [tensor.shape for name, tensor in file.tensors.items() if _leaf(name) not in COUNTED]
    names = [twins[0] for twins in fitting_order(shapes)]
    if any(name.endswith(OF_TENSORFLOW) for name in file.tensors):
        names.sort(key=lambda name: not name.startswith(TENSORFLOW))
    return names


def _may_be_near(architecture: Architecture, count: int) -> bool:
    """Whether to build an architecture for comparison: it has half to twice `count` tensors, or an unknown number."""
    return architecture.tensors is None or count / 2 <= architecture.tensors <= 2 * count


def _match(architecture: Architecture, naming: Naming, file: _File, classes: int) -> _Match:
    channels = architecture.channels
    usual = tensors_of(architecture, classes if architecture.foreign else 10, channels)
    names, prefixes, twins = _found(usual, file, naming)
    moved = _head_elsewhere(usual, names, file)
    names |= moved
    tensors = {name: file.tensors[theirs] for name, theirs in names.items()}
    if not architecture.foreign:
        classes, channels = _classes_and_channels(architecture, usual, tensors)
    expected = tensors_of(architecture, classes, channels)
    others = _others(architecture, naming, file, names, prefixes)
    layers = [name for name in _of_layers(others, file) if not any(file.same(name, own) for own in names.values())]
    modules = {unwrapped(name).split(".")[0] for name in expected if "." in name}
    inside = [name for name in others if _is_inside(name, prefixes, modules, name in layers, file)]
    unequal = [
        f"{names[name]} is {_shape(tensors[name].shape)}, expected {_shape(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    missing = [f"{name} {_shape(shape)} {MISSING}" for name, shape in expected.items() if name not in tensors]
    surplus = [f"{name} {_shape(file.tensors[name].shape)} is not in it" for name in (others if missing else inside)]
    return _Match(
        found=Recognised(architecture, naming, classes, channels, tensors),
        unequal=unequal,
        missing=missing,
        surplus=surplus,
        only_head_missing=_is_head([name for name in expected if name not in tensors], expected) and not unequal,
        shared=len(expected) - len(unequal) - len(missing),
        moved=moved,
        beside=[name for name in others if name not in inside],
        layers=[name for name in layers if name not in inside],
        twins=twins,
    )


def _others(
    architecture: Architecture, naming: Naming, file: _File, names: Mapping[str, str], prefixes: Iterable[str]
) -> list[str]:
    """The names of the file's tensors that neither the architecture has nor only training needs."""
    taken = set(names.values())
    spellings = {name: [naming.renamed(name.removeprefix(prefix)) for prefix in prefixes] for name in file.tensors}
    return [name for name, each in spellings.items() if name not in taken and not any(map(architecture.ignores, each))]


def _found(
    expected: Mapping[str, torch.Size], file: _File, naming: Naming
) -> tuple[dict[str, str], list[str], tuple[str, str] | None]:
    """The file's names of the expected tensors, and the prefixes of these names.

    Third, two prefixes if the file has the tensors under both with different values, else None.
    """
    exact = {naming.renamed(name): name for name in file.tensors}
    if expected.keys() <= exact.keys():
        return {name: exact[name] for name in expected}, [""], None
    endings = file.endings(naming)
    names: dict[str, str] = {}
    prefixes: list[str] = []
    twins = None
    for _ in range(PARTS):
        covered: dict[Place, dict[str, str]] = defaultdict(dict)
        taken = set(names.values())
        for name, shape in expected.items():
            if name in names:
                continue
            for place, theirs in endings.get(unwrapped(name), {}).items():
                if theirs not in taken and file.tensors[theirs].dim() == len(shape):
                    covered[place][name] = theirs
        if not covered:
            break
        best = max(covered, key=lambda place: len(covered[place]))
        here = covered.pop(best)
        for place, there in covered.items():
            if len(there) == len(here) and not all(
                name in there and file.same(there[name], theirs) for name, theirs in here.items()
            ):
                twins = twins or (best[0], place[0])
        names |= here
        prefixes.append(best[0])
    return names, prefixes, twins


def _head_elsewhere(expected: Mapping[str, torch.Size], names: Mapping[str, str], file: _File) -> dict[str, str]:
    """The names of the last layer's tensors in a file that has replaced the last layer by one with another name.

    Empty unless everything except the last layer is found and exactly one layer is left over.
    """
    missing = [name for name in expected if name not in names]
    last = [name for name, shape in expected.items() if len(shape) >= 2][-1:]
    if not missing or not last or {_parent(name) for name in missing} != {_parent(last[0])}:
        return {}
    taken = set(names.values())
    left = _of_layers([name for name in file.tensors if name not in taken], file)
    parents = [*{_parent(name) for name in left}]
    if len(parents) != 1:
        return {}
    found = {name: f"{parents[0]}.{_leaf(name)}".lstrip(".") for name in missing}
    fits = all(theirs in left and file.tensors[theirs].dim() == len(expected[name]) for name, theirs in found.items())
    return found if fits else {}


def _is_head(names: Iterable[str], expected: Mapping[str, torch.Size]) -> bool:
    """Whether these are all tensors of the last layer."""
    last = [_parent(name) for name, shape in expected.items() if len(shape) >= 2][-1:]
    return [*names] == [name for name in expected if [_parent(name)] == last]


def _of_layers(names: Iterable[str], file: _File) -> list[str]:
    """The names that belong to a layer.

    A layer has a weight of two dimensions or more, a weight and a bias, or running statistics.
    """
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if _leaf(name) not in COUNTED:
            leaves[_parent(name)].append(name)
    found = []
    for together in leaves.values():
        kinds = {_leaf(name): file.tensors[name].dim() for name in together}
        if kinds.get("weight", 0) >= 2 or {"weight", "bias"} <= kinds.keys() or "running_mean" in kinds:
            found += together
    return found


def _is_inside(name: str, prefixes: Iterable[str], modules: set[str], of_layer: bool, file: _File) -> bool:
    """Whether a tensor that the architecture lacks is part of the network: it is in one of its modules, it belongs to a
    layer under its prefix, or it is at its root with more than one dimension (a loss has one at most).
    """
    if _leaf(name) in COUNTED:
        return False
    for prefix in prefixes:
        if name.startswith(prefix):
            first_part, _, inner = name.removeprefix(prefix).partition(".")
            return first_part in modules or (file.tensors[name].dim() > 1 if not inner else of_layer)
    return False


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _classes_and_channels(
    architecture: Architecture, usual: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]
) -> tuple[int, int]:
    """Classes from the network's last weight, input channels from its first convolution, in the architecture's order.

    All shapes are compared with the result afterwards. The file's own order is not used: safetensors sorts names.
    """
    head = ["", *(name for name, shape in usual.items() if len(shape) >= 2)][-1]
    # A position embedding may have four dimensions, too, so the name must be `weight`.
    stem = next((name for name, shape in usual.items() if len(shape) == 4 and _leaf(name) == "weight"), "")
    classes = tensors[head].shape[0] if head in tensors and tensors[head].dim() >= 2 else 10
    channels = architecture.channels
    if stem in tensors and tensors[stem].dim() == 4:
        # The first convolution has several channels per image channel if the network first moves pixels into channels.
        channels = channels * tensors[stem].shape[1] // usual[stem][1]
    return classes, channels


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a scalar"
