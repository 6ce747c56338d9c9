"""Find the layers that compute the same as torch's own: a subclass is judged by its outputs, not by its name.

timm's `Linear` is a linear layer in another class, its `BatchNormAct2d` a BatchNorm with an activation function after
it; its `ScaledStdConv2d` is a subclass of `Conv2d` but no plain convolution, because it standardises its weight in
every pass.
A layer counts as plain if it has the tensors of the torch class, if its own `forward` and the torch class's give the
same outputs for random inputs of several sizes, and if the instance has neither hooks nor a `forward` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import evaluating

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMALISING, COUNTER = {"weight", "bias", "running_mean", "running_var"}, "num_batches_tracked"  # Of a BatchNorm.
# Greatest difference, as a share of the largest output. Both sides are one fp32 operation, in (nearly) the same order.
CLOSE = 1e-5
# Standard deviations of the inputs: a layer that clamps at 6, or rounds to 1/255, differs only for some of them.
AMPLITUDES = (0.03, 1, 30, 1000)
SMALL = 1e-5  # The least variance that is tried, also if a layer's eps is smaller.


def plain_kind(module: nn.Module) -> type[nn.Conv2d | nn.Linear] | None:
    """`nn.Conv2d` or `nn.Linear` if a layer computes exactly this operation with its weight and bias, else None."""
    if not isinstance(module, nn.Conv2d | nn.Linear) or is_altered(module):
        return None
    if not _owns(module, {"weight", "bias"}) or [*module.children()]:
        return None
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    return kind if type(module) is kind or _computes(module, kind) else None


def after_normalising(module: nn.Module) -> nn.Module | None:
    """The module that a BatchNorm with running statistics applies after normalising, in evaluation mode.

    It is `nn.Identity`, or the layer's children in their order. None if the layer computes something else, and for
    other modules.
    """
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return None
    children = [*module.children()]
    if is_altered(module) or not _owns(module, {*NORMALISING, COUNTER}):
        return None
    after = nn.Sequential(*children) if children else nn.Identity()
    plain = type(module) in BATCHNORMS and not children
    return after if plain or _normalises(module, after) else None


def _computes(layer: nn.Conv2d | nn.Linear, kind: type[nn.Module]) -> bool:
    """Whether a layer's `forward` gives the same outputs as torch's."""
    return _agree(layer, layer.forward, partial(kind.forward, layer), _inputs(layer))


def is_altered(module: nn.Module) -> bool:
    """Whether this instance has a `forward` or hooks of its own, so that it may not compute what its class does."""
    return "forward" in vars(module) or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def _owns(module: nn.Module, allowed: set[str]) -> bool:
    """Whether a module has an entry `weight` and no tensors but the allowed ones; parametrised layers have others."""
    tensors = {**module._parameters, **module._buffers}
    return "weight" in tensors and tensors.keys() <= allowed


def _normalises(norm: _BatchNorm, after: nn.Module) -> bool:
    """Whether a BatchNorm's output is that of torch's BatchNorm followed by `after`.

    Tried with its own tensors, and with variances as small as its eps and weights of 1, because a large variance hides
    an eps other than its `eps`, and a weight of 0 hides everything.
    """
    tensors = {name: tensor for name, tensor in norm.state_dict(keep_vars=True).items() if name in NORMALISING}
    ones = torch.ones_like(tensors["running_mean"])
    bare = {"running_mean": 0 * ones, "running_var": max(norm.eps, SMALL) * ones, "weight": ones}
    bare = tensors | {name: tensor for name, tensor in bare.items() if name in tensors}
    return all(_normalises_by(each, norm, after) for each in (tensors, bare))


def _normalises_by(tensors: Mapping[str, Tensor], norm: _BatchNorm, after: nn.Module) -> bool:
    def module_forward(features: Tensor) -> Tensor:
        answer: Tensor = functional_call(norm, dict(tensors), (features,))
        return answer

    def torch_forward(features: Tensor) -> Tensor:
        mean, var = tensors["running_mean"], tensors["running_var"]
        answer: Tensor = after(
            F.batch_norm(features, mean, var, tensors.get("weight"), tensors.get("bias"), eps=norm.eps)
        )
        return answer

    return _agree(norm, module_forward, torch_forward, _inputs_to_normalise(norm, tensors))


@torch.no_grad()
def _agree(
    module: nn.Module,
    module_forward: Callable[[Tensor], Tensor],
    torch_forward: Callable[[Tensor], Tensor],
    probes: Iterator[Tensor],
) -> bool:
    """Whether the module's own function and torch's operation have the same outputs for all probes."""
    with evaluating(module), exact_fp32():
        for probe in probes:
            try:
                found, expected = module_forward(probe.clone()), torch_forward(probe.clone())
            except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError):
                return False
            if found.shape != expected.shape:
                return False
            if not (found - expected).abs().max() <= CLOSE * expected.abs().max():  # Also true for NaN.
                return False
    return True


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _inputs(layer: nn.Conv2d | nn.Linear) -> Iterator[Tensor]:
    """Inputs to try: a convolution gets odd and even sizes, because padding may depend on the size; a linear layer gets
    two and three dimensions.
    """
    if isinstance(layer, nn.Linear):
        shapes = [(3, layer.in_features), (2, 3, layer.in_features)]
    else:
        reach = [step * (taps - 1) + 1 for step, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
        shapes = [(2, layer.in_channels, *(side + more for side in reach)) for more in (2, 3)]
    yield from (amplitude * _random(*shape).to(layer.weight) for shape in shapes for amplitude in AMPLITUDES)


def _inputs_to_normalise(norm: _BatchNorm, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Inputs around the mean; the wide ones reach both bounds of activation functions that have two (ReLU6)."""
    dimensions = 1 if isinstance(norm, nn.BatchNorm1d) else 3 if isinstance(norm, nn.BatchNorm3d) else 2
    mean, std = (
        values.view(-1, *[1] * dimensions)
        for values in (tensors["running_mean"], (tensors["running_var"] + norm.eps).sqrt())
    )
    spread = _random(4, norm.num_features, *[3] * dimensions).to(mean)
    yield from (amplitude * spread * std + mean for amplitude in AMPLITUDES)
