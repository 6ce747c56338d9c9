"""The ranges of quantized layers: of their inputs, measured on images, and of their weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import get_args

import torch
from torch import Tensor

from dfcompress.device import exact_fp32
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import (
    FLOAT_BITS,
    InputGrid,
    WeightGrid,
    in_float,
    quantized_layers,
)
from dfcompress.models.hooks import hooked_inputs
from dfcompress.quantization import InputRule, WeightRule

CHUNK = 16
PERCENTILE = 0.999
SAMPLED = 2**14  # Values of a batch that stand for all of them.
SHARES = torch.linspace(0.02, 1.0, 99)


def require_rules(inputs: str, weights: str) -> None:
    """Raise `BadInput` for a rule that is none."""
    for option, rule, rules in (("calibrate", inputs, InputRule), ("weight-ranges", weights, WeightRule)):
        if rule not in get_args(rules):
            raise BadInput(f"There is no --{option} {rule!r}.", f"Known: {', '.join(get_args(rules))}.")


@torch.no_grad()
def calibrate(
    classifier: Classifier, batches: Iterable[Tensor], *, rule: InputRule = "minmax", signed: bool = False
) -> None:
    """Set each quantized layer's input range as `rule` says; `signed` grids have zero point 0.

    `minmax`: the mean of the minimum and of the maximum over chunks of 16 images (the running mean of Haroush et al.
    2020, section 4.2, taken as a plain average). `percentile`: the same of the 0.1 and the 99.9 percentile. `mse`: the
    ends of least squared error, each a share of the outermost value that was seen.
    `batches` are images `(N, C, H, W)` in [0, 1] on the classifier's device; of each batch the last chunk may be
    smaller.
    The network runs in evaluation mode and in float (our choice): fine-tuning with fixed ranges brings it back to its
    float activations. On ResNet-20, ranges seen through freshly quantized weights were no better at 4 bits, and far
    too wide at 2 (KL to the float model on training images 80, against 16).
    Raises `BadInput` where there are no images, or a layer's input is not finite.
    """
    quantized = quantized_layers(classifier.network).items()
    layers = {name: layer for name, layer in quantized if layer.input_bits < FLOAT_BITS}
    observers = {name: _OBSERVERS[rule](layer.input_bits, signed=signed) for name, layer in layers.items()}
    see = hooked_inputs(classifier.network, layers, lambda name, activations: observers[name].see(activations))
    with exact_fp32(), evaluating(classifier), in_float(classifier), see:
        for images in batches:
            classifier(images)
    for name, layer in layers.items():
        layer.input_grid = observers[name].grid(name)


@torch.no_grad()
def fit_weights(classifier: Classifier, *, rule: WeightRule) -> None:
    """Set which shares of each output channel's lowest and highest weight the grid of a quantized layer covers.

    `minmax`: all of both. `mse`: the shares of least squared error, one for both ends of a symmetric grid.
    Layers whose weights follow no range any more (frozen, or of learnt steps) must not be among them.
    """
    for layer in quantized_layers(classifier.network).values():
        assert layer.weight_shares is not None
        if rule == "minmax":
            layer.weight_shares.fill_(1.0)
        else:
            layer.weight_shares.copy_(_shares_of_least_error(layer.weight, layer.weight_grid))


def _shares_of_least_error(weight: Tensor, kind: WeightGrid) -> Tensor:
    """Shares `(2, out_channels)` of the lowest and the highest weight, for grids of a `kind`."""
    rows = weight.flatten(1)
    ends = torch.stack([rows.amin(1), rows.amax(1)])
    each = SHARES.to(weight.device)[:, None].expand(-1, len(rows))

    def best(shares: Tensor) -> Tensor:
        """Of `(candidates, 2, out_channels)`."""
        grids = (WeightGrid.covering(*pair, bits=kind.bits, symmetric=kind.symmetric) for pair in shares * ends)
        errors = torch.stack([(grid.quantized(rows) - rows).square().sum(1) for grid in grids])
        return shares.gather(0, errors.argmin(0).expand(1, 2, -1))[0]

    found = best(torch.stack([each, each], 1))
    if kind.symmetric:
        return found
    # Both ends together first, then each on its own.
    found = best(torch.stack([found[0].expand_as(each), each], 1))
    return best(torch.stack([each, found[1].expand_as(each)], 1))


class _Observer(ABC):
    """What passes through a layer's input, remembered as far as its range needs it."""

    def __init__(self, bits: int, *, signed: bool) -> None:
        self.bits, self.signed = bits, signed

    @abstractmethod
    def see(self, activations: Tensor) -> None:
        """Remember some of a batch's activations `(N, ...)`."""

    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value of the range."""

    def grid(self, layer: str) -> InputGrid:
        """The grid of what was seen; raises `BadInput` where that was nothing, or not finite."""
        low, high = self.ends()
        if not (isfinite(low) and isfinite(high)):
            raise BadInput(
                f"The input of layer {layer} ranges from {low} to {high}.", "Check the weights and the images."
            )
        return InputGrid.covering(low, high, bits=self.bits, signed=self.signed)


class _Extremes(_Observer):
    """The mean over chunks of images of the lowest and the highest value."""

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        self.sums, self.chunks = torch.zeros(2, dtype=torch.float64), 0

    def see(self, activations: Tensor) -> None:
        for chunk in activations.split(CHUNK):
            self.sums = self.sums.to(chunk.device)
            self.sums += torch.stack(self.ends_of(chunk))
            self.chunks += 1

    def ends_of(self, chunk: Tensor) -> tuple[Tensor, ...]:
        """The lowest and the highest value of some images' activations."""
        return chunk.float().aminmax()

    def ends(self) -> tuple[float, float]:
        _require_images(self.chunks)
        low, high = (self.sums / self.chunks).tolist()
        return low, high


class _Percentiles(_Extremes):
    """The mean over chunks of images of an outer percentile at both ends."""

    def ends_of(self, chunk: Tensor) -> tuple[Tensor, ...]:
        """The outer percentiles of some images' activations."""
        return _some_of(chunk).quantile(torch.tensor([1 - PERCENTILE, PERCENTILE], device=chunk.device)).unbind()


class _LeastError(_Observer):
    """The ends that quantize what was seen with the least squared error."""

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        self.seen: list[Tensor] = []

    def see(self, activations: Tensor) -> None:
        self.seen.append(_some_of(activations))

    def ends(self) -> tuple[float, float]:
        _require_images(len(self.seen))
        values = torch.cat(self.seen)
        low, high = (end.item() for end in values.aminmax())
        if not (isfinite(low) and isfinite(high)):
            return low, high
        share = self._best(values, [(share * low, share * high) for share in SHARES.tolist()])
        # Both ends together first, then each on its own.
        share = self._best(values, [(share[0], each * high) for each in SHARES.tolist()])
        return self._best(values, [(each * low, share[1]) for each in SHARES.tolist()]) if low < 0 else share

    def _best(self, values: Tensor, ends: list[tuple[float, float]]) -> tuple[float, float]:
        def error(pair: tuple[float, float]) -> float:
            grid = InputGrid.covering(*pair, bits=self.bits, signed=self.signed)
            return (grid.quantized(values) - values).square().mean().item()

        return min(ends, key=error)


def _require_images(seen: int) -> None:
    if not seen:
        raise BadInput("There are no images to calibrate on.", "Give at least one batch.")


def _some_of(values: Tensor) -> Tensor:
    """Evenly spread values, in fp32, `SAMPLED` at most; the odd stride meets every row and column of features.

    A copy: a view would change with activations that a later layer overwrites, and keep all of them in memory.
    """
    flat = values.flatten()
    return flat[:: -(-len(flat) // SAMPLED) | 1].to(torch.float32, copy=True)


_OBSERVERS: Mapping[str, Callable[..., _Observer]] = {
    "minmax": _Extremes,
    "percentile": _Percentiles,
    "mse": _LeastError,
}
