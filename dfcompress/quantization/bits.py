"""How many bits: `4w4a` is 4-bit weights and 4-bit activations, the papers' way of writing it."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.fake_quantizers import FLOAT_BITS, WIDTHS, quantizable_layers

_WEIGHTS_FIRST = re.compile(r"(\d+)w(\d+)a")
_LETTERS_FIRST = re.compile(r"w(\d+)a(\d+)")


class Bits(NamedTuple):
    """Bits of a layer's weights (2 to 8) and of its input activations (2 to 8, or 32: left in float)."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"{self.weights}w{self.activations}a"


def parse_bits(text: str) -> Bits:
    """The bits that `4w4a`, or `w4a4`, names.

    Raises `BadInput` where the text is neither, or names widths outside 2 to 8 (and 32 for activations).
    """
    match = _WEIGHTS_FIRST.fullmatch(text.lower()) or _LETTERS_FIRST.fullmatch(text.lower())
    if not match:
        raise BadInput(f"--bits {text!r} is not understood.", "Write weights, then activations: 4w4a.")
    bits = Bits(int(match[1]), int(match[2]))
    if bits.weights not in WIDTHS:
        raise BadInput(f"--bits {text!r}: {bits.weights}-bit weights are not supported.", "Use 2 to 8 bits: 4w4a.")
    if bits.activations not in (*WIDTHS, FLOAT_BITS):
        raise BadInput(
            f"--bits {text!r}: {bits.activations}-bit activations are not supported.",
            f"Use 2 to 8 bits, or {FLOAT_BITS} to leave them in float: 4w4a, 4w{FLOAT_BITS}a.",
        )
    return bits


def bits_per_layer(classifier: Classifier, bits: Bits, *, first_last_bits: int) -> dict[str, Bits]:
    """The bits of each convolution and linear layer, by its name in the network, in execution order.

    The first and the last layer get `first_last_bits` for weights and activations (the "ends" of Haroush et al. 2020),
    all others `bits`; activations that `bits` leaves in float stay so at the ends too.
    Raises `BadInput` where `first_last_bits` is not 2 to 8, or the network has no layer to quantize or one it cannot.
    """
    if first_last_bits not in WIDTHS:
        raise BadInput(f"--first-last-bits {first_last_bits} is not supported.", "Use 2 to 8; 8 is usual.")
    ends = Bits(first_last_bits, FLOAT_BITS if bits.activations == FLOAT_BITS else first_last_bits)
    layers = layers_in_execution_order(classifier)
    return {name: ends if name in (layers[0], layers[-1]) else bits for name in layers}


@torch.no_grad()
def layers_in_execution_order(classifier: Classifier) -> list[str]:
    """Names of the convolution and linear layers of `classifier.network`, in the order one forward pass calls them.

    Layers that evaluation never calls are not in it.
    Raises `BadInput` where there is none, or where one is of a type whose arithmetic we do not know.
    """
    called: dict[str, None] = {}  # a set that keeps the order
    names = {module: name for name, module in classifier.network.named_modules()}

    def note(module: nn.Module, _: object) -> None:
        called[names[module]] = None

    hooks = [m.register_forward_pre_hook(note) for m in names if isinstance(m, nn.Conv2d | nn.Linear)]
    pass_once(classifier, hooks)
    if not called:
        raise BadInput("The network calls no convolution or linear layer.", "There is nothing to quantize.")
    return list(quantizable_layers(classifier.network, called))
