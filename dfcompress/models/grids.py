"""Grids: the values that a quantized weight or activation can take, and rounding to them.

    grid = InputGrid.covering(-1.0, 3.0, bits=8)
    grid.quantized(activations)                   # the nearest values of the grid
    grid.quantized(activations, step=parameter)   # with a scale that is trained

The gradient of rounding is that of the identity (straight-through) wherever a value was not clipped.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = range(2, 9)
LARGEST_BITS = WIDTHS[-1]
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


def largest_integer(bits: int) -> int:
    """The largest magnitude of a symmetric weight's integers: the narrow range leaves −2^(bits − 1) unused."""
    return (1 << (bits - 1)) - 1


def on_grid(values: Tensor, scale: Any, lowest: Any, highest: Any) -> Tensor:
    """The nearest grid value among lowest·scale .. highest·scale; the gradient passes straight through where a value
    was not clipped.

    `scale` and the integers `lowest` ≤ 0 ≤ `highest` are numbers, or tensors that broadcast over the values.
    For finite values the results are equal to those of torch's `fake_quantize`, which on a CPU takes several times as
    long, because it converts every number to an integer of 64 bits (docs/measure_grids.py). NaN stays NaN.
    """
    reciprocal = 1 / scale
    # While torch.fx traces, the values are a proxy, and so is this attribute.
    if torch.is_grad_enabled() and values.requires_grad is True:
        nearest: Tensor = _StraightThrough.apply(values, reciprocal, scale, lowest, highest)
    else:
        nearest = _nearest(values, reciprocal, scale, lowest, highest)
    return nearest


def _nearest(values: Tensor, reciprocal: Any, scale: Any, lowest: Any, highest: Any) -> Tensor:
    return _times((values * reciprocal).round_().clamp_(lowest, highest), scale)


def _times(multiples: Tensor, scale: Any) -> Tensor:
    """The product; `multiples` may be overwritten."""
    # Compiled by torch 2.11, an autograd function loses the gradient of an output that is computed in place.
    product: Tensor = multiples * scale if torch.compiler.is_compiling() else multiples.mul_(scale)
    return product


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

    Only the values are saved, which an operation such as ReLU before it keeps anyway; so they must not be overwritten
    afterwards. The mask is computed in fp32, because on a CPU operations with boolean tensors are slow.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, reciprocal: Any, scale: Any, lowest: Any, highest: Any) -> Tensor:
        ctx.save_for_backward(values)
        ctx.grid = reciprocal, lowest, highest
        return _nearest(values, reciprocal, scale, lowest, highest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (values,), (reciprocal, lowest, highest) = ctx.saved_tensors, ctx.grid
        rounded = (values * reciprocal).round_()
        return rounded.eq_(rounded.clamp(lowest, highest)).mul_(gradient), None, None, None, None


class _LearntStep(torch.autograd.Function):
    """clip(values / step) rounded, times step, and the gradients of both (LSQ, eq. 3 and 5).

    With v = values / step, the gradient of the values is 1 where v was not clipped, else 0. That of the step is ⌊v⌉ − v
    where v was not clipped, else the end.
    The paper counts the ends as clipped. Here they are not: after `--finetune blocks` every weight is a value of its
    grid, and at 2 bits a large share of them lies at an end, where weights without a gradient would stay for good.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, lowest: Any, highest: Any) -> Tensor:
        ctx.save_for_backward(values, step)
        ctx.ends = lowest, highest
        return _times((values / step).clamp_(lowest, highest).round_(), step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, step = ctx.saved_tensors
        lowest, highest = ctx.ends
        scaled = values / step
        clipped = scaled.clamp(lowest, highest)
        inside = clipped.clone().eq_(scaled)
        of_step = clipped.round_().sub_(scaled.mul_(inside)).mul_(gradient)
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
