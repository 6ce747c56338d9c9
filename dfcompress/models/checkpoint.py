"""A file or folder ↔ a `Classifier`.

load("resnet20.th")                                     # the architecture is recognised
load("net.pt", arch="net.py:make", input_size=(1, 28, 28))
save(classifier, Path("result"))                        # model.safetensors + config.json, timm's layout
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfcompress import console
from dfcompress.errors import BadInput, listed
from dfcompress.machine.process import usual_torch
from dfcompress.models import packing
from dfcompress.models.answers import require_exclusive, take_logits
from dfcompress.models.architecture import Architecture, tensors_of
from dfcompress.models.architectures import HALF, TORCHVISION, architectures, named, plain, runs_code
from dfcompress.models.batchnorms import plain_batchnorms
from dfcompress.models.card import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MNIST_MEAN,
    MNIST_STD,
    SMALL_INPUT,
    ModelCard,
    Origin,
)
from dfcompress.models.classifier import STEADY, Classifier, load_tensors, pass_once, why_not_run
from dfcompress.models.fake_quantizers import (
    dequantized,
    is_quantized,
    quantizable_layers,
    quantized_layers,
    tensor_grids,
)
from dfcompress.models.huggingface import TRANSFORMERS, card_of, is_of_transformers, take_rgb
from dfcompress.models.plain import make_plain
from dfcompress.models.recognition import MISSING, SHOWN, Recognised, differences, fit_to, recognise, why_in_part
from dfcompress.models.released import is_released, released
from dfcompress.models.resizing import REMEDY, resized
from dfcompress.models.safe_reading import (
    CARD_KEY,
    CONFIG,
    QUANTIZATION_KEY,
    WEIGHTS,
    StoredModel,
    read,
    read_json,
    serialised,
    sha256,
    weights_file,
    without_counters,
)
from dfcompress.models.statistics import require_variances
from dfcompress.models.tensor_grids import as_kernels_compute, quantize_tensors
from dfcompress.run import write_atomically, write_json

SIDECAR = ".card.json"


@usual_torch()
def load(
    path: str | Path,
    *,
    arch: str | None = None,
    match_by_order: bool = False,
    num_classes: int | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: str | Path | Sequence[str] | None = None,
) -> Classifier:
    """Load the classifier of a checkpoint: frozen, in evaluation mode, fp32, on the CPU; its network returns logits and
    has plain weights (see `take_logits` and `make_plain`).

    `path` is a `.pt .pth .th .bin .ckpt .safetensors` file, a folder with `config.json` and `model.safetensors`, or the
    name of released weights (`torchvision:resnet18`, `timm:resnet18.a1_in1k`).
    `arch` names the architecture if it is not recognised (NAME, timm:NAME, file.py:factory, package.module:factory);
    for a file whose card states `half:` of this architecture, the card's architecture is used. With `match_by_order`
    tensors are matched by order and shape, not by name.
    `num_classes` is passed to a factory that takes it. `input_size` (channels, height, width), `mean` and `std` (one
    value per channel, for pixels in [0, 1]) and `class_names` (the names, or a text file with one per line) override
    the card.
    Raises `BadInput`, with a description of what was found, if the checkpoint or an argument cannot be used.
    """
    path = _as_path(path)
    weights = released(str(path)) if is_released(path) else None
    path = weights.file if weights else path
    stored = read(path)
    of_transformers = arch is None and is_of_transformers(path)
    card = weights.stated if weights else card_of(path) if of_transformers else stored.card
    stated = _checked(card, str(path))
    if not weights:
        stated |= _checked(read_json(_sidecar_path(path)), str(_sidecar_path(path)))
    if arch and str(stated.get("architecture")).removeprefix(HALF) == arch:
        arch = stated["architecture"]  # The file holds a student with half the channels of `arch`.
    given = {
        "architecture": arch,
        "classes": num_classes,
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "class_names": class_names_in(Path(class_names)) if isinstance(class_names, str | Path) else class_names,
    }
    given = _checked(given, "given")
    if arch and arch != stated.get("architecture"):
        stated.pop("widths", None)  # They describe the layers of another network.
    fit = _fit(stored, path, stated, given, match_by_order=match_by_order)
    network = _packed(fit, stored) if stored.quantization is not None else _with_weights(fit)
    require_variances(network, str(path))
    described = _card(fit, stated, given)
    _say_assumed(described, fit.architecture, str(path))
    classifier = Classifier(
        make_plain(network),
        described,
        name=weights.name if weights else _name(path),
        sha256=sha256(path),
        path=None if weights else path,  # Nothing may be written into another library's cache.
    ).frozen()
    take_logits(classifier)
    if of_transformers:
        take_rgb(classifier, path)
    if unfit := why_not_run(classifier):
        raise BadInput(f"{path}: {unfit.why}.", unfit.remedy)
    _know_classes(classifier)
    plain_batchnorms(classifier)
    if packing.is_graph(stored.quantization):
        _unpack_graph(classifier, stored)
        require_variances(classifier.network, str(path))
    return classifier


def as_classifier(checkpoint: str | Path | Classifier) -> Classifier:
    """The classifier that `opened` returns; raises `BadInput` also if it lacks two or more exclusive classes."""
    classifier = opened(checkpoint)
    require_exclusive(classifier)
    return classifier


def opened(checkpoint: str | Path | Classifier) -> Classifier:
    """The loaded checkpoint, or a copy of the classifier on the CPU: frozen, with logits as output, plain weights and
    plain BatchNorms. The caller's own classifier is not changed.

    Raises `BadInput` for any other type, and for a checkpoint or classifier that cannot be used.
    """
    # A classifier that was loaded is prepared again, too: its network may have been changed since.
    return _settled(checkpoint) if isinstance(checkpoint, Classifier) else load(checkpoint)


def load_saved(folder: Path, classifier: Classifier) -> Classifier:
    """Load the result of `save(classifier, folder)`.

    The network is built from its architecture's name. A `Classifier` made in Python may have a network that no known
    name builds; the network is then a copy of the classifier's network with the saved values.
    """
    name = classifier.card.architecture
    if is_built_by_name(classifier):
        # The architecture is passed again so that the user's factory may run: the user named it for this run.
        return load(folder, arch=name if runs_code(name) else None)
    console.notice(
        f"{folder} holds {name}, which has no name that dfcompress knows: load it with --arch file.py:factory."
    )
    network, stored = dequantized(classifier.network), read(folder)
    card = ModelCard.from_json(stored.card)
    if card.widths != classifier.card.widths:
        resized(network, dict(card.widths or {}))
    if stored.quantization is None:
        load_tensors(network, stored.tensors)
    else:
        packing.unpack_network(network, stored.tensors, stored.quantization)
    settled = replace(classifier.card, widths=card.widths)
    return Classifier(network, settled, name=_name(folder), sha256=sha256(folder), path=folder).frozen()


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


def _settled(classifier: Classifier) -> Classifier:
    """A copy of a classifier made in Python, prepared as `load` prepares a checkpoint."""
    network = classifier.network
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise BadInput(
            f"{classifier.name} is or holds a TorchScript program, whose layers cannot be changed.",
            "Build the network in Python, and let it take the program's state_dict() with load_state_dict.",
        )
    settled = copy.deepcopy(classifier).to("cpu")
    make_plain(settled.network)
    take_logits(settled)
    if unfit := why_not_run(settled):
        remedy = unfit.remedy if unfit.remedy == STEADY else "Correct its ModelCard, or the network."
        raise BadInput(f"{classifier.name}: {unfit.why}.", remedy)
    _know_classes(settled)
    plain_batchnorms(settled)
    return settled.frozen()


def _know_classes(classifier: Classifier) -> None:
    """Put the number of classes on the card if it is unknown; raises `BadInput` if the class names differ in number."""
    if not classifier.card.classes:
        classifier.card = replace(classifier.card, classes=pass_once(classifier).shape[1])
    _check_names(classifier.card)


def _as_path(checkpoint: object) -> Path:
    """The path of a checkpoint; raises `BadInput` for any type that is neither a string nor a path."""
    if isinstance(checkpoint, str | Path):
        return Path(checkpoint)
    if isinstance(checkpoint, nn.Module):
        raise BadInput(
            f"A {type(checkpoint).__name__} does not say what images it takes.",
            "Give dfcompress.Classifier(module, dfcompress.ModelCard('my_net', classes=10, input_size=(3, 32, 32), "
            "mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))) with its own numbers.",
        )
    if isinstance(checkpoint, Mapping):
        raise BadInput(
            f"A {type(checkpoint).__name__} is not a checkpoint.",
            "Write it with torch.save(state_dict, 'net.pt') and give that path.",
        )
    raise BadInput(f"A {type(checkpoint).__name__} is not a checkpoint.", "Give a path or a dfcompress.Classifier.")


def save(classifier: Classifier, folder: Path) -> None:
    """Write `model.safetensors` (packed, where the network is quantized) and `config.json` in timm's layout.

    Both files hold the card, so that either file alone is sufficient to use the weights.
    """
    content, config = _files(classifier)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / WEIGHTS) as temporary:
        temporary.write_bytes(content)
    write_json(folder / CONFIG, config)


def saved_bytes(classifier: Classifier) -> int:
    """The size in bytes of the `model.safetensors` that `save` writes."""
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
    if classifier.card.widths:
        config["widths"] = card["widths"]
    if is_quantized(classifier.network):
        tensors, quantization = packing.pack_network(classifier.network)
        metadata[QUANTIZATION_KEY] = json.dumps(quantization, separators=(",", ":"))
        config["quantization"] = quantization
    else:
        # Clones, because safetensors refuses tensors that share memory.
        state = classifier.network.state_dict().items()
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state}
    return serialised(tensors, metadata), config


def write_sidecar(classifier: Classifier) -> Path:
    """Write the card to a file beside the checkpoint, where the user may correct it and `load` reads it; the path.

    Raises `BadInput` if the classifier was not loaded from a file of the user's.
    """
    if classifier.path is None:
        raise BadInput(
            f"{classifier.name} was not read from a file, so there is no place for its card.", "Save it first."
        )
    path = _sidecar_path(classifier.path)
    write_json(path, classifier.card.to_json())
    return path


def state_bytes(network: nn.Module) -> int:
    """The size in bytes of a network's parameters and buffers in fp32, without BatchNorm's counters."""
    return sum(4 * tensor.numel() for tensor in without_counters(network.state_dict()).values())


def _fit(
    stored: StoredModel, path: Path, stated: Mapping[str, Any], given: Mapping[str, Any], *, match_by_order: bool
) -> Recognised:
    """Match the tensors to the architecture that the user gave, else to the file's, else to the recognised one."""
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


