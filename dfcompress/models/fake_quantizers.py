"""Convolution and linear layers that compute in float what the integers would give.

    quantize_layers(network, {"conv1": (8, 8), "fc": (4, 4)})    # weights are quantized from here on
    layer.input_grid = InputGrid.covering(low, high, bits=4)     # ... and activations, once calibrated
    learn_steps(network)                                         # if the steps of both are to be trained
    freeze(network)                                              # weights become their integers times a scale

Weights: uniform, symmetric, narrow range, one scale per output channel, a share of max|w| at every forward pass.
Activations: the layer's input, uniform, one scale and zero point for the tensor, fixed once set.
Both pass the gradient straight through where nothing was clipped. Biases and BatchNorm stay in float.
(Haroush et al. 2020, section 4; symmetric weights and the input's side of a layer are our choice.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.plain import plain_kind

WIDTHS = range(2, 9)
FLOAT_BITS = 32
_BUFFERS = ("weight_scale", "weight_share")
_STEPS = ("weight_step", "input_step")

# The smallest normal fp32 number: the scale of an all-zero channel, whose reciprocal is still finite.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class InputGrid:
    """The values a quantized activation can take: (q − zero_point) · scale for q in 0 .. 2^bits − 1.

    `scale` is exact in fp32; zero is one of the values. A `signed` grid has q in −2^(bits − 1) .. 2^(bits − 1) − 1 and
    its zero point is 0, as some hardware needs it.
    Plain numbers, not tensors: they follow the network to any device and are constants to the compiler.
    """

    scale: float
    zero_point: int
    signed: bool = False

    @classmethod
    def covering(cls, low: float, high: float, *, bits: int, signed: bool = False) -> InputGrid:
        """The grid whose 2^bits values span [min(low, 0), max(high, 0)], moved by less than a step to meet zero.

        A signed one spans both sides alike, as far as the farther end.
        """
        low, high, largest = min(low, 0.0), max(high, 0.0), 2**bits - 1
        if signed:
            return cls(_as_scale(max(-low, high) / largest_integer(bits)), 0, signed=True)
        scale = _as_scale((high - low) / largest)
        return cls(scale, min(round(-low / scale), largest))

    def integers(self, bits: int) -> tuple[int, int]:
        """The lowest and the highest q."""
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.signed else (0, 2**bits - 1)

    def quantized(self, activations: Tensor, *, bits: int, step: Tensor | None = None) -> Tensor:
        """The nearest value of the grid, in fp32; the gradient passes where nothing was clipped.

        `step` `()`, a parameter, takes the place of the scale and gets a gradient too.
        """
        ends = self.integers(bits)
        if step is None:
            return torch.fake_quantize_per_tensor_affine(activations.float(), self.scale, self.zero_point, *ends)
        return on_learnt_grid(activations.float(), step, *(end - self.zero_point for end in ends))

    def as_step(self, device: torch.device) -> nn.Parameter:
        """The scale as a parameter."""
        return nn.Parameter(torch.tensor(self.scale, device=device))

    def with_step(self, step: Tensor) -> InputGrid:
        """The same grid with a learnt scale."""
        return replace(self, scale=_as_scale(step.item()))


class QuantizedLayer(nn.Module):
    """A layer with few-bit weights and input; what its subclasses add is the arithmetic between the two.

    `input_grid` is None until calibrated: the input then stays in float.
    `weight_scale` `(out_channels,)` is None until frozen: the weight is then quantized anew at every forward pass, to
    the share `weight_share` `(out_channels,)` of its channel's max|w|.
    `weight_step` `(out_channels,)` and `input_step` `()` are parameters that take the place of both scales while steps
    are learnt, else None.
    """

    weight: Tensor
    weight_bits: int
    input_bits: int
    input_grid: InputGrid | None
    weight_scale: Tensor | None
    weight_share: Tensor
    weight_step: nn.Parameter | None
    input_step: nn.Parameter | None

    def quantized_input(self, activations: Tensor) -> Tensor:
        """The input as the layer sees it."""
        if self.input_grid is None:
            return activations
        return self.input_grid.quantized(activations, bits=self.input_bits, step=self.input_step)

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it: integers times the scale of their output channel."""
        if self.weight_scale is not None:
            return self.weight
        largest = largest_integer(self.weight_bits)
        if self.weight_step is not None:
            return on_learnt_grid(self.weight, per_channel(self.weight_step, self.weight), -largest, largest)
        scale = self.scale_now()
        zero_points = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(self.weight, scale, zero_points, 0, -largest, largest)

    def scale_now(self) -> Tensor:
        """The weight's scale `(out_channels,)`: frozen, learnt, or taken from the weight as it is."""
        if self.weight_scale is not None:
            return self.weight_scale
        if self.weight_step is not None:
            return as_scales(self.weight_step.detach())
        return as_scales(self.weight_share * channel_scales(self.weight, bits=self.weight_bits))

    def learn_steps(self) -> None:
        """Make the scales of weight and input parameters that start where they are (LSQ, Esser et al. 2020)."""
        self.weight_step, self.weight_scale = nn.Parameter(self.scale_now()), None
        if self.input_grid is not None:
            self.input_step = self.input_grid.as_step(self.weight.device)

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is integers times a scale already."""
        return self.weight_scale is not None

    @torch.no_grad()
    def freeze(self) -> None:
        """Make weight and input grid what they are now, once and for all."""
        if self.input_grid is not None and self.input_step is not None:
            self.input_grid = self.input_grid.with_step(self.input_step)
        if self.weight_scale is None:
            scale = self.scale_now()
            self.set_integer_weight(_integers(self.quantized_weight(), scale), scale)
        self.weight_step = self.input_step = None

    @torch.no_grad()
    def set_integer_weight(self, integers: Tensor, scale: Tensor) -> None:
        """Freeze the weight at `integers` (int8, the weight's shape) times `scale` `(out_channels,)`."""
        # The only place where the product is formed, and in one memory layout:
        # so the frozen network and the loaded one agree to the bit.
        integers = integers.to(self.weight.device).contiguous()
        scale = scale.to(self.weight.device)
        self.weight = nn.Parameter(integers * per_channel(scale, integers), requires_grad=self.weight.requires_grad)
        self.weight_scale = scale

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """The integers `(int8, the weight's shape)` of a frozen weight, and their scale `(out_channels,)`."""
        if self.weight_scale is None:
            raise ValueError("a weight has lasting integers only once it is frozen")
        return _integers(self.weight.detach(), self.weight_scale), self.weight_scale


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with few-bit weights and input; a state dict of one fits the other."""

    def forward(self, input: Tensor) -> Tensor:
        """Features of `input` `(N, C, H, W)`."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with few-bit weights and input; a state dict of one fits the other."""

    def forward(self, input: Tensor) -> Tensor:
        """Features of `input` `(N, ..., in_features)`."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


_QUANTIZED: Mapping[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
}
_PLAIN: Mapping[type[nn.Module], type[nn.Module]] = {quantized: plain for plain, quantized in _QUANTIZED.items()}


def can_be_quantized(module: nn.Module) -> bool:
    """Whether a module computes what a convolution or linear layer of torch does, whatever its class."""
    return not isinstance(module, QuantizedLayer) and plain_kind(module) is not None


def quantizable_layers(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of these names.

    Raises `BadInput` where a name is not that of a convolution or linear layer: a subclass of one may compute
    something else in its forward, which we would silently replace.
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


def quantize_layers(network: nn.Module, layer_bits: Mapping[str, tuple[int, int]]) -> None:
    """Turn the named layers into quantized ones, in place; `layer_bits` gives the bits of (weights, input) of each.

    State-dict keys stay as they are. Input bits of 32 leave the activations in float.
    Raises `BadInput` where a name is not that of a layer that can be quantized.
    """
    for name, layer in quantizable_layers(network, layer_bits).items():
        kind = plain_kind(layer)
        assert kind is not None
        layer.__class__ = _QUANTIZED[kind]
        assert isinstance(layer, QuantizedLayer)
        layer.weight_bits, layer.input_bits = layer_bits[name]
        layer.input_grid = None
        # Buffers, so that they move with the layer; not persistent ones, so that state-dict keys stay.
        shares = torch.ones_like(layer.weight.detach().flatten(1)[:, 0])
        for buffer, values in zip(_BUFFERS, (None, shares), strict=True):
            layer.register_buffer(buffer, values, persistent=False)
        for step in _STEPS:
            layer.register_parameter(step, None)


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of the network by name, in the order the modules are registered."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}


def is_quantized(network: nn.Module) -> bool:
    """Whether any layer of the network is quantized."""
    return bool(quantized_layers(network))


@contextmanager
def in_float(network: nn.Module, *, but: str | None = None) -> Iterator[None]:
    """Let the quantized layers of the network, `but` perhaps one, compute as the plain ones they were made of."""
    layers = quantized_layers(network)
    classes: dict[nn.Module, type[nn.Module]] = {layer: type(layer) for name, layer in layers.items() if name != but}
    try:
        for layer, quantized in classes.items():
            layer.__class__ = _PLAIN[quantized]
        yield
    finally:
        for layer, quantized in classes.items():
            layer.__class__ = quantized


def dequantized(network: nn.Module) -> nn.Module:
    """A copy in float, whose layers have the weights that the quantized ones compute with."""
    twin = copy.deepcopy(network)
    freeze(twin)
    for layer in quantized_layers(twin).values():
        layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]
        for name in (*_BUFFERS, *_STEPS):
            delattr(layer, name)
    return twin


def learn_steps(network: nn.Module) -> None:
    """Make the scales of all quantized layers parameters, in place; the state dict has them until they are frozen."""
    for layer in quantized_layers(network).values():
        layer.learn_steps()


def freeze(network: nn.Module) -> None:
    """Replace every quantized layer's float weight by its integers times their scale, in place.

    What is measured, packed and loaded afterwards is the same to the bit.
    """
    for layer in quantized_layers(network).values():
        layer.freeze()


def largest_integer(bits: int) -> int:
    """The largest magnitude of a weight's integers: the narrow range leaves −2^(bits − 1) unused."""
    return 2 ** (bits - 1) - 1


def channel_scales(weight: Tensor, *, bits: int) -> Tensor:
    """One scale `(out_channels,)` per output channel of `weight`: max|w| / (2^(bits − 1) − 1)."""
    largest_magnitudes = weight.detach().flatten(1).abs().amax(1)
    return as_scales(largest_magnitudes / largest_integer(bits))


def on_learnt_grid(values: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """The nearest of the values lowest·step .. highest·step, differentiable in `values` and in `step`.

    Rounding passes gradients straight through; those of a step are divided by √(values that share it · highest), so
    that it moves at the pace of the weights (LSQ, Esser et al. 2020, section 2.2). Of activations those of one image
    count, so that the pace does not depend on the batch, nor on how it is shared out.
    """
    shared = values[0].numel() if step.dim() == 0 else values.numel() / step.numel()
    pace = 1 / math.sqrt(shared * max(highest, 1))
    step = _with_gradient(step, step * pace).clamp_min(_SMALLEST_SCALE)
    scaled = (values / step).clamp(lowest, highest)
    return _with_gradient(scaled.round(), scaled) * step


def _with_gradient(value: Tensor, gradient: Tensor) -> Tensor:
    """`value` to the bit, with the gradient of another tensor."""
    return value.detach() + (gradient - gradient.detach())


def as_scales(values: Tensor) -> Tensor:
    """The values in fp32, none so small that its reciprocal is not finite."""
    return values.float().clamp_min(_SMALLEST_SCALE)


def _as_scale(value: float) -> float:
    """The nearest fp32 number that is a scale."""
    return max(torch.tensor(value, dtype=torch.float32).item(), _SMALLEST_SCALE)


def integers_within(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The nearest integers of magnitude `largest` at most, as floats."""
    return (values / scale).round().clamp(-largest, largest)


def _integers(quantized_weight: Tensor, scale: Tensor) -> Tensor:
    return (quantized_weight / per_channel(scale, quantized_weight)).round().to(torch.int8)


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """One number per output channel, shaped to meet a weight."""
    return scale.view(-1, *[1] * (weight.dim() - 1))
