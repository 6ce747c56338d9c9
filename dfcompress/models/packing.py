"""A quantized network packed into few bytes, each integer at its true width, and unpacked again bit for bit.

For each quantized layer the file holds `<layer>.weight_packed` (uint8, see `pack_integers`) instead of
`<layer>.weight`. The scales of all layers (fp32, one per output channel) are concatenated in one tensor,
`quantization.scales`, because a safetensors file spends a hundred bytes on every tensor. So are the zero points (uint8,
one per output channel) of the layers with asymmetric weights: `quantization.zero_points`. Other tensors are unchanged.
Bits and input grids are plain JSON values in the file, whose numbers are exactly the fp32 values:

    {"version": 2, "layers": {"conv1": {"bits": "8w8a", "scale": 0.02, "zero_point": 117}, ...}}

`scale` and `zero_point` describe the input grid: both are absent if the activations stay in float, `zero_point` also
if it is 0. `"signed": true` marks a signed input grid. `"asymmetric": true` marks asymmetric weights and makes the file
version 3: programs that do not know zero points of weights can read only files of version 2.

If the network has grids on all tensors (`tensor_grids`), `"tensors": {"relu": {"scale": 0.02, "zero_point": 3}, ...}`
holds the grids by the operation whose output they quantize, and makes the file version 4. A layer that such a tensor
feeds has no scale and zero point of its own. BatchNorms are folded into the convolutions before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.classifier import load_tensors
from dfcompress.models.fake_quantizers import (
    FLOAT_BITS,
    QuantizedLayer,
    quantizable_layers,
    quantize_layers,
    quantized_layers,
    tensor_grids,
)
from dfcompress.models.grids import LARGEST_BITS, WIDTHS, InputGrid, WeightGrid, largest_integer
from dfcompress.models.safe_reading import without_counters

SYMMETRIC, ASYMMETRIC = 2, 3  # Versions of the file: without and with zero points of weights,
WITH_TENSORS = 4  # and with grids of tensors, too.
SCALES, ZERO_POINTS = "quantization.scales", "quantization.zero_points"

_BITS = re.compile(r"(\d{1,2})w(\d{1,2})a")
_USUAL: Mapping[str, Any] = {"scale": None, "zero_point": 0, "signed": False}
_FP32 = torch.finfo(torch.float32)
_Layout = dict[str, tuple[torch.dtype, list[int]]]


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Pack n integers into ceil(n · bits / 8) bytes (a uint8 tensor), for 1 to 8 bits.

    uint8 values must be in 0 .. 2^bits − 1, values of other types in −2^(bits − 1) .. 2^(bits − 1) − 1.
    Two's complement; value i takes `bits` bits of the stream from bit i · bits on, lowest bit first: at 4 bits this is
    the layout of ONNX's INT4 and UINT4.
    Raises `ValueError` if a value does not fit.
    """
    low = 0 if values.dtype == torch.uint8 else -(2 ** (bits - 1))
    high = low + 2**bits - 1
    if values.numel() and not (low <= values.min() and values.max() <= high):
        raise ValueError(f"values of {values.min()} to {values.max()} do not fit {bits} bits")
    integers = values.flatten().cpu().numpy().astype(np.uint8)
    if 8 % bits == 0:
        count = 8 // bits  # Values in a byte.
        padded = np.pad(integers & (2**bits - 1), (0, -len(integers) % count))
        return torch.from_numpy(np.bitwise_or.reduce([padded[i::count] << (bits * i) for i in range(count)]))
    stream = np.unpackbits(integers[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack_integers(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool = True) -> Tensor:
    """The integers of this `shape` that `pack_integers` packed; int8 if `signed`, else uint8.

    Raises `ValueError` if `packed` does not have the number of bytes that `shape` needs.
    """
    count = prod(shape)
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.numel()}")
    # The value's bits go to the top of a byte; the shift down then extends the sign of an int8.
    if 8 % bits == 0:  # The same as below, 3 (4 bits) to 36 times (8 bits) as fast, and without a byte for every bit.
        at_top = (packed.cpu().numpy()[:, None] << np.arange(8 - bits, -1, -bits, dtype=np.uint8)).reshape(-1)[:count]
    else:
        stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
        at_top = np.packbits(stream[:, ::-1], axis=1).reshape(count)
    return torch.from_numpy(at_top.view(np.int8 if signed else np.uint8) >> (8 - bits)).reshape(shape)


def packed_bytes(count: int, bits: int) -> int:
    """The number of bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def pack_network(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (contiguous, on the CPU) and the JSON values from which `unpack_network` makes the same network.

    `network` is quantized. Raises `ValueError` if it is not calibrated and frozen.
    """
    layers = quantized_layers(network)
    tensors, grids = without_counters(network.state_dict()), []
    for name, layer in layers.items():
        integers, grid = layer.integer_weight()
        del tensors[f"{name}.weight"]
        tensors[f"{name}.weight_packed"] = pack_integers(integers, grid.bits)
        grids.append(grid)
    tensors[SCALES] = torch.cat([grid.scale for grid in grids])
    zero_points = [grid.zero_point for grid in grids if not grid.symmetric]
    if zero_points:
        tensors[ZERO_POINTS] = torch.cat(zero_points).to(torch.uint8)
    # Clones, because safetensors refuses tensors that share memory.
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    grids_of_tensors = tensor_grids(network)
    fed = {name for grid in grids_of_tensors.values() for name in grid.feeds}
    described = {name: _described(name, layer, fed=name in fed) for name, layer in layers.items()}
    if grids_of_tensors:
        by_tensor = {
            name: _described_grid(f"tensor {name}", each.input_grid) for name, each in grids_of_tensors.items()
        }
        return stored, {"version": WITH_TENSORS, "layers": described, "tensors": by_tensor}
    return stored, {"version": ASYMMETRIC if zero_points else SYMMETRIC, "layers": described}


def _described(name: str, layer: QuantizedLayer, *, fed: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"bits": f"{layer.weight_bits}w{layer.input_bits}a"}
    if not layer.weight_grid.symmetric:
        values["asymmetric"] = True
    if layer.input_bits == FLOAT_BITS or fed:
        return values
    return values | _described_grid(f"layer {name}", layer.input_grid)


def _described_grid(of: str, grid: InputGrid | None) -> dict[str, Any]:
    if grid is None:
        raise ValueError(f"{of} was never calibrated")
    values: dict[str, Any] = {"scale": grid.scale}
    if grid.zero_point:
        values["zero_point"] = grid.zero_point
    return values | ({"signed": True} if grid.signed else {})


def is_graph(quantization: object) -> bool:
    """Whether these JSON values describe a network with grids on all tensors."""
    return isinstance(quantization, dict) and quantization.get("version") == WITH_TENSORS


def layers_in(quantization: object) -> list[str]:
    """The names of the quantized layers; raises `BadInput` if the JSON values are not valid."""
    return list(_parsed(quantization))


def unpack_network(network: nn.Module, tensors: Mapping[str, Tensor], quantization: object) -> None:
    """Turn `network`, a new float network, into the quantized and frozen network that `pack_network` was given.

    If that network had grids on all tensors, `network` must have `TensorGrid`s at the same places.
    Raises `BadInput`, and leaves the network unchanged, if the tensors or the JSON values are not what `pack_network`
    writes for this architecture.
    """
    layers, by_tensor = _parsed(quantization), _parsed_tensors(quantization)
    _check_places(network, by_tensor, layers)
    _check_tensors(tensors, _expected_tensors(network, layers))
    integers = {name: _unpacked_integers(network, name, tensors, layer) for name, layer in layers.items()}
    grids = _unpacked_grids(tensors, layers, {name: len(each) for name, each in integers.items()})
    quantize_layers(network, {name: (layer.weight_bits, layer.input_bits) for name, layer in layers.items()})
    for name, quantized in quantized_layers(network).items():
        quantized.set_integer_weight(integers[name], grids[name])
        quantized.input_grid = layers[name].input_grid
    for name, tensor in tensor_grids(network).items():
        tensor.input_grid = by_tensor[name]
        for fed in tensor.feeds:
            quantized_layers(network)[fed].input_grid = by_tensor[name]
    # The quantized weights are in place already.
    load_tensors(network, {name: tensors[name] for name in without_counters(network.state_dict()) if name in tensors})


@dataclass(frozen=True)
class _PackedLayer:
    weight_bits: int
    symmetric: bool
    input_bits: int
    input_grid: InputGrid | None


def _parsed(values: object) -> dict[str, _PackedLayer]:
    known = isinstance(values, dict) and values.get("version") in (SYMMETRIC, ASYMMETRIC, WITH_TENSORS)
    if not isinstance(values, dict) or not known or not isinstance(values.get("layers"), dict):
        raise _damaged(
            f"its quantization settings are not those of version {SYMMETRIC}, {ASYMMETRIC} or {WITH_TENSORS}"
        )
    return {name: _parsed_layer(name, layer) for name, layer in values["layers"].items()}


def _parsed_tensors(values: object) -> dict[str, InputGrid]:
    tensors = values.get("tensors") if is_graph(values) and isinstance(values, dict) else {}
    if not isinstance(tensors, dict) or not all(isinstance(each, dict) for each in tensors.values()):
        raise _damaged("its tensors have no settings")
    return {name: _parsed_grid(f"tensor {name!r}", each, LARGEST_BITS) for name, each in tensors.items()}


def _check_places(network: nn.Module, by_tensor: Mapping[str, InputGrid], layers: Mapping[str, _PackedLayer]) -> None:
    """Raise `BadInput` if network and file have grids at different tensors, or a layer lacks its input grid."""
    places = tensor_grids(network)
    fed = {name for grid in places.values() for name in grid.feeds}
    for name, layer in layers.items():
        if layer.input_grid is None and layer.input_bits < FLOAT_BITS and name not in fed:
            raise _damaged(f"layer {name!r} has scale None")
    if differing := sorted(places.keys() ^ by_tensor.keys()):
        where = "network, as torch.fx traces it here, and not in the file"
        if differing[0] in by_tensor:
            where = "file, and not in the network as torch.fx traces it here"
        raise BadInput(
            f"The tensor behind {differing[0]!r} has a grid in the {where}.",
            "Use the versions of torch and of the network's own code that the file was made with, or make it again.",
        )


def _parsed_layer(name: str, values: object) -> _PackedLayer:
    if not isinstance(values, dict):
        raise _damaged(f"layer {name!r} has no settings")
    bits = values.get("bits")
    match = _BITS.fullmatch(bits) if isinstance(bits, str) else None
    weight_bits, input_bits = (int(match[1]), int(match[2])) if match else (0, 0)
    if weight_bits not in WIDTHS or input_bits not in (*WIDTHS, FLOAT_BITS):
        raise _damaged(f"layer {name!r} has bits {bits!r}")
    asymmetric = values.get("asymmetric", False)
    if type(asymmetric) is not bool:
        raise _damaged(f"layer {name!r} has asymmetric {asymmetric!r}")
    if input_bits == FLOAT_BITS:
        return _PackedLayer(weight_bits, not asymmetric, input_bits, None)
    grid = _parsed_grid(f"layer {name!r}", values, input_bits) if "scale" in values else None
    return _PackedLayer(weight_bits, not asymmetric, input_bits, grid)


def _parsed_grid(of: str, values: Mapping[str, Any], bits: int) -> InputGrid:
    scale, zero_point, signed = (values.get(field, usual) for field, usual in _USUAL.items())
    if not isinstance(scale, float) or not _FP32.tiny <= scale <= _FP32.max:
        raise _damaged(f"{of} has scale {scale!r}")
    if type(signed) is not bool:
        raise _damaged(f"{of} has signed {signed!r}")
    # `type`, because isinstance takes JSON's true for an int.
    if type(zero_point) is not int or zero_point not in range(1 if signed else 2**bits):
        raise _damaged(f"{of} has zero_point {zero_point!r}")
    return InputGrid(bits=bits, scale=scale, zero_point=zero_point, signed=signed)


def _expected_tensors(network: nn.Module, layers: Mapping[str, _PackedLayer]) -> _Layout:
    """Type and shape of every tensor in a file of this network with these quantized layers."""
    state = without_counters(network.state_dict())
    expected = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
    channels = {True: 0, False: 0}  # Keyed by whether the grid is symmetric.
    for name in quantizable_layers(network, layers):
        _, shape = expected.pop(f"{name}.weight")
        expected[f"{name}.weight_packed"] = torch.uint8, [packed_bytes(prod(shape), layers[name].weight_bits)]
        channels[layers[name].symmetric] += shape[0]
    if channels[False]:
        expected[ZERO_POINTS] = torch.uint8, [channels[False]]
    return expected | {SCALES: (torch.float32, [sum(channels.values())])}


def _check_tensors(tensors: Mapping[str, Tensor], expected: _Layout) -> None:
    for name in tensors.keys() - expected.keys():
        raise _damaged(f"it has a tensor {name!r} that its architecture does not")
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            raise _damaged(f"tensor {name!r} is missing")
        found = tensors[name]
        if (found.dtype, list(found.shape)) != (dtype, shape):
            raise _damaged(f"tensor {name!r} is {found.dtype} {list(found.shape)}, not {dtype} {shape}")


def _unpacked_integers(network: nn.Module, name: str, tensors: Mapping[str, Tensor], layer: _PackedLayer) -> Tensor:
    shape = tuple(network.get_parameter(f"{name}.weight").shape)
    packed = tensors[f"{name}.weight_packed"]
    integers = unpack_integers(packed, layer.weight_bits, shape, signed=layer.symmetric)
    if layer.symmetric and integers.numel() and integers.min() < -largest_integer(layer.weight_bits):
        raise _damaged(f"tensor '{name}.weight_packed' holds {integers.min()}, which is not a weight")
    return integers


def _unpacked_grids(
    tensors: Mapping[str, Tensor], layers: Mapping[str, _PackedLayer], channels: Mapping[str, int]
) -> dict[str, WeightGrid]:
    """The weight grids of the layers; `channels` has their numbers of output channels."""
    if not ((tensors[SCALES] >= _FP32.tiny) & tensors[SCALES].isfinite()).all():
        raise _damaged(f"tensor {SCALES!r} holds values that are not scales")
    scales = iter(tensors[SCALES].split(list(channels.values())))
    asymmetric = [count for name, count in channels.items() if not layers[name].symmetric]
    zero_points = iter(tensors[ZERO_POINTS].int().split(asymmetric) if asymmetric else [])
    grids = {}
    for name, count in channels.items():
        bits, symmetric = layers[name].weight_bits, layers[name].symmetric
        zero_point = torch.zeros(count, dtype=torch.int32) if symmetric else next(zero_points)
        if zero_point.numel() and zero_point.max() >= 2**bits:
            raise _damaged(f"tensor {ZERO_POINTS!r} holds {zero_point.max()}, which no weight of {bits} bits has")
        grids[name] = WeightGrid(bits=bits, symmetric=symmetric, scale=next(scales), zero_point=zero_point)
    return grids


def _damaged(what: str) -> BadInput:
    return BadInput(f"The quantized model is damaged: {what}.", "Make it again, or copy it again from where it came.")
