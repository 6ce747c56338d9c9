"""Which layers compute what torch's own compute: a subclass is judged by what it computes, not by its name.

timm's `Linear` is a linear layer in another class, its `BatchNormAct2d` a BatchNorm with an activation function behind
it; its `ScaledStdConv2d` has a convolution's name and is none, because its weight is standardised in every pass.
A layer counts as plain where its tensors are those of the torch class, where its own `forward` gives what the torch
class's gives for random inputs of several sizes, and where nothing of the module's own stands before it: no hook, no
`forward` of this one module.
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
# Of the largest output. Both sides are one fp32 operation each, in the same order or nearly so.
CLOSE = 1e-5
# Deviations of the inputs: a layer that clamps at 6, or rounds to 1/255, computes something else for some of them only.
AMPLITUDES = (0.03, 1, 30, 1000)
SMALL = 1e-5  # A variance, where a layer states no eps.


def plain_kind(module: nn.Module) -> type[nn.Conv2d | nn.Linear] | None:
    """`nn.Conv2d` or `nn.Linear` where a layer computes just that of its weight and bias, else None."""
    if not isinstance(module, nn.Conv2d | nn.Linear) or is_altered(module):
        return None
    if not _owns(module, {"weight", "bias"}) or [*module.children()]:
        return None
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    return kind if type(module) is kind or _computes(module, kind) else None


def after_normalising(module: nn.Module) -> nn.Module | None:
    """What a BatchNorm with running statistics does behind the normalisation, in evaluation mode: nothing
    (`nn.Identity`), or its children in their order. None where it computes something else, and for other modules.
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
    """Whether a layer does what torch's does."""
    return _agree(layer, layer.forward, partial(kind.forward, layer), _inputs(layer))


def is_altered(module: nn.Module) -> bool:
    """Whether this one module may compute something else than its class: by its own `forward` or hooks."""
    return "forward" in vars(module) or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def _owns(module: nn.Module, allowed: set[str]) -> bool:
    """Whether a module has a weight entry and no tensor beside the allowed ones: a parametrised layer has others."""
    tensors = {**module._parameters, **module._buffers}
    return "weight" in tensors and tensors.keys() <= allowed


def _normalises(norm: _BatchNorm, after: nn.Module) -> bool:
    """Whether a BatchNorm does what torch's does, and `after` behind it: with its own tensors, and with a variance as
    small as its eps and weights of 1, because an eps that it does not state hides behind a large variance, and all it
    does behind a weight of 0.
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
    """Whether a module, by its own way, gives for all probes what torch's operation gives."""
    with evaluating(module), exact_fp32():
        for probe in probes:
            try:
                found, expected = module_forward(probe.clone()), torch_forward(probe.clone())
            except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError):
                return False
            if found.shape != expected.shape:
                return False
            if not (found - expected).abs().max() <= CLOSE * expected.abs().max():  # NaN is no agreement either.
                return False
    return True


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _inputs(layer: nn.Conv2d | nn.Linear) -> Iterator[Tensor]:
    """Inputs of a convolution of odd and of even size, because padding may depend on the size; of a linear layer of two
    and of three dimensions.
    """
    if isinstance(layer, nn.Linear):
        shapes = [(3, layer.in_features), (2, 3, layer.in_features)]
    else:
        reach = [step * (taps - 1) + 1 for step, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
        shapes = [(2, layer.in_channels, *(side + more for side in reach)) for more in (2, 3)]
    yield from (amplitude * _random(*shape).to(layer.weight) for shape in shapes for amplitude in AMPLITUDES)


def _inputs_to_normalise(norm: _BatchNorm, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Inputs around the mean; the wider ones meet both ends of activation functions that have two (ReLU6)."""
    dimensions = 1 if isinstance(norm, nn.BatchNorm1d) else 3 if isinstance(norm, nn.BatchNorm3d) else 2
    mean, std = (
        values.view(-1, *[1] * dimensions)
        for values in (tensors["running_mean"], (tensors["running_var"] + norm.eps).sqrt())
    )
    spread = _random(4, norm.num_features, *[3] * dimensions).to(mean)
    yield from (amplitude * spread * std + mean for amplitude in AMPLITUDES)