def _is_sorted(path: Path) -> bool:
    """Whether a file stores its tensors sorted by name, so that their order carries no information."""
    return weights_file(path).suffix == ".safetensors"


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


def _refuse_code(stated: str, arch: str | None, path: Path) -> None:
    """Raise `BadInput` if a file states an architecture that is code and the user did not name the same one."""
    if runs_code(stated) and stated != arch:
        raise BadInput(
            f"{path} was made with --arch {stated}.",
            "Give the same --arch again, or arch = ... in dfcompress.toml: code runs only when you name it.",
        )


def _packed(fit: Recognised, stored: StoredModel) -> nn.Module:
    network = make_plain(fit.architecture.build(fit.classes, fit.channels))
    if not packing.is_graph(stored.quantization):
        packing.unpack_network(network, stored.tensors, stored.quantization)
    return network


def _unpack_graph(classifier: Classifier, stored: StoredModel) -> None:
    """Turn a new classifier into the saved one, whose graph has grids on all tensors."""
    layers = packing.layers_in(stored.quantization)
    as_kernels_compute(classifier)
    quantizable_layers(classifier.network, layers)
    quantize_tensors(classifier, layers)
    packing.unpack_network(classifier.network, stored.tensors, stored.quantization)
    classifier.frozen()


def _with_weights(fit: Recognised) -> nn.Module:
    """The network with the file's tensors as weights; recognition has compared every name and shape."""
    network = fit.architecture.make_empty(fit.classes, fit.channels)
    load_tensors(network, fit.tensors, assign=True)
    return network


def _card(fit: Recognised, stated: Mapping[str, Any], given: Mapping[str, Any]) -> ModelCard:
    """The card, from these sources in order of priority: arguments, file and sidecar, naming, defaults.

    `classes` is 0 for a network from a factory unless given: the width of its output is measured later.
    """
    foreign = fit.architecture.foreign
    size = given.get("input_size", stated.get("input_size"))
    channels = size[0] if foreign and size else fit.channels
    classes = 0 if foreign else fit.classes
    implied = {"mean": fit.naming.mean, "std": fit.naming.std} if fit.naming.mean else {}
    layers: list[tuple[Origin, Mapping[str, Any]]] = [
        ("assumed", _usual(fit.architecture, channels)),
        ("recognised", {"architecture": fit.architecture.name, "classes": classes, **implied}),
        ("read", {name: value for name, value in stated.items() if name != "classes"}),
        ("given", given),
    ]
    values: dict[str, Any] = {"class_names": None}
    origin: dict[str, Origin] = {}
    for how, layer in layers:
        values |= layer
        origin |= dict.fromkeys(layer, how)
    # The name that the file states may be timm's or a later version's; recognition has found ours.
    values["architecture"] = fit.architecture.name
    values["widths"] = dict(fit.architecture.widths) or None
    _check_fits(values, fit)
    return ModelCard.from_json({**values, "origin": origin})


def _say_assumed(card: ModelCard, architecture: Architecture, where: str) -> None:
    """Print which card values of a network for large images are assumed: the defaults of its architecture."""
    values = {
        "--mean": ("mean", ",".join(f"{value:g}" for value in card.mean)),
        "--std": ("std", ",".join(f"{value:g}" for value in card.std)),
        "--input-size": ("input_size", "x".join(map(str, card.input_size))),
    }
    assumed = {option: value for option, (name, value) in values.items() if card.origin.get(name) == "assumed"}
    if architecture.size is None or architecture.size <= SMALL_INPUT or not {"--mean", "--std"} & assumed.keys():
        return
    options = " ".join(f"{option} {value}" for option, value in assumed.items())
    console.notice(f"{where}: {options} assumed, as is usual for {architecture.name}; give what it was trained with.")


def _usual(architecture: Architecture, channels: int) -> dict[str, Any]:
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
    """The card fields present in `values`, validated; raises `BadInput` naming a field that is not valid."""
    listed = (list, tuple)
    kinds: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
        "architecture": (str, lambda value: True, "a name"),
        "classes": (int, _is_size, f"a whole number from 1 to {WIDEST:,}"),
        "input_size": (listed, lambda value: len(value) == 3 and all(map(_is_size, value)), SIZES),
        "mean": (listed, lambda value: all(_is_number(each) and 0 <= each <= 1 for each in value), SHARES),
        "std": (listed, lambda value: all(_is_number(each) and 0 < each <= 1 for each in value), SHARES),
        "class_names": (listed, lambda value: all(isinstance(name, str) for name in value), "a list of names"),
        "config": (dict, lambda value: isinstance(value.get("model_type"), str), "an object with a model_type"),
    }
    checked: dict[str, Any] = {}
    for name, (kind, is_right, form) in kinds.items():
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or not is_right(value):
            raise BadInput(f"{where}: {name} is {value!r}.", f"It must be {form}.")
        checked[name] = tuple(value) if isinstance(value, (list, tuple)) else value
    if values.get("widths") is not None:
        checked["widths"] = _widths(values["widths"], where)
    return checked


# Keeps the numbers of elements of tensors within 64 bits: 2^20 by 2^20 channels of 11x11 pixels.
WIDEST = 2**20
SIZES, SHARES = f"3 whole numbers from 1 to {WIDEST:,}, CxHxW", "one share of 1 a channel"
WIDTHS = f"the channels in and out of each layer, from 1 to {WIDEST:,}"


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= WIDEST


def _widths(values: object, where: str) -> dict[str, tuple[int, int]]:
    """The widths of a card; raises `BadInput` naming the layer whose widths are not valid."""
    if not isinstance(values, dict):
        raise BadInput(f"{where}: widths is {str(values)[:40]!r}.", f"It must be an object of {WIDTHS}.")
    for name, channels in values.items():
        is_pair = isinstance(channels, (list, tuple)) and len(channels) == 2
        if not is_pair or not all(map(_is_size, channels)):
            raise BadInput(f"{where}: the widths of {name!r} are {str(channels)[:40]}.", f"Give {WIDTHS}.")
    return {name: (c_in, c_out) for name, (c_in, c_out) in values.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_fits(card: Mapping[str, Any], fit: Recognised) -> None:
    if "input_size" not in card:
        raise BadInput(f"The input size of {fit.architecture.name} is not known.", "Add --input-size CxHxW.")
    if card["input_size"][0] != fit.channels and not fit.architecture.foreign:
        size = "x".join(map(str, (fit.channels, *card["input_size"][1:])))
        raise BadInput(
            f"The input size {card['input_size']} does not fit weights of {fit.channels} channels.",
            f"Use --input-size {size}.",
        )
    for name in ("mean", "std"):
        if len(card[name]) != card["input_size"][0]:
            raise BadInput(
                f"{name} has {len(card[name])} values for {card['input_size'][0]} channels.", f"Correct --{name}."
            )


def _check_names(card: ModelCard) -> None:
    if card.class_names and len(card.class_names) != card.classes:
        raise BadInput(
            f"There are {len(card.class_names)} class names for {card.classes} classes.", "Give one name a class."
        )


def class_names_in(path: Path) -> tuple[str, ...]:
    """The non-empty lines of a text file, stripped; raises `BadInput` if the file cannot be read."""
    try:
        return tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--class-names {path} cannot be read: {getattr(error, 'strerror', error)}.",
            "Name a text file with one class a line.",
        ) from None


def _sidecar_path(path: Path) -> Path:
    return path / f"model{SIDECAR}" if path.is_dir() else path.with_name(path.stem + SIDECAR)


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem
