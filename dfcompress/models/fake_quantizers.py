"""Convolution and linear layers that compute in float the results that integer arithmetic would give.

    quantize_layers(network, {"conv1": (8, 8), "fc": (4, 4)})    # weights are quantized from here on
    layer.input_grid = InputGrid.covering(low, high, bits=4)     # ... and activations, once calibrated
    learn_steps(network)                                         # if the steps of both are to be trained
    freeze(network)                                              # weights become their integers times a scale

Weights: a uniform grid per output channel, set at every forward pass to cover a share of the channel's range;
symmetric (zero in the middle, 2^bits − 1 values), or asymmetric (a zero point per channel, all 2^bits values).
Activations: the layer's input on a uniform grid, one scale and zero point per tensor, which stay fixed once set.
Both use the straight-through gradient wherever a value was not clipped. Biases and BatchNorm stay in float.
(Haroush et al. 2020, section 4, whose weights are asymmetric; to quantize a layer's input, not its output, is our
choice.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.plain_layers import plain_kind

WIDTHS = range(2, 9)
LARGEST_BITS = WIDTHS[-1]
FLOAT_BITS = 32
UNBOUNDED = (-math.inf, math.inf)
TENSOR_GRIDS = "tensor_grids"  # The name of the submodule that holds a network's tensor grids.
_STEPS = ("weight_step", "input_step")

# A quarter of the range of int32: a kernel adds its sums of products to the bias.
_LARGEST_BIAS = 2**29

# The smallest normal fp32 number, whose reciprocal is still finite: the scale of an all-zero channel.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Scheme:
    """The kinds of grids that the layers get.

    Inputs get signed grids if `signed`. Weights get asymmetric grids at the widths `asymmetric` (in bits) and symmetric
    grids at all other widths.
    """

    signed: bool = False
    asymmetric: Collection[int] = ()


@dataclass(frozen=True, kw_only=True)
class InputGrid:
    """The values a quantized activation can take: (q − zero_point) · scale for q in 0 .. 2^bits − 1.

    `scale` is exact in fp32; zero is one of the values. A `signed` grid has q in −2^(bits − 1) .. 2^(bits − 1) − 1 and
    zero point 0, which some hardware requires.
    The fields are plain numbers, not tensors: they fit any device and are constants to the compiler.
    """

    bits: int
    scale: float
    zero_point: int
    signed: bool = False

    @classmethod
    def covering(cls, low: float, high: float, *, bits: int, signed: bool = False) -> InputGrid:
        """The grid whose 2^bits values span [min(low, 0), max(high, 0)], shifted by less than a step to contain zero.

        A signed grid spans −r .. r, r the larger of −low and high; its lowest value is one step below −r.
        """
        low, high, largest = min(low, 0.0), max(high, 0.0), 2**bits - 1
        if signed:
            scale = _as_scale(max(-low, high) / largest_integer(bits))
            return cls(bits=bits, scale=scale, zero_point=0, signed=True)
        scale = _as_scale((high - low) / largest)
        return cls(bits=bits, scale=scale, zero_point=min(round(-low / scale), largest))

    def integers(self) -> tuple[int, int]:
        """The lowest and the highest q."""
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)

    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        lowest, highest = self.integers()
        return (lowest - self.zero_point) * self.scale, (highest - self.zero_point) * self.scale

    def quantized(self, activations: Tensor, *, step: Tensor | None = None) -> Tensor:
        """The nearest grid value of each activation, in fp32; the gradient passes where a value was not clipped.

        `step` `()`, a parameter, replaces the scale and gets a gradient too.
        """
        lowest, highest = self.integers()
        multiples = lowest - self.zero_point, highest - self.zero_point
        if step is None:
            return on_grid(activations.float(), self.scale, *multiples)
        return on_learnt_grid(activations.float(), step, *multiples)

    def as_step(self, device: torch.device) -> nn.Parameter:
        """The scale as a parameter."""
        return nn.Parameter(torch.tensor(self.scale, device=device))

    def with_step(self, step: Tensor) -> InputGrid:
        """The same grid with a learnt scale."""
        return replace(self, scale=_as_scale(step.item()))


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightGrid:
    """The values a quantized weight can take: (q − zero_point) · scale, with zero point and scale of its channel.

    `scale` `(out_channels,)` is fp32, `zero_point` `(out_channels,)` int32. Symmetric: the zero points are 0 and q is
    in −(2^(bits − 1) − 1) .. 2^(bits − 1) − 1 (narrow range: 3 values at 2 bits). Asymmetric: q and the zero points are
    in 0 .. 2^bits − 1, so that zero is one of the values.
    """

    bits: int
    symmetric: bool
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def covering(cls, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> WeightGrid:
        """The grid of each channel that spans [min(low, 0), max(high, 0)]; `low` and `high` are `(out_channels,)`.

        An asymmetric grid is shifted by less than a step to contain zero. A symmetric grid extends to the larger of
        −low and high on both sides.
        """
        low, high = low.clamp_max(0), high.clamp_min(0)
        if symmetric:
            scale = as_scales(torch.maximum(-low, high) / largest_integer(bits))
            return cls(bits=bits, symmetric=True, scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int32))
        largest = 2**bits - 1
        scale = as_scales((high - low) / largest)
        zero_point = (-low / scale).round().clamp(0, largest).int()
        return cls(bits=bits, symmetric=False, scale=scale, zero_point=zero_point)

    def integers(self) -> tuple[int, int]:
        """The lowest and the highest q."""
        return (-largest_integer(self.bits), largest_integer(self.bits)) if self.symmetric else (0, 2**self.bits - 1)

    def multiples(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest multiple of the scale, q − zero_point, shaped to broadcast over `weight`."""
        lowest, highest = self.integers()
        zero_point = per_channel(self.zero_point, weight)
        return lowest - zero_point, highest - zero_point

    def quantized(self, weight: Tensor, *, step: Tensor | None = None) -> Tensor:
        """The nearest grid value of each weight; the gradient passes where a value was not clipped.

        `step` `(out_channels,)`, a parameter, replaces the scale and gets a gradient too.
        """
        if step is None:
            return on_grid(weight, per_channel(self.scale, weight), *self.multiples(weight))
        return on_learnt_grid(weight, per_channel(step, weight), *self.multiples(weight))

    def nearest(self, multiples: Tensor) -> Tensor:
        """The integers q of these multiples of the scale, rounded and clipped; int8 if symmetric, else uint8.

        `multiples` is overwritten, because a copy of a weight of 100 million values would take 0.4 GB.
        """
        q = multiples.round_().add_(per_channel(self.zero_point, multiples))
        return q.clamp_(*self.integers()).to(torch.int8 if self.symmetric else torch.uint8)

    def weight(self, integers: Tensor) -> Tensor:
        """The weight values that the integers q stand for."""
        return (integers - per_channel(self.zero_point, integers)) * per_channel(self.scale, integers)

    def times(self, factor: Tensor, integers: Tensor) -> tuple[Tensor, WeightGrid]:
        """Integers and a grid that stand for `factor` `(out_channels,)` times the values of `integers`, unrounded.

        A negative factor mirrors the integers and the zero point.
        """
        ends = sum(self.integers())
        mirrored = torch.where(per_channel(factor < 0, integers), ends - integers, integers)
        zero_point = torch.where(factor < 0, ends - self.zero_point, self.zero_point)
        return mirrored, replace(self, scale=as_scales(self.scale * factor.abs()), zero_point=zero_point)

    def to(self, device: torch.device) -> WeightGrid:
        """The same grid on a device."""
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device))


class QuantizedLayer(nn.Module):
    """A layer with few-bit weights and input; subclasses implement the operation that combines them.

    `input_grid` is None before calibration; the input then stays in float.
    Until steps are learnt or the weight is frozen, only the bits and the symmetry of `weight_grid` are used. Scale and
    zero point are then computed from the weight at every forward pass, so that the grid covers the shares
    `weight_shares` `(2, out_channels)` of each channel's lowest and highest weight; afterwards `weight_shares` is None.
    `weight_step` `(out_channels,)` and `input_step` `()` are parameters that replace the scales of weight and input
    while steps are learnt, else None; zero points do not change.
    """

    weight: Tensor
    weight_grid: WeightGrid
    weight_shares: Tensor | None
    input_bits: int
    input_grid: InputGrid | None
    weight_step: nn.Parameter | None
    input_step: nn.Parameter | None

    @property
    def weight_bits(self) -> int:
        """Bits of the weight."""
        return self.weight_grid.bits

    def quantized_input(self, activations: Tensor) -> Tensor:
        """The input on its grid, or unchanged before calibration."""
        return self.input_grid.quantized(activations, step=self.input_step) if self.input_grid else activations

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with: every entry is a value of the grid."""
        if self.is_frozen:
            return self.weight
        if self.weight_step is not None:
            return self.weight_grid.quantized(self.weight, step=self.weight_step)
        return self.grid_now().quantized(self.weight)

    def grid_now(self) -> WeightGrid:
        """The weight's current grid: frozen, with learnt scales, or computed from the current weight."""
        if self.weight_step is not None:
            return replace(self.weight_grid, scale=as_scales(self.weight_step.detach()))
        if self.weight_shares is None:
            return self.weight_grid
        rows = self.weight.detach().flatten(1)
        low, high = self.weight_shares * torch.stack([rows.amin(1), rows.amax(1)])
        return WeightGrid.covering(low, high, bits=self.weight_bits, symmetric=self.weight_grid.symmetric)

    def learn_steps(self) -> None:
        """Turn the scales of weight and input into parameters with their current values (LSQ, Esser et al. 2020)."""
        self.weight_grid, self.weight_shares = self.grid_now(), None
        self.weight_step = nn.Parameter(self.weight_grid.scale.clone())
        if self.input_grid is not None:
            self.input_step = self.input_grid.as_step(self.weight.device)

    @property
    def is_frozen(self) -> bool:
        """Whether the weight already consists of integers on a fixed grid."""
        return self.weight_shares is None and self.weight_step is None

    @torch.no_grad()
    def freeze(self) -> None:
        """Fix the weight and both grids permanently at their current values."""
        if self.input_grid is not None and self.input_step is not None:
            self.input_grid = self.input_grid.with_step(self.input_step)
        if not self.is_frozen:
            grid = self.grid_now()
            multiples = self.quantized_weight() / per_channel(grid.scale, self.weight)
            self.set_integer_weight(grid.nearest(multiples), grid)
        self.input_step = None

    @torch.no_grad()
    def set_integer_weight(self, integers: Tensor, grid: WeightGrid) -> None:
        """Freeze the weight at the `integers` (of the weight's shape) on `grid`."""
        # The product is computed only here, and in one memory layout: so the frozen network and the network
        # loaded from its file agree to the bit.
        grid = grid.to(self.weight.device)
        weight = grid.weight(integers.to(self.weight.device).contiguous())
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.weight_grid, self.weight_shares, self.weight_step = grid, None, None

    @torch.no_grad()
    def round_bias(self) -> None:
        """Round the bias of a frozen layer to 32-bit integers times both scales: integer kernels add it to their sums.

        Where 32 bits do not suffice, the channel's scale is raised: a dead channel has a bias and weights near zero.
        """
        if (bias := self._bias()) is None or self.input_grid is None:
            return
        grid = self.weight_grid
        needed = bias.abs() / (self.input_grid.scale * _LARGEST_BIAS)
        if (grid.scale < needed).any():
            wider = replace(grid, scale=torch.maximum(grid.scale, as_scales(needed)))
            self.set_integer_weight(wider.nearest(self.weight / per_channel(wider.scale, self.weight)), wider)
        bias.copy_(self.integer_bias() * self.bias_scale())

    def integer_bias(self) -> Tensor:
        """The integers `(out_channels,)` of the bias, in float64: bias = integers · `bias_scale`."""
        bias = self._bias()
        assert bias is not None
        return (bias.detach() / self.bias_scale()).round()

    def bias_scale(self) -> Tensor:
        """The scale `(out_channels,)` of the products that a kernel sums up, in float64."""
        assert self.input_grid is not None
        return self.weight_grid.scale.double() * self.input_grid.scale

    def _bias(self) -> nn.Parameter | None:
        return dict(self.named_parameters(recurse=False)).get("bias")

    def integer_weight(self) -> tuple[Tensor, WeightGrid]:
        """The integers (the weight's shape; int8, or uint8 where asymmetric) of a frozen weight, and their grid.

        Raises `ValueError` if the weight is not frozen.
        """
        if not self.is_frozen:
            raise ValueError("a weight has lasting integers only once it is frozen")
        grid, weight = self.weight_grid, self.weight.detach()
        return grid.nearest(weight / per_channel(grid.scale, weight)), grid

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the grid to the layer's device, too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        self.weight_grid = self.weight_grid.to(self.weight.device)
        return self


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with few-bit weights and input; their state dicts are interchangeable."""

    def forward(self, input: Tensor) -> Tensor:
        """Features of `input` `(N, C, H, W)`."""
        features: Tensor = self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)
        return features


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with few-bit weights and input; their state dicts are interchangeable."""

    def forward(self, input: Tensor) -> Tensor:
        """Features of `input` `(N, ..., in_features)`."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class TensorGrid(nn.Module):
    """The grid of one tensor inside a network that is an FX graph (see `models/tensor_grids.py`).

    All tensors of one `group` have the same grid. `bounds` are the limits within which an activation function keeps a
    newly computed tensor; None for an operation that only moves values. The tensors with `bounds` set the grid's range.
    The layers that the tensor `feeds` have the same grid as `input_grid`: to quantize twice changes nothing.
    """

    input_grid: InputGrid | None = None
    input_bits = LARGEST_BITS

    def __init__(self, *, group: str, bounds: tuple[float, float] | None, feeds: Sequence[str]) -> None:
        super().__init__()
        self.group, self.bounds, self.feeds = group, bounds, tuple(feeds)

    def forward(self, activations: Tensor) -> Tensor:
        """The tensor on its grid, or unchanged before calibration."""
        return self.input_grid.quantized(activations) if self.input_grid else activations


_QUANTIZED: Mapping[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
}
_PLAIN: Mapping[type[nn.Module], type[nn.Module]] = {
    TensorGrid: nn.Identity,
    **{quantized: plain for plain, quantized in _QUANTIZED.items()},
}


def can_be_quantized(module: nn.Module) -> bool:
    """Whether a module computes exactly a convolution or linear layer of torch and is not quantized yet."""
    return not isinstance(module, QuantizedLayer) and plain_kind(module) is not None


def quantizable_layers(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of these names.

    Raises `BadInput` if a name is not that of a layer that computes exactly a convolution or linear layer: the forward
    of a subclass may compute something else, which quantization would silently replace.
    """
    modules = dict(network.named_modules())
    layers = {}
    for name in names:
        if name not in modules:
            raise BadInput(f"The network has no layer {name!r} to quantize.", "Name a convolution or linear layer.")
        if not can_be_quantized(modules[name]):
            found = type(modules[name]).__name__
            raise BadInput(
                f"Layer {name!r} is a {found} and cannot be quantized.",
                "Name a layer that computes what Conv2d or Linear does.",
            )
        layers[name] = modules[name]
    return layers


def quantize_layers(
    network: nn.Module, layer_bits: Mapping[str, tuple[int, int]], *, asymmetric: Collection[int] = ()
) -> None:
    """Turn the named layers into quantized layers, in place; `layer_bits` has (weight bits, input bits) by name.

    Weights whose bits are in `asymmetric` get asymmetric grids, all others get symmetric grids.
    State-dict keys do not change. Input bits of 32 leave the activations in float.
    Raises `BadInput` if a name is not that of a layer that can be quantized.
    """
    for name, layer in quantizable_layers(network, layer_bits).items():
        kind = plain_kind(layer)
        assert kind is not None
        layer.__class__ = _QUANTIZED[kind]
        assert isinstance(layer, QuantizedLayer)
        bits, layer.input_bits = layer_bits[name]
        layer.input_grid = None
        low = layer.weight.detach().flatten(1).amin(1)
        layer.weight_grid = WeightGrid.covering(low, -low, bits=bits, symmetric=bits not in asymmetric)
        # A buffer moves with the layer; it is not persistent, so that state-dict keys do not change.
        layer.register_buffer("weight_shares", torch.ones(2, len(low), device=low.device), persistent=False)
        for step in _STEPS:
            layer.register_parameter(step, None)
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and is_quantized(module):
            # Without gradients it would run one fused operation on its layers' weights and not call the layers; the
            # fused operation exists only for ReLU and GELU, which this attribute reports.
            module.activation_relu_or_gelu = 0


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of the network by name, in the order the modules are registered."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}


