"""Load a checkpoint, a file or a folder, into a `Classifier`, and prepare one made in Python in the same way.

load("resnet20.th")                                     # the architecture is recognised
load("net.pt", arch="net.py:make", input_size=(1, 28, 28))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.machine.process import usual_torch
from dfcompress.models import packing
from dfcompress.models.answers import require_exclusive, take_logits
from dfcompress.models.architectures import HALF, runs_code
from dfcompress.models.batchnorms import plain_batchnorms
from dfcompress.models.card import ModelCard
from dfcompress.models.card_values import checked_values, class_names_in, composed_card, say_assumed
from dfcompress.models.classifier import STEADY, Classifier, load_tensors, pass_once, why_not_run
from dfcompress.models.fake_quantizers import dequantized, quantizable_layers
from dfcompress.models.fitting import fit_of_file, is_built_by_name
from dfcompress.models.huggingface import card_of, is_of_transformers, take_rgb
from dfcompress.models.plain import make_plain
from dfcompress.models.recognition import Recognised
from dfcompress.models.released import is_released, released
from dfcompress.models.resizing import resized
from dfcompress.models.safe_reading import StoredModel, read, read_json, sha256
from dfcompress.models.saving import sidecar_path
from dfcompress.models.statistics import require_variances
from dfcompress.models.tensor_grids import as_kernels_compute, quantize_tensors


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
    stated = checked_values(card, str(path))
    if not weights:
        stated |= checked_values(read_json(sidecar_path(path)), str(sidecar_path(path)))
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
    given = checked_values(given, "given")
    if arch and arch != stated.get("architecture"):
        stated.pop("widths", None)  # They describe the layers of another network.
    fit = fit_of_file(stored, path, stated, given, match_by_order=match_by_order)
    network = _packed(fit, stored) if stored.quantization is not None else _with_weights(fit)
    require_variances(network, str(path))
    described = composed_card(fit, stated, given)
    say_assumed(described, fit.architecture, str(path))
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


def _packed(fit: Recognised, stored: StoredModel) -> nn.Module:
    network = make_plain(fit.architecture.build(fit.classes, fit.channels))
    if not packing.is_graph(stored.quantization):
        packing.unpack_network(network, stored.tensors, stored.quantization)
    return network


def _with_weights(fit: Recognised) -> nn.Module:
    """The network with the file's tensors as weights; recognition has compared every name and shape."""
    network = fit.architecture.make_empty(fit.classes, fit.channels)
    load_tensors(network, fit.tensors, assign=True)
    return network


def _unpack_graph(classifier: Classifier, stored: StoredModel) -> None:
    """Turn a new classifier into the saved one, whose graph has grids on all tensors."""
    layers = packing.layers_in(stored.quantization)
    as_kernels_compute(classifier)
    quantizable_layers(classifier.network, layers)
    quantize_tensors(classifier, layers)
    packing.unpack_network(classifier.network, stored.tensors, stored.quantization)
    classifier.frozen()


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


def _check_names(card: ModelCard) -> None:
    if card.class_names and len(card.class_names) != card.classes:
        raise BadInput(
            f"There are {len(card.class_names)} class names for {card.classes} classes.", "Give one name a class."
        )


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem
