"""Which architecture the tensors of a file fit: the one that the user named, else the file's, else the recognised one.

Also whether the architecture that a card names fits a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from dfcompress import console
from dfcompress.errors import BadInput, listed
from dfcompress.models.architecture import Architecture, tensors_of
from dfcompress.models.architectures import HALF, TORCHVISION, architectures, named, plain, runs_code
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import quantized_layers, tensor_grids
from dfcompress.models.huggingface import TRANSFORMERS
from dfcompress.models.recognition import MISSING, SHOWN, Recognised, differences, fit_to, recognise, why_in_part
from dfcompress.models.resizing import REMEDY
from dfcompress.models.safe_reading import StoredModel, weights_file, without_counters


def fit_of_file(
    stored: StoredModel, path: Path, stated: Mapping[str, Any], given: Mapping[str, Any], *, match_by_order: bool
) -> Recognised:
    """Match the tensors to the architecture that the user gave, else to the file's, else to the recognised one.

    Raises `BadInput` if they do not fit it.
    """
    arch, classes = given.get("architecture"), given.get("classes", stated.get("classes", 0))
    if stored.quantization is not None:
        return _fit_of_packed(arch, {**stated, **given}, stored, path)
    if match_by_order and not (_is_sorted(path) and stated.get("architecture") == arch):  # Our own result.
        return _fit_by_order(arch, stored.tensors, path, classes)
    if arch:
        return _fit_of(named(arch, widths=stated.get("widths")), stored.tensors, path, classes)
    if "architecture" in stated:
        return _fit_of_stated(stated, stored.tensors, path)
    return recognise(stored.tensors, str(path))


def is_built_by_name(classifier: Classifier) -> bool:
    """Whether the architecture named on the card builds a network with the classifier's tensor names and shapes."""
    card = classifier.card
    shapes = {name: value.shape for name, value in without_counters(classifier.network.state_dict()).items()}
    folded = bool(tensor_grids(classifier.network))
    if folded:  # Biases have replaced the BatchNorms; weights have kept their names.
        shapes = {f"{name}.weight": layer.weight.shape for name, layer in quantized_layers(classifier.network).items()}
    with suppress(BadInput):
        for form in _forms(named(card.architecture, card.config, card.widths)):
            built = tensors_of(form, card.classes, card.input_size[0])
            if shapes == built or (folded and shapes.items() <= built.items()):
                return True
    return False


def _fit_of_packed(arch: str | None, card: Mapping[str, Any], stored: StoredModel, path: Path) -> Recognised:
    """The architecture of a quantized result, from its card: packed tensors have no shapes to recognise."""
    if not {"architecture", "classes", "input_size", "mean", "std"} <= card.keys():
        raise BadInput(f"{path} is packed but has no model card.", "Make it again with `dfcompress quantize`.")
    classes, name = card["classes"], card["architecture"].removeprefix(TORCHVISION)
    _refuse_code(name, arch, path)
    if name != arch and name not in architectures() and not name.startswith(("timm:", HALF, TRANSFORMERS)):
        raise BadInput(f"{path} states the architecture {name!r}, which is not known.", "Add --arch file.py:factory.")
    architecture = named(name, card.get("config"), card.get("widths"))
    _require_room(architecture, classes, card["input_size"][0], stored, path)
    return Recognised(architecture, architecture.namings[0], classes, card["input_size"][0], {})


def _require_room(architecture: Architecture, classes: int, channels: int, stored: StoredModel, path: Path) -> None:
    """Raise `BadInput`, before memory is allocated, if the file is too small for the network at 2 bits per value."""
    values = sum(shape.numel() for shape in tensors_of(architecture, classes, channels).values())
    if values > 4 * sum(tensor.numel() for tensor in stored.tensors.values()):
        raise BadInput(f"{path} is too small for the {values:,} values of {architecture.name}.", "Make it again.")


