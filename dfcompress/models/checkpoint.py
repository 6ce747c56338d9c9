"""A file or folder ↔ a `Classifier`.

load("resnet20.th")                                     # the architecture is recognised
load("net.pt", arch="net.py:make", input_size=(1, 28, 28))
save(classifier, Path("result"))                        # model.safetensors + config.json, timm's layout
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models import packing
from dfcompress.models.architectures import (
    HALF,
    SMALL_INPUT,
    Architecture,
    architectures,
    named,
    runs_code,
    tensors_of,
)
from dfcompress.models.batchnorms import plain_batchnorms
from dfcompress.models.card import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MNIST_MEAN,
    MNIST_STD,
    ModelCard,
    Origin,
)
from dfcompress.models.classifier import Classifier, why_not_run
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.recognition import Recognised, describe, fit_to, recognise
from dfcompress.models.statistics import require_variances
from dfcompress.models.weights import (
    CARD_KEY,
    CONFIG,
    COUNTERS,
    QUANTIZATION_KEY,
    WEIGHTS,
    StoredModel,
    read,
    read_json,
    serialised,
    sha256,
    weights_file,
)
from dfcompress.run import write_atomically, write_json

SIDECAR = ".card.json"


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    match_by_order: bool = False,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: str | Path | None = None,
) -> Classifier:
    """The classifier that a checkpoint holds: frozen, in evaluation mode, fp32, on the CPU.

    `path` is a `.pt .pth .th .bin .ckpt .safetensors` file, or a folder with `config.json` and `model.safetensors`.
    `arch` names the architecture where it is not recognised (NAME, timm:NAME, file.py:factory,
    package.module:factory); with `match_by_order` tensors are matched by order and shape, whatever their names.
    `input_size` (channels, height, width), `mean`, `std` and `classes` (a file of class names) override the card.
    Raises `BadInput` for anything that cannot be used, saying what was found.
    """
    path = Path(path)
    stored = read(path)
    sidecar = read_json(_sidecar_path(path))
    stated = _checked(stored.card, str(path)) | _checked(sidecar, str(_sidecar_path(path)))
    given = {
        "architecture": arch,
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "class_names": _names(Path(classes)) if classes else None,
    }
    given = _checked(given, "the command line")
    if stored.quantization is not None:
        fit = _fit_of_packed(arch, stated | given, stored, path)
    elif match_by_order:
        fit = _fit_by_order(arch, stored.tensors, path)
    elif arch:
        fit = _fit_of(named(arch), stored.tensors, path)
    elif "architecture" in stated:
        fit = _fit_of_stated(stated["architecture"], stored.tensors, path)
    else:
        fit = recognise(stored.tensors, str(path))
    card = _card(fit, stated, given)
    network = _packed(fit, stored) if stored.quantization is not None else _with_weights(fit)
    require_variances(network, str(path))
    classifier = Classifier(network, card, name=_name(path), sha256=sha256(path), path=path).frozen()
    if why := why_not_run(classifier):
        raise BadInput(f"{path}: {why}.", "Give another --input-size or --arch.")
    plain_batchnorms(classifier)
    return classifier


def as_classifier(checkpoint: str | Path | Classifier) -> Classifier:
    """The checkpoint loaded, or the classifier as it is."""
    return checkpoint if isinstance(checkpoint, Classifier) else load(checkpoint)


def save(classifier: Classifier, folder: Path) -> None:
    """Write `model.safetensors` (packed, where the network is quantized) and `config.json` in timm's layout.

    The card is in both, so that either alone tells what one must know.
    """
    content, config = _files(classifier)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / WEIGHTS) as temporary:
        temporary.write_bytes(content)
    write_json(folder / CONFIG, config)


def saved_bytes(classifier: Classifier) -> int:
    """How large the `model.safetensors` is that `save` writes."""
    return len(_files(classifier)[0])


def _files(classifier: Classifier) -> tuple[bytes, dict[str, Any]]:
    """The contents of `model.safetensors` and of `config.json`."""
    card = classifier.card.to_json()
    metadata = {"format": "pt", CARD_KEY: json.dumps(card)}
    config: dict[str, Any] = {
        "architecture": classifier.card.architecture,
        "num_classes": classifier.card.classes,
        "pretrained_cfg": {
            "input_size": card["input_size"],
            "mean": card["mean"],
            "std": card["std"],
            "label_names": card["class_names"],
        },
    }
    if is_quantized(classifier.network):
        tensors, quantization = packing.pack_network(classifier.network)
        metadata[QUANTIZATION_KEY] = json.dumps(quantization, separators=(",", ":"))
        config["quantization"] = quantization
    else:
        # clone: safetensors refuses tensors that share memory
        state = classifier.network.state_dict().items()
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state}
    return serialised(tensors, metadata), config


def write_sidecar(classifier: Classifier) -> Path:
    """Write the card beside the checkpoint, to be corrected and kept; it is read from there."""
    if classifier.path is None:
        raise BadInput(f"{classifier.name} is no file that a card could stand beside.", "Save it first.")
    path = _sidecar_path(classifier.path)
    write_json(path, classifier.card.to_json())
    return path


def state_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers in fp32, without BatchNorm's counters."""
    tensors = network.state_dict().items()
    return sum(4 * tensor.numel() for name, tensor in tensors if not name.endswith(COUNTERS))


def _fit_of(architecture: Architecture, tensors: Mapping[str, Tensor], path: Path) -> Recognised:
    fit = fit_to(architecture, tensors)
    if fit is None:
        raise BadInput(
            f"{path} is not {architecture.name}: {describe(architecture, tensors)}.",
            "Leave --arch out to have it recognised, or add --match-by-order where only the names differ.",
        )
    return fit


def _fit_of_stated(name: str, tensors: Mapping[str, Tensor], path: Path) -> Recognised:
    """The architecture that a file states: ours by name, else timm's, else the one its tensors tell; never code."""
    _refuse_code(name, None, path)
    if name.startswith(HALF):
        return _fit_of(named(name), tensors, path)
    if name in architectures() and (fit := fit_to(architectures()[name], tensors)):
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


def _fit_by_order(arch: str | None, tensors: Mapping[str, Tensor], path: Path) -> Recognised:
    if arch is None:
        raise BadInput("--match-by-order needs --arch.", "Name the architecture whose order the weights have.")
    if weights_file(path).suffix == ".safetensors":
        raise BadInput(f"{path}: safetensors sorts its tensors by name.", "Their order is lost; match them by name.")
    architecture = named(arch)
    weights = [tensor for tensor in tensors.values() if tensor.dim() >= 2]
    stem = next((weight for weight in weights if weight.dim() == 4), None)
    classes = weights[-1].shape[0] if weights else 0
    channels = architecture.channels if stem is None else stem.shape[1]
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


def _fit_of_packed(arch: str | None, card: Mapping[str, Any], stored: StoredModel, path: Path) -> Recognised:
    """A quantized result: packed tensors have no shapes to recognise, so its own card says what it is."""
    if not {"architecture", "classes", "input_size", "mean", "std"} <= card.keys():
        raise BadInput(f"{path} is packed but has no model card.", "Make it again with `dfcompress quantize`.")
    classes = card["classes"]
    # Before a network of that many classes takes memory: its last layer has one scale or bias for each.
    if classes not in {tensor.numel() for tensor in stored.tensors.values() if tensor.dim() == 1}:
        raise BadInput(f"{path} states {classes} classes, which no tensor has.", "The file is damaged; make it again.")
    name = card["architecture"]
    _refuse_code(name, arch, path)
    if name != arch and name not in architectures() and not name.startswith(("timm:", HALF)):
        raise BadInput(f"{path} states the architecture {name!r}, which is not known.", "Update dfcompress.")
    architecture = named(name)
    return Recognised(architecture, architecture.namings[0], classes, card["input_size"][0], {})


def _refuse_code(stated: str, arch: str | None, path: Path) -> None:
    """Raise `BadInput` where a file states an architecture that is code, and the user did not name the same."""
    if runs_code(stated) and stated != arch:
        raise BadInput(
            f"{path} was made with --arch {stated}.", "Give the same --arch again: code runs only when you name it."
        )


def _packed(fit: Recognised, stored: StoredModel) -> nn.Module:
    network = fit.architecture.make(fit.classes, fit.channels)
    packing.unpack_network(network, stored.tensors, stored.quantization)
    return network


def _with_weights(fit: Recognised) -> nn.Module:
    """The network around the file's tensors; recognition has compared every name and shape."""
    network = fit.architecture.make_empty(fit.classes, fit.channels)
    counters = {name: value for name, value in network.state_dict().items() if name.endswith(COUNTERS)}
    network.load_state_dict({**counters, **fit.tensors}, assign=True)
    return network


def _card(fit: Recognised, stated: Mapping[str, Any], given: Mapping[str, Any]) -> ModelCard:
    """What is given, over what the file or its sidecar states, over what its naming implies, over what is usual."""
    implied = {"mean": fit.naming.mean, "std": fit.naming.std} if fit.naming.mean else {}
    layers: list[tuple[Origin, Mapping[str, Any]]] = [
        ("assumed", _usual(fit)),
        ("recognised", {"architecture": fit.architecture.name, "classes": fit.classes, **implied}),
        ("read", {name: value for name, value in stated.items() if name != "classes"}),
        ("given", given),
    ]
    values: dict[str, Any] = {"class_names": None}
    origin: dict[str, Origin] = {}
    for how, layer in layers:
        values |= layer
        origin |= dict.fromkeys(layer, how)
    # A file may state a name that only its tensors made clear: timm's, or one of a later version.
    values["architecture"] = fit.architecture.name
    _check_fits(values, fit)
    return ModelCard.from_json({**values, "origin": origin})


def _usual(fit: Recognised) -> dict[str, Any]:
    architecture, channels = fit.architecture, fit.channels
    mean, std = (0.5,) * channels, (0.5,) * channels
    if channels == 1:
        mean, std = MNIST_MEAN, MNIST_STD
    elif channels == 3 and architecture.mean and architecture.std:
        mean, std = architecture.mean, architecture.std
    elif channels == 3:
        small = architecture.size is not None and architecture.size <= SMALL_INPUT
        mean, std = (CIFAR_MEAN, CIFAR_STD) if small else (IMAGENET_MEAN, IMAGENET_STD)
    size = {} if architecture.size is None else {"input_size": (channels, architecture.size, architecture.size)}
    return {"mean": mean, "std": std, **size}


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a card that are there, of the right kind; raises `BadInput` naming the one that is not."""
    kinds = {
        "architecture": (lambda value: isinstance(value, str), "a name"),
        "classes": (_is_size, "a positive integer"),
        "input_size": (lambda value: len(value) == 3 and all(map(_is_size, value)), "3 positive integers, CxHxW"),
        "mean": (lambda value: all(_is_number(each) and 0 <= each <= 1 for each in value), "one share of 1 a channel"),
        "std": (lambda value: all(_is_number(each) and 0 < each <= 1 for each in value), "one share of 1 a channel"),
        "class_names": (lambda value: all(isinstance(name, str) for name in value), "a list of names"),
    }
    checked = {}
    for name, (is_right, wanted) in kinds.items():
        value = values.get(name)
        if value is None:
            continue
        scalar = name in ("architecture", "classes")
        if (not scalar and not isinstance(value, (list, tuple))) or not is_right(value):
            raise BadInput(f"{where}: {name} is {value!r}.", f"It must be {wanted}.")
        checked[name] = value if scalar else tuple(value)
    return checked


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_fits(card: Mapping[str, Any], fit: Recognised) -> None:
    if "input_size" not in card:
        raise BadInput(f"The input size of {fit.architecture.name} is not known.", "Add --input-size CxHxW.")
    if card["input_size"][0] != fit.channels and not fit.architecture.foreign:
        raise BadInput(
            f"The input size {card['input_size']} does not fit weights of {fit.channels} channels.", "Correct it."
        )
    for name in ("mean", "std"):
        if len(card[name]) != card["input_size"][0]:
            raise BadInput(
                f"{name} has {len(card[name])} values for {card['input_size'][0]} channels.", f"Correct --{name}."
            )
    names = card["class_names"]
    if names and len(names) != fit.classes:
        raise BadInput(f"There are {len(names)} class names for {fit.classes} classes.", "Give one name a class.")


def _names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--class-names {path} cannot be read: {error}.", "Name a text file with one class a line."
        ) from None


def _sidecar_path(path: Path) -> Path:
    return path / f"model{SIDECAR}" if path.is_dir() else path.with_name(path.stem + SIDECAR)


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem
