"""Read tensors from untrusted files: nothing in a file is ever executed.

A `.safetensors` file holds no code; a pickled one is read as data (`pickled.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dfcompress.errors import BadInput, printable
from dfcompress.models.pickled import AGAIN, read_pickled
from dfcompress.run import RUN_FILE, RunFile

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PICKLED_WEIGHTS, INDEX = "pytorch_model.bin", ".index.json"  # Hugging Face's names
CARD_KEY, QUANTIZATION_KEY = "dfcompress", "quantization"

# Counters of BatchNorms and of averaged models, which only training reads.
COUNTERS = ("num_batches_tracked", "n_averaged")


@dataclass(frozen=True)
class StoredModel:
    """The content of a checkpoint.

    `tensors` by name, the fields of the model `card` that it states, and its `quantization` settings as JSON values,
    None if it is not quantized.
    """

    tensors: dict[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)
    quantization: object = None


def read(path: Path) -> StoredModel:
    """The tensors of a checkpoint, floats in fp32, without counters, with the card and quantization that it states.

    Raises `BadInput` for missing, damaged, hostile and empty files, and for weights that are not finite.
    """
    stored = _read_files(weights_files(path), path)
    if path.is_dir():
        stored = _with_config(stored, path / CONFIG)
    tensors = without_counters(stored.tensors)
    if not tensors:
        raise BadInput(f"{path} holds no tensors.", "Name a checkpoint with weights.")
    return replace(stored, tensors={name: _usable(tensor, name, path) for name, tensor in tensors.items()})


def without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that evaluation needs, by name: all but BatchNorms' and averaged models' counters."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTERS)}


def weights_file(path: Path) -> Path:
    """The file with the weights of a checkpoint, which may be a folder; the first file if there are several."""
    return weights_files(path)[0]


def weights_files(path: Path) -> list[Path]:
    """The files with the weights of a checkpoint: several for a folder of shards as Hugging Face writes it, else one.

    Raises `BadInput` if there are none.
    """
    if path.is_dir():
        for name in (WEIGHTS, PICKLED_WEIGHTS):
            if (path / name).is_file():
                return [path / name]
        for name in (WEIGHTS, PICKLED_WEIGHTS):
            if (path / f"{name}{INDEX}").is_file():
                return _shards(path / f"{name}{INDEX}")
        if (path / RUN_FILE).is_file() and not RunFile.read(path).finished:
            raise BadInput(f"{path} holds a run that is not finished.", "Repeat its line with --resume first.")
        raise BadInput(f"{path} is a folder without {WEIGHTS}.", "Name a checkpoint file, or a folder that has one.")
    if not path.exists():
        raise BadInput(f"{path} does not exist.", "Name a checkpoint file.")
    if not path.is_file():
        raise BadInput(f"{path} is not a file.", "Name a checkpoint file.")
    return [path]


def file_bytes(path: Path) -> int:
    """The size in bytes of a checkpoint's weights files."""
    return sum(file.stat().st_size for file in weights_files(path))


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone; the library itself orders metadata arbitrarily."""
    content = save(dict(tensors), dict(metadata))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # Tensors begin at a multiple of 8 bytes.
    # A view: a slice would copy all tensors.
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]])


def sha256(path: Path) -> str:
    """The hash of a checkpoint's weights file, or of the bytes of all shards in the order of their names."""
    digest = hashlib.sha256()
    for part in weights_files(path):
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no file; raises `BadInput` if the file holds anything else."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # A wrong encoding is a ValueError, too.
        raise BadInput(f"{path} is not JSON: {error}.", "Correct or remove it.") from None
    return _object(values, path)


def _object(values: object, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a JSON object was expected, it holds {str(values)[:40]!r}.", "Correct or remove it.")
    return values


def _usable(tensor: Tensor, name: str, path: Path) -> Tensor:
    name = printable(name)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise BadInput(f"{path}: {name} is {tensor.layout} {tensor.dtype}.", "Save it with plain float tensors.")
    if not tensor.is_floating_point():
        return tensor
    # A copy: tensors of one file may share memory, and training in place would write through all of them.
    tensor = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not tensor.isfinite().all():
        raise BadInput(f"{path}: {name} holds NaN or infinity.", "Its training diverged; use another checkpoint.")
    return tensor


def _read_files(files: list[Path], path: Path) -> StoredModel:
    """One model from its files; raises `BadInput` if two files have a tensor of the same name."""
    parts = [_read_safetensors(file) if _is_safetensors(file) else StoredModel(_read_torch(file)) for file in files]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise BadInput(f"{path} holds {printable(twice[0])} in two shards.", AGAIN)
        tensors |= part.tensors
    return replace(parts[0], tensors=tensors)


def _shards(index: Path) -> list[Path]:
    """The shards that an index names; raises `BadInput` if one is missing or not in the index's folder."""
    names = _object(read_json(index).get("weight_map"), index).values()
    if not names:
        raise BadInput(f"{index} names no shards.", AGAIN)
    for name in names:
        # Names are checked, not link targets: Hugging Face's cache has links that lead out of the folder.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise BadInput(f"{index} names the shard {name!r}, but there is no such file beside it.", AGAIN)
        if not (index.parent / name).is_file():
            raise BadInput(f"{index} names the shard {name}, which is missing.", "Download it into the same folder.")
    return [index.parent / name for name in sorted(set(names))]


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
        raise BadInput(f"{path} is empty.", AGAIN)
    return head


def _read_safetensors(path: Path) -> StoredModel:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        card = _object(json.loads(metadata.get(CARD_KEY, "{}")), path)
        quantization = json.loads(metadata[QUANTIZATION_KEY]) if QUANTIZATION_KEY in metadata else None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is cut short or damaged: {error}.", AGAIN) from None
    return StoredModel(tensors, card, quantization)


def _read_torch(path: Path) -> dict[str, Tensor]:
    head = _head(path, 40)
    if path.suffix == ".onnx":
        raise BadInput(f"{path} is an ONNX file, which is written and not read.", "Name the model it was made from.")
    if path.suffix == ".pt2":
        raise BadInput(
            f"{path} is a program of torch.export, whose layers cannot be changed.",
            "Save the state_dict() of the network that it was exported from.",
        )
    if not head.startswith((b"PK", b"\x80")):
        readable = head.isascii() and head.decode()[0].isprintable()
        begins = repr(head.decode()) if readable else f"the bytes {head[:4].hex(' ')}"
        raise BadInput(f"{path} is not a checkpoint: it begins with {begins}.", "Name a PyTorch or safetensors file.")
    return read_pickled(path)


def _with_config(stored: StoredModel, path: Path) -> StoredModel:
    """Add the card of a timm folder; the card in the weights file takes precedence."""
    config = read_json(path)
    pretrained = _object(config.get("pretrained_cfg", {}), path)
    stated = {
        "architecture": config.get("architecture"),
        "input_size": pretrained.get("input_size"),
        "mean": pretrained.get("mean"),
        "std": pretrained.get("std"),
        "class_names": pretrained.get("label_names") or config.get("label_names"),
        "widths": config.get("widths"),
    }
    return replace(stored, card={**{name: value for name, value in stated.items() if value}, **stored.card})
