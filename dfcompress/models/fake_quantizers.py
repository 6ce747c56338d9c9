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
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.grids import LARGEST_BITS, InputGrid, WeightGrid, as_scales, per_channel
from dfcompress.models.plain_layers import plain_kind

FLOAT_BITS = 32
UNBOUNDED = (-math.inf, math.inf)
TENSOR_GRIDS = "tensor_grids"  # The name of the submodule that holds a network's tensor grids.
_STEPS = ("weight_step", "input_step")

# A quarter of the range of int32: a kernel adds its sums of products to the bias.
_LARGEST_BIAS = 2**29


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
