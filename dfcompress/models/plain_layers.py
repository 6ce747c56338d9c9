"""Which layers compute what torch's own compute: a subclass is judged by what it computes, not by its name.

timm's `Linear` is a linear layer in another class, its `BatchNormAct2d` a BatchNorm with an activation function behind
it; its `ScaledStdConv2d` has a convolution's name and is none, because its weight is standardised in every pass.
A layer counts as plain where its tensors are those of the torch class, and where its own `forward` gives what the
torch class's gives for random inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.device import exact_fp32
from dfcompress.models.classifier import evaluating

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Both sides are one fp32 operation each, in the same order or nearly so; other functions are whole units away.
CLOSE = 1e-5


def plain_kind(module: nn.Module) -> type[nn.Conv2d | nn.Linear] | None:
    """`nn.Conv2d` or `nn.Linear` where a layer computes just that of its weight and bias, else None."""
    if not isinstance(module, nn.Conv2d | nn.Linear) or not _owns(module, {"weight", "bias"}) or [*module.children()]:
        return None
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    return kind if type(module) is kind or _agree(module, kind, nn.Identity(), _inputs(module)) else None


def after_normalising(module: nn.Module) -> nn.Module | None:
    """What a BatchNorm with running statistics does behind the normalisation, in evaluation mode: nothing
    (`nn.Identity`), or its children in their order. None where it computes something else, and for other modules.
    """
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return None
    children = [*module.children()]
    if not _owns(module, {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}):
        return None
    after = nn.Sequential(*children) if children else nn.Identity()
    plain = type(module) in BATCHNORMS and not children
    return after if plain or _agree(module, _BatchNorm, after, _inputs_to_normalise(module)) else None


def _owns(module: nn.Module, allowed: set[str]) -> bool:
    """Whether a module has a weight entry and no tensor beside the allowed ones: a parametrised layer has others."""
    own = {**module._parameters, **module._buffers}
    return "weight" in own and own.keys() <= allowed


@torch.no_grad()
def _agree(module: nn.Module, kind: type[nn.Module], after: nn.Module, probes: Iterator[Tensor]) -> bool:
    """Whether a module gives for all probes what `kind` gives with `after` behind it, which is a part of it."""
    with evaluating(module), exact_fp32():
        for probe in probes:
            try:
                own, expected = type(module).forward(module, probe.clone()), after(_of(kind, module, probe.clone()))
            except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError):
                return False
            if own.shape != expected.shape or not torch.allclose(own, expected, rtol=CLOSE, atol=CLOSE):
                return False
    return True


def _of(kind: type[nn.Module], module: nn.Module, features: Tensor) -> Tensor:
    if not isinstance(module, _BatchNorm):
        found: Tensor = kind.forward(module, features)
        return found
    return nn.functional.batch_norm(
        features, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
    )


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
    yield from (_random(*shape).to(layer.weight) for shape in shapes)


def _inputs_to_normalise(norm: _BatchNorm) -> Iterator[Tensor]:
    """Inputs four deviations wide, so that activation functions with two ends (ReLU6) meet both."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dimensions = 1 if isinstance(norm, nn.BatchNorm1d) else 3 if isinstance(norm, nn.BatchNorm3d) else 2
    features = 4 * _random(4, norm.num_features, *[3] * dimensions).to(norm.running_mean)
    channels = (-1, *[1] * dimensions)
    yield features * norm.running_var.sqrt().view(channels) + norm.running_mean.view(channels)