def tensor_grids(network: nn.Module) -> dict[str, TensorGrid]:
    """The grids of tensors inside the network, by the name of the operation whose output they quantize."""
    inside = getattr(network, TENSOR_GRIDS, None)
    grids = dict(inside.named_children()) if isinstance(inside, nn.Module) else {}
    return {name: grid for name, grid in grids.items() if isinstance(grid, TensorGrid)}


@dataclass(frozen=True)
class SharedGrid:
    """An input grid of `bits` bits that one or several modules share.

    `owners` are the modules that use the grid. The grid's range is that of the inputs of the modules `observed`, whose
    names map to the bounds within which their inputs lie.
    """

    bits: int
    owners: list[QuantizedLayer | TensorGrid]
    observed: dict[str, tuple[float, float]]


def input_grids(network: nn.Module) -> list[SharedGrid]:
    """The grids of all quantized activations: of layers, and of tensors that several operations share."""
    layers, tensors = quantized_layers(network), tensor_grids(network)
    fed = {name for grid in tensors.values() for name in grid.feeds}
    groups: dict[str, SharedGrid] = {}
    for name, grid in tensors.items():
        group = groups.setdefault(grid.group, SharedGrid(grid.input_bits, [], {}))
        group.owners.extend([grid, *(layers[each] for each in grid.feeds if each in layers)])
        if grid.bounds:
            group.observed[f"{TENSOR_GRIDS}.{name}"] = grid.bounds
    alone = {name: layer for name, layer in layers.items() if name not in fed and layer.input_bits < FLOAT_BITS}
    return [*groups.values(), *(SharedGrid(each.input_bits, [each], {name: UNBOUNDED}) for name, each in alone.items())]


def is_quantized(network: nn.Module) -> bool:
    """Whether any layer of the network is quantized."""
    return bool(quantized_layers(network))


@contextmanager
def in_float(network: nn.Module, *, but: str | None = None) -> Iterator[None]:
    """Within this context, run the quantized layers of the network as plain float layers, except the layer `but`.

    The grids of tensors inside the network are switched off, too.
    """
    layers = [layer for name, layer in quantized_layers(network).items() if name != but]
    quantizing = [*layers, *tensor_grids(network).values()]
    classes: dict[nn.Module, type[nn.Module]] = {each: type(each) for each in quantizing}
    try:
        for layer, quantized in classes.items():
            layer.__class__ = _PLAIN[quantized]
        yield
    finally:
        for layer, quantized in classes.items():
            layer.__class__ = quantized


def dequantized(network: nn.Module) -> nn.Module:
    """A float copy of the network; its plain layers have the weights that the quantized layers compute with."""
    twin = copy.deepcopy(network)
    freeze(twin)
    for layer in quantized_layers(twin).values():
        layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]
        for name in ("weight_grid", "weight_shares", *_STEPS):
            delattr(layer, name)
    for grid in tensor_grids(twin).values():
        grid.input_grid = None
    return twin


def learn_steps(network: nn.Module) -> None:
    """Turn the scales of all quantized layers into parameters, in place; the state dict has them until `freeze`."""
    for layer in quantized_layers(network).values():
        layer.learn_steps()


def freeze(network: nn.Module) -> None:
    """Replace every quantized layer's float weight by its integers times their scale, in place.

    The network that is measured afterwards and the network that is packed and loaded are the same to the bit.
    """
    for layer in quantized_layers(network).values():
        layer.freeze()
    for grid in tensor_grids(network).values():
        for name in grid.feeds:
            fed = network.get_submodule(name)
            if isinstance(fed, QuantizedLayer):
                fed.round_bias()


def largest_integer(bits: int) -> int:
    """The largest magnitude of a symmetric weight's integers: the narrow range leaves −2^(bits − 1) unused."""
    return (1 << (bits - 1)) - 1


def on_grid(values: Tensor, scale: Any, lowest: Any, highest: Any) -> Tensor:
    """The nearest grid value among lowest·scale .. highest·scale; the gradient passes straight through where a value
    was not clipped.

    `scale` and the integers `lowest` ≤ 0 ≤ `highest` are numbers, or tensors that broadcast over the values.
    The results are equal to those of torch's `fake_quantize`, which on a CPU takes several times as long, because it
    converts every number to an integer of 64 bits (docs/measure_grids.py).
    """
    reciprocal = 1 / scale
    # While torch.fx traces, the values are a proxy, and so is this attribute.
    if torch.is_grad_enabled() and values.requires_grad is True:
        nearest: Tensor = _StraightThrough.apply(values, reciprocal, scale, lowest, highest)
    else:
        nearest = (values * reciprocal).round_().clamp_(lowest, highest).mul_(scale)
    return nearest


def on_learnt_grid(values: Tensor, step: Tensor, lowest: Any, highest: Any) -> Tensor:
    """The nearest grid value among lowest·step .. highest·step, differentiable in `values` and in `step`.

    `lowest` ≤ 0 ≤ `highest` are integers, or integer tensors that broadcast over the values as `step` does.
    Rounding passes gradients straight through. The gradient of a step is divided by √(number of values that share it ·
    max(−lowest, highest)), so that steps change as fast as weights (LSQ, Esser et al. 2020, section 2.2). For
    activations only the values of one image are counted, so that this scale depends neither on the batch size nor on
    the number of processes that share a batch.
    """
    shared = values[0].numel() if step.dim() == 0 else values.numel() / step.numel()
    larger_end = torch.maximum(-lowest, highest) if isinstance(highest, Tensor) else max(-lowest, highest)
    step = _with_gradient(step, step * (shared * larger_end) ** -0.5).clamp_min(_SMALLEST_SCALE)
    nearest: Tensor = _LearntStep.apply(values, step, lowest, highest)
    return nearest


class _StraightThrough(torch.autograd.Function):
    """`on_grid` with its gradient: 1 where rounding did not clip, else 0.

    Only the values are saved, which the operation before usually keeps anyway. The mask is computed in fp32, because
    on a CPU an operation with a boolean tensor takes ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, reciprocal: Any, scale: Any, lowest: Any, highest: Any) -> Tensor:
        ctx.save_for_backward(values)
        ctx.grid = reciprocal, lowest, highest
        nearest: Tensor = (values * reciprocal).round_().clamp_(lowest, highest).mul_(scale)
        return nearest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (values,), (reciprocal, lowest, highest) = ctx.saved_tensors, ctx.grid
        rounded = (values * reciprocal).round_()
        return rounded.eq_(rounded.clamp(lowest, highest)).mul_(gradient), None, None, None, None


class _LearntStep(torch.autograd.Function):
    """clip(values / step) rounded, times step, and the gradients of both: with v = values / step, that of the values is
    1 where v lies between the ends, else 0; that of the step is ⌊v⌉ − v there, else the nearer end (LSQ, eq. 3 and 5).
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, lowest: Any, highest: Any) -> Tensor:
        ctx.save_for_backward(values, step)
        ctx.ends = lowest, highest
        return (values / step).clamp_(lowest, highest).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, step = ctx.saved_tensors
        lowest, highest = ctx.ends
        scaled = values / step
        inside = scaled.clone().gt_(lowest).mul_(scaled.clone().lt_(highest))
        of_step = scaled.clamp(lowest, highest).round_().sub_(scaled.mul_(inside)).mul_(gradient)
        return inside.mul_(gradient), of_step.sum_to_size(step.shape), None, None


def _with_gradient(value: Tensor, gradient: Tensor) -> Tensor:
    """`value`, to the bit, with the gradient of the tensor `gradient`."""
    return value.detach() + (gradient - gradient.detach())


def as_scales(values: Tensor) -> Tensor:
    """The values in fp32, raised where they are too small to have a finite reciprocal."""
    return values.float().clamp_min(_SMALLEST_SCALE)


def _as_scale(value: float) -> float:
    """The value in fp32, raised where it is too small to have a finite reciprocal."""
    return max(torch.tensor(value, dtype=torch.float32).item(), _SMALLEST_SCALE)


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """One number per output channel, shaped to broadcast over `weight`."""
    return scale.view(-1, *[1] * (weight.dim() - 1))