def _fit_by_order(arch: str | None, tensors: Mapping[str, Tensor], path: Path, classes: int) -> Recognised:
    if arch is None:
        raise BadInput("--match-by-order needs --arch.", "Name the architecture whose order the weights have.")
    if _is_sorted(path):
        raise BadInput(f"{path}: safetensors sorts its tensors by name.", "Their order is lost; match them by name.")
    architecture = named(arch)
    weights = [tensor for tensor in tensors.values() if tensor.dim() >= 2]
    stem = next((weight for weight in weights if weight.dim() == 4), None)
    if not classes and not architecture.foreign:
        classes = weights[-1].shape[0] if weights else 0
    channels = architecture.channels
    usual = tensors_of(architecture, classes or 10, channels).values()
    if stem is not None and (usual_stem := next((shape for shape in usual if len(shape) == 4), None)):
        channels = channels * stem.shape[1] // usual_stem[1]
    expected = tensors_of(architecture, classes, channels)
    if len(tensors) != len(expected):
        raise BadInput(
            f"{path} has {len(tensors)} tensors, {architecture.name} {len(expected)}.", "They do not match by order."
        )
    for (name, shape), (theirs, tensor) in zip(expected.items(), tensors.items(), strict=True):
        if tensor.shape != shape:
            raise BadInput(
                f"{path}: {theirs} is {tuple(tensor.shape)}, {architecture.name} has {name} {tuple(shape)} there.",
                "They do not match by order.",
            )
    console.notice(
        f"Matched by order: a twin of {architecture.name} with other connections gives wrong answers silently."
    )
    matched = dict(zip(expected, tensors.values(), strict=True))
    return Recognised(architecture, architecture.namings[0], classes, channels, matched)


def _is_sorted(path: Path) -> bool:
    """Whether a file stores its tensors sorted by name, so that their order carries no information."""
    return weights_file(path).suffix == ".safetensors"


def _fit_of(architecture: Architecture, tensors: Mapping[str, Tensor], path: Path, classes: int = 0) -> Recognised:
    """Match the tensors to the named architecture, as its factory builds it or with plain weights as `save` writes."""
    for form in _forms(architecture):
        if fit := fit_to(form, tensors, str(path), classes):
            return fit
    found = differences(architecture, tensors, classes)
    name = architecture.name + (" of the widths that its card states" if architecture.widths else "")
    remedy = _remedy(architecture, tensors, path, classes, found)
    raise BadInput(f"{path} is not {name}: {listed(found, SHOWN, '; ')}.", remedy)


def _forms(architecture: Architecture) -> list[Architecture]:
    """The architecture as it is built and, for a foreign architecture, also its form with plain weights."""
    return [architecture, plain(architecture)] if architecture.foreign else [architecture]


def _remedy(
    architecture: Architecture, tensors: Mapping[str, Tensor], path: Path, classes: int, found: list[str]
) -> str:
    """The remedy to print for the differences `found` between a file and the architecture that was named for it."""
    if architecture.widths:
        return REMEDY
    if not architecture.foreign:
        with suppress(BadInput):
            return f"It is {recognise(tensors, str(path)).architecture.name}: leave --arch out, or name that."
    factory = " With a factory that takes num_classes, --num-classes N says how many." if architecture.foreign else ""
    missing = sum(each.endswith(MISSING) for each in found)
    if len(found) == 2 * missing and not _is_sorted(path):
        return "Where only the names differ, add --match-by-order." + factory
    if part := why_in_part(architecture, tensors, str(path), classes):
        return part.remedy
    return "Name the architecture of the network that was saved." + factory


def _fit_of_stated(stated: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Recognised:
    """Match the tensors to the architecture that a file states: ours, else timm's, else recognised; never code."""
    name = stated["architecture"].removeprefix(TORCHVISION)
    _refuse_code(name, None, path)
    if name.startswith((HALF, TRANSFORMERS)) or stated.get("widths"):
        return _fit_of(named(name, stated.get("config"), stated.get("widths")), tensors, path)
    if name in architectures() and (fit := fit_to(architectures()[name], tensors, str(path))):
        return fit
    timm_name = name.removeprefix("timm:")
    if name.startswith("timm:") or _timm_has(timm_name):
        return _fit_of(named(f"timm:{timm_name}"), tensors, path)
    return recognise(tensors, str(path))


def _timm_has(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)


def _refuse_code(stated: str, arch: str | None, path: Path) -> None:
    """Raise `BadInput` if a file states an architecture that is code and the user did not name the same one."""
    if runs_code(stated) and stated != arch:
        raise BadInput(
            f"{path} was made with --arch {stated}.",
            "Give the same --arch again, or arch = ... in dfcompress.toml: code runs only when you name it.",
        )
