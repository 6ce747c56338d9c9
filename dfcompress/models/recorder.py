"""One forward pass and what the losses asked for of it.

`HookRecorder` is the reference: hooks on the untouched network.
`FusedRecorder` is the fast one: a private copy whose BatchNorms record their own input and whose convolutions may run
in bf16; nothing in it stops `torch.compile(fullgraph=True)`.
Both give the same `Trace`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Moments:
    """Moments over all but the channel axis of what went into one BatchNorm, and what it expects; each `(C,)`.

    `mean_error` is E[x] − `running_mean`; `var` is the biased variance.
    """

    mean_error: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor

    def divergence(self, eps: float = 1e-8) -> Tensor:
        """Mean over channels of KL(N(μ̂, σ̂²) ‖ N(μ, σ²)), hats measured, `eps` added to σ̂² (Haroush 2020, eq. 3)."""
        measured = self.var.clamp_min(0) + eps  # E[d²] − E[d]² may round to just below 0.
        ratio = (measured + self.mean_error**2) / self.running_var
        return (0.5 * (self.running_var.log() - measured.log()) - 0.5 * (1 - ratio)).mean()


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed: normalised `images` `(N, C, H, W)`, `logits` `(N, classes)`, `labels` `(N,)`,
    and the `moments` of every BatchNorm in the order of the forward pass (empty where no loss wants them).
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    moments: tuple[Moments, ...]


class Recorder(Protocol):
    """Turns normalised images and their labels into a `Trace`."""

    def __call__(self, images: Tensor, labels: Tensor) -> Trace:
        """One forward pass of normalised images `(N, C, H, W)` with labels `(N,)`."""


def batchnorms(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics, in order of definition."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.running_var is not None]


def moments_of(features: Tensor, running_mean: Tensor, running_var: Tensor) -> Moments:
    """Moments of `features` `(N, C, ...)`, taken in fp32.

    Written around d = x − running mean: var = E[d²] − E[d]² loses no digits where the network is near its statistics,
    and its gradient g_δ/n + (2 g_var/n)(d − δ) is one affine map a channel, which a compiler fuses with
    the layer's own.
    """
    centred = features.float() - _per_channel(running_mean, features)
    axes = [axis for axis in range(features.dim()) if axis != 1]
    mean_error = centred.mean(axes)
    return Moments(mean_error, (centred * centred).mean(axes) - mean_error**2, running_mean, running_var)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


class HookRecorder:
    """Records through forward hooks; the network itself is not changed and the hooks are always removed."""

    def __init__(self, network: nn.Module, *, moments: bool) -> None:
        self.network = network
        self._layers = batchnorms(network) if moments else []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._seen: list[Moments] = []

    def __enter__(self) -> Self:
        self._handles = [layer.register_forward_pre_hook(self._record) for layer in self._layers]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self._seen.append(moments_of(inputs[0], layer.running_mean, layer.running_var))

    def __call__(self, images: Tensor, labels: Tensor) -> Trace:
        """One forward pass of normalised images."""
        logits = self.network(images)
        moments, self._seen = tuple(self._seen), []
        return Trace(images, labels, logits, moments)


class FusedRecorder:
    """Records inside a private copy of the network, made to be compiled.

    The copy's convolutions and linear layers run in `precision` (channels_last where it is not fp32);
    images, BatchNorm arithmetic, moments and logits stay fp32.
    """

    def __init__(self, network: nn.Module, *, moments: bool, precision: torch.dtype = torch.float32) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._seen: list[Moments] = []
        for module in list(self.network.modules()):
            if type(module) in _PLAIN_BATCHNORMS and module.running_var is not None:
                module.__class__ = _RecordingBatchNorm
                setattr(module, "seen", self._seen if moments else None)  # noqa: B010
            elif isinstance(module, _BatchNorm) and module.running_var is not None and moments:
                # A subclass may do more than normalise (timm's BatchNormAct2d): it keeps its forward.
                module.register_forward_pre_hook(self._record)
            elif precision != torch.float32 and type(module) in _IN_PRECISION:
                module.to(precision).__class__ = _IN_PRECISION[type(module)]
            elif precision != torch.float32 and isinstance(module, nn.Conv2d | nn.Linear):
                module.to(precision).register_forward_pre_hook(_to_own_precision)
        if precision != torch.float32:
            self.network.to(memory_format=torch.channels_last)

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen.append(moments_of(inputs[0], layer.get_buffer("running_mean"), layer.get_buffer("running_var")))

    def __call__(self, images: Tensor, labels: Tensor) -> Trace:
        """One forward pass of normalised images."""
        logits = self.network(images).float()
        moments = tuple(self._seen)
        self._seen.clear()
        return Trace(images, labels, logits, moments)


class _RecordingBatchNorm(_BatchNorm):
    """A BatchNorm in evaluation mode that appends the moments of its input to `seen`; arithmetic in fp32."""

    seen: list[Moments] | None

    def forward(self, features: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.seen is not None:
            self.seen.append(moments_of(features, self.running_mean, self.running_var))
        scale = (self.running_var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        normalised = (features.float() - _per_channel(self.running_mean, features)) * _per_channel(scale, features)
        if self.affine:
            normalised = normalised + _per_channel(self.bias, features)
        return normalised.to(features.dtype)


def _to_own_precision(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = layer.get_parameter("weight")
    return (inputs[0].to(weight.dtype), *inputs[1:])


class _Conv2dInPrecision(nn.Conv2d):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(self.weight.dtype))


class _LinearInPrecision(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.to(self.weight.dtype))


_PLAIN_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_IN_PRECISION: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _Conv2dInPrecision, nn.Linear: _LinearInPrecision}
