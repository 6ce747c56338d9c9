"""Numbers of bits: `4w4a` means 4-bit weights and 4-bit activations, as papers write it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.fake_quantizers import FLOAT_BITS, can_be_quantized
from dfcompress.models.grids import WIDTHS
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.uses import unused_weights
from dfcompress.settings import AUTO

FLOAT = "float"
SAME = "same"
USUAL_ENDS = 8

_WEIGHTS_FIRST = re.compile(r"(\d+|auto)w(\d+)a")
_LETTERS_FIRST = re.compile(r"w(\d+|auto)a(\d+)")


class Bits(NamedTuple):
    """Bits of a layer's weights (2 to 8) and of its input activations (2 to 8, or 32: left in float)."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"{self.weights}w{self.activations}a"


@dataclass(frozen=True)
class RequestedBits:
    """The bits that the user requests for a layer; `weights` is None where they are chosen by sensitivities."""

    weights: int | None
    activations: int


def parse_bits(text: str, option: str = "--bits") -> RequestedBits:
    """The bits that `4w4a`, `w4a4` or `autow4a` requests; `auto` is `autow8a`.

    Raises `BadInput` where the text has none of these forms, or has bits outside 2 to 8 (and 32 for activations).
    `option` is the name of the option in the message.
    """
    plain = "autow8a" if text.lower() == AUTO else text.lower()
    match = _WEIGHTS_FIRST.fullmatch(plain) or _LETTERS_FIRST.fullmatch(plain)
    if not match:
        remedy = "Write weights, then activations: 8w8a for int8, or 4w4a."
        raise BadInput(f"{option} {text!r} is not understood.", remedy)
    weights, activations = None if match[1] == AUTO else int(match[1]), int(match[2])
    if weights is not None and weights not in WIDTHS:
        raise BadInput(f"{option} {text!r}: {weights}-bit weights are not supported.", "Use 2 to 8 bits: 4w4a.")
    if activations not in (*WIDTHS, FLOAT_BITS):
        raise BadInput(
            f"{option} {text!r}: {activations}-bit activations are not supported.",
            f"Use 2 to 8 bits, or {FLOAT_BITS} to leave them in float: 4w4a, 4w{FLOAT_BITS}a.",
        )
    return RequestedBits(weights, activations)


# Two products of 7-bit weights and 8-bit activations fit into 16 bits, in which x86 processors without VNNI add them.
INT8, INT7 = RequestedBits(8, 8), RequestedBits(7, 8)


def parse_ends(text: str | int | None, body_bits: RequestedBits) -> int | None:
    """The bits of the first and the last layer, or None where they have the same bits as the other layers (`same`). The
    default is 8 bits, but `same` at 7w8a, whose purpose is that no sum saturates. Raises `BadInput` for other texts.
    """
    if text is None:
        return None if body_bits == INT7 else USUAL_ENDS
    if text == SAME:
        return None
    if not str(text).isdecimal() or int(text) not in WIDTHS:
        raise BadInput(f"--first-last-bits {text} is not supported.", f"Use 2 to 8 ({USUAL_ENDS} is usual), or {SAME}.")
    return int(text)


def assign(
    layers: Sequence[str], body_bits: RequestedBits, *, ends: int | None, layer_bits: Mapping[str, str]
) -> dict[str, RequestedBits]:
    """The requested bits of each of the `layers`, which are in execution order, without the layers left in float.

    The first and the last layer get `ends` bits for weights and activations (the "ends" of Haroush et al. 2020) unless
    it is None; all other layers get `body_bits`. If these leave activations in float, the activations of the first and
    the last layer stay in float too. `layer_bits` overrides this for layers whose names match a pattern (`layer1.*`),
    by bits or by `float`; the last match counts.
    Raises `BadInput` for a pattern that matches no layer, and where every layer is left in float.
    """
    requested = dict.fromkeys(layers, body_bits)
    if ends:
        end_bits = RequestedBits(ends, FLOAT_BITS if body_bits.activations == FLOAT_BITS else ends)
        requested |= {layers[0]: end_bits, layers[-1]: end_bits}
    for pattern, text in layer_bits.items():
        matching = [name for name in layers if fnmatchcase(name, pattern)]
        if not matching:
            raise BadInput(
                f"--layer-bits {pattern!r} matches no layer that can be quantized.", f"Layers: {', '.join(layers)}."
            )
        for name in matching:
            requested.pop(name, None)
            if text != FLOAT:
                requested[name] = parse_bits(text, f"--layer-bits {pattern}")
    if not requested:
        raise BadInput("--layer-bits leaves every layer in float.", "There is nothing to quantize.")
    return {name: requested[name] for name in layers if name in requested}


class Layers(NamedTuple):
    """The layers of a network with weights: the names of the `quantizable` ones, in the order in which a forward pass
    calls them; the types of the `others`, by name; and the bytes of the weights `unused` in evaluation, by module.
    """

    quantizable: list[str]
    others: dict[str, str]
    unused: dict[str, int]


def layers_of(classifier: Classifier) -> Layers:
    """The layers of a network; raises `BadInput` where evaluation calls none that can be quantized."""
    weighted = {name: module for name, module in classifier.network.named_modules() if _has_weights(module)}
    called: dict[str, nn.Module] = {}

    def note(name: str, _: object) -> None:
        called[name] = weighted[name]

    with hooked_inputs(classifier.network, weighted, note):
        pass_once(classifier)
    quantizable = [name for name, module in called.items() if can_be_quantized(module)]
    # A block around quantizable layers is no layer itself: its own parameters are a scale or a position.
    blocks = {name for name in called if any(layer.startswith(f"{name}.".lstrip(".")) for layer in quantizable)}
    others = {
        name: type(module).__name__
        for name, module in called.items()
        if name not in blocks and not can_be_quantized(module)
    }
    if not quantizable:
        raise BadInput(
            "Evaluation calls no layer that computes what Conv2d or Linear does"
            + (f", but {_with_types(others)}." if others else "."),
            "Give a network with such layers: there is nothing to quantize.",
        )
    return Layers(quantizable, others, unused_weights(classifier))


def _with_types(layers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in layers.items())


def _has_weights(module: nn.Module) -> bool:
    return any(each.dim() > 1 for each in module.parameters(recurse=False))
