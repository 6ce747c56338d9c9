"""Where a quantized network has its grids: at the inputs of its layers, or on all tensors that kernels for integers
read or write.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.models.tensor_grids import as_kernels_compute, quantize_tensors
from dfcompress.quantization import Placement
from dfcompress.quantization.bits import INT7, INT8, Layers, RequestedBits, layers_of, parse_bits
from dfcompress.quantization.layer_report import named_bytes

KERNELS_TAKE = (INT8, INT7)

Wish = Callable[[Classifier, Sequence[str]], dict[str, RequestedBits]]


class Placed(NamedTuple):
    """Where grids are put; the float network that the student follows; the student; its layers and their bits."""

    placement: Placement
    reference: Classifier
    student: Classifier
    layers: Layers
    wanted: dict[str, RequestedBits]


def place_grids(
    teacher: Classifier,
    wish: Wish,
    why_not_all: Callable[[Mapping[str, RequestedBits]], str | None],
    asked: Placement | None,
    bits: str,
) -> Placed:
    """The student with its grids where they were asked for, or on all tensors wherever that makes the file faster.

    Raises `BadInput` where all tensors are asked for and kernels for integers do not take what else is asked for.
    """
    if asked == "all-tensors" or (asked is None and parse_bits(bits) in KERNELS_TAKE):
        reference = copy.deepcopy(teacher)
        as_kernels_compute(reference)
        layers = layers_of(reference)._replace(unused={})  # The graph does not hold them.
        wanted = wish(reference, layers.quantizable)
        why = why_not_all(wanted)
        if why and asked:
            raise BadInput(f"--placement all-tensors does not go with {why}.", "Leave that out, or use layer-inputs.")
        if not why and (student := _with_tensor_grids(reference, wanted, asked)):
            _name_what_stays(reference, layers)
            return Placed("all-tensors", reference, student, layers, wanted)
    layers = layers_of(teacher)
    _name_what_stays(teacher, layers)
    return Placed("layer-inputs", teacher, copy.deepcopy(teacher), layers, wish(teacher, layers.quantizable))


def _with_tensor_grids(
    reference: Classifier, wanted: Mapping[str, RequestedBits], asked: Placement | None
) -> Classifier | None:
    """A copy whose network is its graph; None where nobody asked for it and there is no good one."""
    # Additions between LayerNorms carry few values far larger than all others, which one scale does not serve.
    if asked is None and any(isinstance(module, nn.LayerNorm) for module in reference.network.modules()):
        return None
    student = copy.deepcopy(reference)
    try:
        untraced = quantize_tensors(student, wanted)
    except BadInput as error:
        if asked:
            raise
        console.notice(f"{error.problem} The file is smaller and not faster.")
        return None
    for name in untraced:
        console.notice(f"torch.fx cannot trace {name}: inside it inputs of layers alone are quantized.")
    return student


def _name_what_stays(teacher: Classifier, layers: Layers) -> None:
    for name, kind in layers.others.items():
        console.notice(f"Layer {name} is a {kind}, which cannot be quantized: it stays in float.")
    if any(isinstance(module, nn.LayerNorm) for module in teacher.network.modules()):
        console.notice("LayerNorms, and softmax and products inside attention, stay in float.")
    if layers.unused:
        console.notice(f"Evaluation does not use {named_bytes(layers.unused)}: the file holds them in float.")
