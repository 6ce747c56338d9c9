"""Write a `Classifier` to a folder, or its card to a file beside the checkpoint.

save(classifier, Path("result"))                        # model.safetensors + config.json, timm's layout
write_sidecar(classifier)                               # net.card.json beside net.pt
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models import packing
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.safe_reading import CARD_KEY, CONFIG, QUANTIZATION_KEY, WEIGHTS, serialised, without_counters
from dfcompress.run import write_atomically, write_json

SIDECAR = ".card.json"


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


def state_bytes(network: nn.Module) -> int:
    """The size in bytes of a network's parameters and buffers in fp32, without BatchNorm's counters."""
    return sum(4 * tensor.numel() for tensor in without_counters(network.state_dict()).values())


def write_sidecar(classifier: Classifier) -> Path:
    """Write the card to a file beside the checkpoint, where the user may correct it and `load` reads it; the path.

    Raises `BadInput` if the classifier was not loaded from a file of the user's.
    """
    if classifier.path is None:
        raise BadInput(
            f"{classifier.name} was not read from a file, so there is no place for its card.", "Save it first."
        )
    path = sidecar_path(classifier.path)
    write_json(path, classifier.card.to_json())
    return path


def sidecar_path(path: Path) -> Path:
    """The path of the file for the card, beside the file of a checkpoint or in its folder."""
    return path / f"model{SIDECAR}" if path.is_dir() else path.with_name(path.stem + SIDECAR)


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
