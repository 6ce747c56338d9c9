"""A file or folder ↔ a `Classifier`. Files come from strangers: nothing in them is ever executed.

load("resnet20.th")                                     # the architecture is recognised
load("net.pt", arch="net.py:make", input_size=(1, 28, 28))
save(classifier, Path("result"))                        # model.safetensors + config.json, timm's layout
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models import packing
from dfcompress.models.architectures import Architecture, find, named, tensors_of
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
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.recognition import Recognised, describe, fit_to, recognise
from dfcompress.run import write_atomically, write_json

WEIGHTS, CONFIG, SIDECAR = "model.safetensors", "config.json", ".card.json"
NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
COUNTERS = ("num_batches_tracked", "n_averaged")
TRUSTED = (
    "torch.nn.modules.",
    "torchvision.models.",
    "torchvision.ops.",
    "timm.models.",
    "timm.layers.",
    "dfcompress.models.",
)


@dataclass(frozen=True)
class StoredModel:
    """What a file holds: tensors by name, and what it states about itself."""

    tensors: dict[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)
    quantization: object = None


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
    """The classifier that a checkpoint holds: in evaluation mode, fp32, on the CPU.

    `path` is a `.pt .pth .th .bin .ckpt .safetensors` file, or a folder with `config.json` and `model.safetensors`.
    `arch` names the architecture where it is not recognised (NAME, timm:NAME, file.py:factory,
    package.module:factory); with `match_by_order` tensors are matched by order and shape, whatever their names.
    `input_size` (channels, height, width), `mean`, `std` and `classes` (a file of class names) override the card.
    Raises `BadInput` for anything that cannot be used, saying what was found.
    """
    path = Path(path)
    stored = read(path)
    spec = arch or stored.card.get("architecture")
    if stored.quantization is not None:
        return _packed(path, stored, _given(input_size, mean, std, classes))
    if match_by_order:
        if arch is None:
            raise BadInput("--match-by-order needs --arch.", "Name the architecture whose order the weights have.")
        fit = _matched_by_order(named(arch), stored.tensors, path)
    elif spec:
        fit = _fitted(named(spec) if arch else _stated(spec), stored.tensors, path)
    else:
        fit = recognise(stored.tensors, str(path))
    card = _card(fit, stored.card, _sidecar(path), _given(input_size, mean, std, classes), recognised=not spec)
    network = fit.architecture.make(fit.classes, fit.channels)
    network.load_state_dict({**_counters(network), **fit.tensors})
    return Classifier(network, card, name=_name(path), sha256=sha256(path), path=path).frozen()


def as_classifier(checkpoint: str | Path | Classifier) -> Classifier:
    """The checkpoint loaded, or the classifier as it is."""
    return checkpoint if isinstance(checkpoint, Classifier) else load(checkpoint)


def save(classifier: Classifier, folder: Path) -> None:
    """Write `model.safetensors` (packed, where the network is quantized) and `config.json` in timm's layout.

    The card is in both, so that either alone tells what one must know.
    """
    card = classifier.card.to_json()
    metadata = {"format": "pt", "dfcompress": json.dumps(card)}
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
        metadata["quantization"] = json.dumps(quantization, separators=(",", ":"))
        config["quantization"] = quantization
    else:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    write_json(folder / CONFIG, config)


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


def file_bytes(path: Path) -> int:
    """Size of a checkpoint's weights file."""
    return _weights_file(path).stat().st_size


def sha256(path: Path) -> str:
    """Hash of a checkpoint's weights file."""
    digest = hashlib.sha256()
    with _weights_file(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(path: Path) -> StoredModel:
    """The tensors of a checkpoint, in fp32, without wrappers' prefixes and BatchNorm's counters.

    Raises `BadInput` for missing, damaged, hostile and empty files, and for weights that are not finite.
    """
    file = _weights_file(path)
    stored = _read_safetensors(file) if _is_safetensors(file) else StoredModel(_read_torch(file))
    if path.is_dir():
        stored = _with_config(stored, path / CONFIG)
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in _without_prefixes(stored.tensors).items()
        if not name.endswith(COUNTERS)
    }
    if not tensors:
        raise BadInput(f"{path} holds no tensors.", "Name a checkpoint with weights.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} holds NaN or infinity.", "Its training diverged; use another checkpoint.")
    return replace(stored, tensors=tensors)


# --- files


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        for name in (WEIGHTS, "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
        raise BadInput(f"{path} is a folder without {WEIGHTS}.", "Name a checkpoint file, or a folder that has one.")
    if not path.exists():
        raise BadInput(f"{path} does not exist.", "Name a checkpoint file.")
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty.", "Download it again.")
    return path


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{")


def _read_safetensors(path: Path) -> StoredModel:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118: no mapping
        card = json.loads(metadata.get("dfcompress", "{}"))
        quantization = json.loads(metadata["quantization"]) if "quantization" in metadata else None
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{path} is damaged: {error}.", "Download it again.") from None
    return StoredModel(tensors, card, quantization)


def _read_torch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK":
        _refuse_torchscript(path)
    elif head[:1] != b"\x80":
        raise BadInput(f"{path} is no checkpoint: it begins with {head!r}.", "Name a PyTorch or safetensors file.")
    found = _state_dict(_unpickled(path))
    if found is None:
        raise BadInput(
            f"{path} holds no state dict.", f"Weights are looked for at the top and under {', '.join(NESTED)}."
        )
    return found


def _refuse_torchscript(path: Path) -> None:
    try:
        names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path} is cut short or damaged: {error}.", "Download it again.") from None
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in names):
        raise BadInput(
            f"{path} is a TorchScript archive, which is a program.", "Save the model's state_dict() instead."
        )


def _unpickled(path: Path) -> object:
    """What `torch.load(weights_only=True)` reads, allowing classes of the short list `TRUSTED` one after the other."""
    allowed: list[type] = []
    while True:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            if name is None:
                raise BadInput(f"{path} is damaged or no checkpoint.", "Download it again.") from None
            wanted = _trusted_class(name[1])
            if wanted is None or wanted in allowed:
                raise BadInput(
                    f"{path} is a pickled program: it asks for {name[1]}. Nothing of it was executed.",
                    "Ask its author for the state_dict(), or for safetensors.",
                ) from None
            allowed.append(wanted)
        except (
            EOFError,
            RuntimeError,
            OSError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            TypeError,
            struct.error,
        ):
            raise BadInput(f"{path} is cut short or damaged.", "Download it again.") from None


def _trusted_class(name: str) -> type | None:
    module, _, attribute = name.rpartition(".")
    if name == "argparse.Namespace":
        return importlib.import_module("argparse").Namespace
    if not f"{module}.".startswith(TRUSTED):
        return None
    found = getattr(importlib.import_module(module), attribute, None) if importlib.util.find_spec(module) else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _state_dict(value: object) -> dict[str, Tensor] | None:
    """The tensors in what a file holds: at the top, in a module (only its state is used), or under the usual keys."""
    if isinstance(value, nn.Module):
        return dict(value.state_dict())
    if not isinstance(value, Mapping):
        return None
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    if any(tensor.dim() > 1 for tensor in tensors.values()):
        return tensors
    for key in (*NESTED, *AVERAGED):
        if key in value and (found := _state_dict(value[key])) is not None:
            return found
    return None


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        inner = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTERS)}
        if inner and all(name.startswith(prefix) for name in inner):
            return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in inner.items()})
    return tensors


def _with_config(stored: StoredModel, path: Path) -> StoredModel:
    """The card of a timm or Hugging Face folder, under what the weights file states itself."""
    config = _read_json(path)
    pretrained = config.get("pretrained_cfg", {})
    stated = {
        "architecture": config.get("architecture"),
        "input_size": pretrained.get("input_size"),
        "mean": pretrained.get("mean"),
        "std": pretrained.get("std"),
        "class_names": pretrained.get("label_names") or config.get("label_names"),
    }
    return replace(stored, card={**{name: value for name, value in stated.items() if value}, **stored.card})


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not JSON: {error}.", "Correct or remove it.") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds no JSON object.", "Correct or remove it.")
    return values


# --- architecture


def _stated(name: str) -> Architecture:
    """The architecture that a file states: ours by name, else timm's; never code."""
    if ":" in name and not name.startswith("timm:"):
        raise BadInput(
            f"This model was made with --arch {name}.", "Give the same --arch again: code runs only when named."
        )
    try:
        return named(name)
    except BadInput:
        return named(f"timm:{name}")


def _fitted(architecture: Architecture, tensors: Mapping[str, Tensor], path: Path) -> Recognised:
    fit = fit_to(architecture, tensors)
    if fit is None:
        raise BadInput(
            f"{path} is not {architecture.name}: {describe(architecture, tensors)}.",
            "Leave --arch out to have it recognised, or add --match-by-order where only the names differ.",
        )
    return fit


def _matched_by_order(architecture: Architecture, tensors: Mapping[str, Tensor], path: Path) -> Recognised:
    classes, channels = _guess(architecture, tensors)
    expected = tensors_of(architecture, classes, channels)
    given = list(tensors.values())
    if len(given) != len(expected):
        raise BadInput(
            f"{path} has {len(given)} tensors, {architecture.name} {len(expected)}.", "They do not match by order."
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
    naming = architecture.namings[0]
    return Recognised(architecture, naming, classes, channels, dict(zip(expected, given, strict=True)))


def _guess(architecture: Architecture, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    weights = [tensor for tensor in tensors.values() if tensor.dim() >= 2]
    stem = next((weight for weight in weights if weight.dim() == 4), None)
    return weights[-1].shape[0], architecture.channels if stem is None else stem.shape[1]


def _packed(path: Path, stored: StoredModel, given: Mapping[str, Any]) -> Classifier:
    """A quantized result: packed tensors have no shapes to recognise, so its own card says what it is."""
    try:
        card = ModelCard.from_json(stored.card)
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"{path} is packed but has no model card.", "Make it again with `dfcompress quantize`."
        ) from None
    network = find(card.architecture).make(card.classes, card.input_size[0])
    packing.unpack_network(network, stored.tensors, stored.quantization)
    card = replace(card, **given, origin={**card.origin, **dict.fromkeys(given, "given")})
    return Classifier(network, card, name=_name(path), sha256=sha256(path), path=path).frozen()


def _counters(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict().items() if name.endswith(COUNTERS)}


# --- card


def _card(
    fit: Recognised,
    stated: Mapping[str, Any],
    sidecar: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    recognised: bool,
) -> ModelCard:
    """What is given, over what stands beside the file, over what it states, over what its naming implies, over the usual."""
    mean, std = _usual_normalisation(fit)
    size = fit.architecture.size
    assumed = {"input_size": (fit.channels, size, size), "mean": mean, "std": std, "class_names": None}
    implied = {"mean": fit.naming.mean, "std": fit.naming.std} if fit.naming.mean else {}
    layers: list[tuple[Origin, Mapping[str, Any]]] = [
        ("assumed", assumed),
        ("recognised", implied),
        ("read", {name: stated[name] for name in assumed if stated.get(name)}),
        ("read", {name: sidecar[name] for name in assumed if sidecar.get(name)}),
        ("given", given),
    ]
    values: dict[str, Any] = {}
    origin: dict[str, Origin] = {"architecture": "recognised" if recognised else "given", "classes": "recognised"}
    for how, layer in layers:
        values |= layer
        origin |= dict.fromkeys(layer, how)
    card = {**values, "architecture": fit.architecture.name, "classes": fit.classes, "origin": origin}
    _check_card(card, fit)
    return ModelCard.from_json(card)


def _usual_normalisation(fit: Recognised) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if fit.channels == 1:
        return MNIST_MEAN, MNIST_STD
    if fit.channels != 3:
        return (0.5,) * fit.channels, (0.5,) * fit.channels
    return (CIFAR_MEAN, CIFAR_STD) if fit.architecture.size <= 64 else (IMAGENET_MEAN, IMAGENET_STD)


def _check_card(card: Mapping[str, Any], fit: Recognised) -> None:
    channels = fit.channels
    if len(card["input_size"]) != 3 or card["input_size"][0] != channels:
        raise BadInput(
            f"The input size {card['input_size']} does not fit weights of {channels} channels.", "Use CxHxW."
        )
    for name in ("mean", "std"):
        if len(card[name]) != channels:
            raise BadInput(
                f"{name} has {len(card[name])} values, the weights have {channels} channels.", "Give one each."
            )
    if min(card["std"]) <= 0:
        raise BadInput(f"std {card['std']} is not positive.", "Give the standard deviation per channel.")
    names = card["class_names"]
    if names and len(names) != fit.classes:
        raise BadInput(f"There are {len(names)} class names for {fit.classes} classes.", "Give one name a line.")


def _given(
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    classes: str | Path | None,
) -> dict[str, Any]:
    values = {
        "input_size": tuple(input_size) if input_size else None,
        "mean": tuple(mean) if mean else None,
        "std": tuple(std) if std else None,
        "class_names": _names(Path(classes)) if classes else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--classes {path} cannot be read: {error}.", "Name a text file with one class a line."
        ) from None


def _sidecar_path(path: Path) -> Path:
    return path / f"model{SIDECAR}" if path.is_dir() else path.with_name(path.stem + SIDECAR)


def _sidecar(path: Path) -> dict[str, Any]:
    return _read_json(_sidecar_path(path))


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem
