"""The placement of grids in a quantized network: at the inputs of its layers, or on all tensors that integer kernels
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
    """A `placement` of grids; the float network `reference` that the student is compared with; the `student`; the
    `layers` of the reference; and the requested bits of each quantized layer (`wanted`).
    """

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
    """Make the student with its grids at the placement `asked`. By default (None) the grids are on all tensors where
    integer kernels then make the file faster (8w8a and 7w8a, with exceptions), and else at the layers' inputs.

    `wish` gives the requested bits of a network's layers. `why_not_all` gives the reason why integer kernels do not
    take these bits and the other settings, or None.
    Raises `BadInput` for an unknown placement, and where all tensors are requested but `why_not_all` gives a reason or
    `quantize_tensors` refuses the network.
    """
    if asked == "all-tensors" or (asked is None and parse_bits(bits) in KERNELS_TAKE):
        reference = copy.deepcopy(teacher)
        as_kernels_compute(reference)
        layers = layers_of(reference)._replace(unused={})  # The traced graph does not hold unused modules.
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
    """A copy of `reference` whose network is its traced graph with grids on all tensors. None where this placement was
    not requested and the network has LayerNorms or is refused by `quantize_tensors`.
    """
    # The sums between LayerNorms have a few values far larger than all others, so one scale does not fit them.
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
