"""Tensors out of files that come from strangers: nothing in a file is ever executed.

A `.safetensors` file holds no code. A pickled one goes through `torch.load(weights_only=True)`, which calls only what
it is allowed to; a pickled module is taken apart as data, and none of its methods runs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.util
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dfcompress.errors import BadInput

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CARD_KEY, QUANTIZATION_KEY = "dfcompress", "quantization"

NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")
COUNTERS = ("num_batches_tracked", "n_averaged")

MODULES = ("torch.nn.modules.", "torchvision.models.", "torchvision.ops.", "timm.models.", "timm.layers.")
OUR_MODULES = "dfcompress.models."
# What modules and training scripts keep beside their tensors; none of it calls anything when it is unpickled.
PLAIN: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": argparse.Namespace,
    "functools.partial": functools.partial,
}


@dataclass(frozen=True)
class StoredModel:
    """What a file holds: tensors by name, what it states about itself, and how it is quantized, if it is."""

    tensors: dict[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)
    quantization: object = None


def read(path: Path) -> StoredModel:
    """The tensors of a checkpoint, floats in fp32, without BatchNorm's counters.

    Raises `BadInput` for missing, damaged, hostile and empty files, and for weights that are not finite.
    """
    file = weights_file(path)
    stored = _read_safetensors(file) if _is_safetensors(file) else StoredModel(_read_torch(file))
    if path.is_dir():
        stored = _with_config(stored, path / CONFIG)
    kept = {name: tensor for name, tensor in stored.tensors.items() if not name.endswith(COUNTERS)}
    if not kept:
        raise BadInput(f"{path} holds no tensors.", "Name a checkpoint with weights.")
    return replace(stored, tensors={name: _usable(tensor, name, path) for name, tensor in kept.items()})


def weights_file(path: Path) -> Path:
    """The file that holds the weights of a checkpoint, which may be a folder."""
    if path.is_dir():
        for name in (WEIGHTS, "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
        raise BadInput(f"{path} is a folder without {WEIGHTS}.", "Name a checkpoint file, or a folder that has one.")
    if not path.exists():
        raise BadInput(f"{path} does not exist.", "Name a checkpoint file.")
    if not path.is_file():
        raise BadInput(f"{path} is no file.", "Name a checkpoint file.")
    return path


def file_bytes(path: Path) -> int:
    """Size of a checkpoint's weights file."""
    return weights_file(path).stat().st_size


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone: the library writes metadata in any order."""
    content = save(dict(tensors), dict(metadata))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # Tensors begin at a multiple of 8 bytes.
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def sha256(path: Path) -> str:
    """Hash of a checkpoint's weights file."""
    with weights_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is none; raises `BadInput` where it holds anything else."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # a wrong encoding is one too
        raise BadInput(f"{path} is not JSON: {error}.", "Correct or remove it.") from None
    return _object(values, path)


def _object(values: object, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a JSON object was expected, it holds {str(values)[:40]!r}.", "Correct or remove it.")
    return values


def _usable(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise BadInput(f"{path}: {name} is {tensor.layout} {tensor.dtype}.", "Save it with plain float tensors.")
    if not tensor.is_floating_point():
        return tensor
    if not tensor.isfinite().all():
        raise BadInput(f"{path}: {name} holds NaN or infinity.", "Its training diverged; use another checkpoint.")
    # A copy: tensors of one file may share memory, and training in place would write through all of them.
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _is_safetensors(path: Path) -> bool:
    head = _head(path, 9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{")


def _head(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    if not head:
        raise BadInput(f"{path} is empty.", "Download it again.")
    return head


def _read_safetensors(path: Path) -> StoredModel:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        card = _object(json.loads(metadata.get(CARD_KEY, "{}")), path)
        quantization = json.loads(metadata[QUANTIZATION_KEY]) if QUANTIZATION_KEY in metadata else None
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{path} is cut short or damaged: {error}.", "Download it again.") from None
    return StoredModel(tensors, card, quantization)


def _read_torch(path: Path) -> dict[str, Tensor]:
    head = _head(path, 40)
    if head.startswith(b"PK"):
        _require_torch_archive(path)
    elif not head.startswith(b"\x80"):
        raise BadInput(f"{path} is no checkpoint: it begins with {head!r}.", "Name a PyTorch or safetensors file.")
    found = _state_dict(_unpickled(path))
    if found is None:
        raise BadInput(f"{path} holds no state dict.", f"It is looked for at the top and under {', '.join(NESTED)}.")
    return found


def _require_torch_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path} is cut short or damaged: {error}.", "Download it again.") from None
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in names):
        raise BadInput(
            f"{path} is a TorchScript archive, which is a program.", "Save the model's state_dict() instead."
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise BadInput(f"{path} is a zip file that torch.save did not write.", "Name a PyTorch or safetensors file.")


def _unpickled(path: Path) -> object:
    """What `torch.load(weights_only=True)` reads, allowing what it asks for one by one where `_allowed` knows it."""
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    while True:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            if "persistent_load" in str(error):
                raise BadInput(
                    f"{path} is a pickled module of torch before 1.6, which carries source code.",
                    "Ask its author for the state_dict(), or for safetensors.",
                ) from None
            if name is None:
                raise BadInput(f"{path} is damaged or no checkpoint.", "Download it again.") from None
            wanted = _allowed(name[1])
            if wanted is None or wanted in allowed:
                found = _asked_for(path, name[1])
                raise BadInput(
                    f"{path} is a pickled program: it asks for {found}. Nothing of it was executed.",
                    "Ask its author for the state_dict(), or for safetensors.",
                ) from None
            allowed.append(wanted)
        except Exception as error:
            # Whatever a parser trips over in foreign bytes, the file is what is wrong.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BadInput(f"{path} is cut short or damaged: {reason}.", "Download it again.") from None


def _allowed(name: str) -> Callable[..., Any] | None:
    """The class or function of that name if it is on the short list: modules, what they keep, activations."""
    if name in PLAIN:
        return PLAIN[name]
    module, _, attribute = name.rpartition(".")
    if module == "torch.nn.functional":
        return getattr(nn.functional, attribute, None)
    if not f"{module}.".startswith((*MODULES, OUR_MODULES)) or not _exists(module):
        return None
    found = getattr(importlib.import_module(module), attribute, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that holds it
        return False


def _asked_for(path: Path, first: str) -> str:
    """Every class and function that is not allowed; of files older than the zip format, the first."""
    if not zipfile.is_zipfile(path):
        return first
    return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))


def _state_dict(value: object) -> dict[str, Tensor] | None:
    """The tensors in what a file holds: at the top, in a module, under the usual keys, or in the only inner mapping."""
    if isinstance(value, nn.Module):
        return _tensors_of_module(value)
    if not isinstance(value, Mapping):
        return None
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    if any(tensor.dim() > 1 for tensor in tensors.values()):
        return tensors
    for key in (*NESTED, *AVERAGED):
        if key in value and (found := _state_dict(value[key])) is not None:
            return found
    inner = [found for item in value.values() if (found := _state_dict(item)) is not None]
    return inner[0] if len(inner) == 1 else None


def _tensors_of_module(module: nn.Module) -> dict[str, Tensor]:
    """A stranger's module as data: `state_dict()` would call the hooks that it brought along."""
    tensors = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(module).get(kind, {}).items():
            if isinstance(tensor, Tensor):
                tensors[name] = tensor.detach()
    for name, child in vars(module).get("_modules", {}).items():
        if isinstance(child, nn.Module):
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in _tensors_of_module(child).items()}
    return tensors


def _with_config(stored: StoredModel, path: Path) -> StoredModel:
    """The card of a timm folder, under what the weights file states itself."""
    config = read_json(path)
    pretrained = _object(config.get("pretrained_cfg", {}), path)
    stated = {
        "architecture": config.get("architecture"),
        "input_size": pretrained.get("input_size"),
        "mean": pretrained.get("mean"),
        "std": pretrained.get("std"),
        "class_names": pretrained.get("label_names") or config.get("label_names"),
    }
    return replace(stored, card={**{name: value for name, value in stated.items() if value}, **stored.card})
