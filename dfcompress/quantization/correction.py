"""What quantization shifts on average is shifted back: BatchNorm's statistics, and biases.

Rounding moves the mean and widens the variance of every channel, layer after layer, and BatchNorm would go on
normalising by what the float network had. (Bias correction: Nagel et al. 2019, section 4.2, whose means are computed;
re-estimated statistics: Sun et al. 2019. That a BatchNorm takes over the *change* between both networks on the same
images, so that these need not have the training data's statistics, is ours.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.device import exact_fp32
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import QuantizedLayer
from dfcompress.models.hooks import count_runs, hooked

PIXELS = 2**20  # Of all images that are seen at once,
FEWEST = 64  # but never fewer images.
# A channel whose deviation behind BatchNorm is below a millionth of its scale has nothing to be rescaled by.
STILL = 1e-12


def images_to_correct_on(input_size: tuple[int, int, int], available: int) -> int:
    """How many images are enough for stable statistics and few enough to be seen at once."""
    _, height, width = input_size
    return min(available, max(FEWEST, PIXELS // (height * width)))


@torch.no_grad()
def correct(student: Classifier, teacher: Classifier, images: Tensor) -> None:
    """Change the quantized student's BatchNorms and biases so that every channel has the teacher's mean, and behind a
    BatchNorm its variance, at the places where they are, on `images` `(N, C, H, W)` in [0, 1].

    `teacher` is the same network in float. One pass of each: what the student's layer sees is corrected already.
    """
    wanted: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, module: nn.Module, activations: Tensor, output: Tensor) -> None:
        passed = activations if isinstance(module, _BatchNorm) else output
        wanted[name] = _moments(module, passed)

    def mend(name: str, module: nn.Module, activations: Tensor, output: Tensor) -> Tensor:
        if isinstance(module, _BatchNorm):
            return _renormalised(module, activations, *wanted[name])
        return _shifted(module, output, wanted[name][0])

    for classifier, names, hook in ((teacher, _correctable(student), note), (student, wanted, mend)):
        with exact_fp32(), evaluating(classifier), hooked(classifier.network, names, hook):
            classifier(images)


def _correctable(student: Classifier) -> list[str]:
    """BatchNorms with statistics and quantized layers with a bias, but for those that run several times: what they see
    differs from time to time.
    """
    names = [
        name
        for name, module in student.network.named_modules()
        if (isinstance(module, _BatchNorm) and module.running_mean is not None)
        or (isinstance(module, QuantizedLayer) and module.bias is not None)
    ]
    runs = count_runs(student, names)
    return [name for name in names if runs[name] == 1]


def _shifted(layer: nn.Module, output: Tensor, wanted: Tensor) -> Tensor:
    """The output of a layer whose bias has been moved so that it has the mean `wanted`."""
    shift = (wanted - _moments(layer, output)[0]).to(output.dtype)
    layer.get_parameter("bias").add_(shift)
    axis = _channels_of(layer)
    return (output.movedim(axis, -1) + shift).movedim(-1, axis)


def _renormalised(norm: _BatchNorm, activations: Tensor, wanted_mean: Tensor, wanted_variance: Tensor) -> Tensor:
    """The output of a BatchNorm that has taken over how its input's statistics differ from those wanted."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = _moments(norm, activations)
    divisor = norm.running_var.double() + norm.eps
    moves = torch.minimum(variance, wanted_variance) > STILL * divisor
    # BatchNorm adds eps whatever the variance, so it cannot divide by less.
    new_divisor = (divisor * torch.where(moves, variance / wanted_variance, 1.0)).clamp_min(norm.eps)
    norm.running_mean.copy_(mean + (norm.running_mean - wanted_mean) * (new_divisor / divisor).sqrt())
    norm.running_var.copy_(new_divisor - norm.eps)
    return type(norm).forward(norm, activations)


def _channels_of(module: nn.Module) -> int:
    """The dimension of a module's channels: the last of a linear layer, else the second."""
    return -1 if isinstance(module, nn.Linear) else 1


def _moments(module: nn.Module, activations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel `(C,)`, in float64."""
    channels = activations.movedim(_channels_of(module), 0).flatten(1)
    variance, mean = torch.var_mean(channels.double(), dim=1, correction=0)
    return mean, variance
