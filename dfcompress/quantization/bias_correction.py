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
from dfcompress.models.classifier import Classifier, count_runs, evaluating
from dfcompress.models.fake_quantizers import QuantizedLayer
from dfcompress.models.hooks import hooked_inputs, hooked_outputs
from dfcompress.models.recorder import channel_axis

PIXELS = 2**20  # Of all images that are seen at once,
FEWEST = 64  # but never fewer images.
# Values, 2 MiB of doubles: features (16, 32, 112, 112) took an eighth of the time they take at once.
CACHED = 2**18
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
    norms, biased = _correctable(student)
    teacher_moments: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, features: Tensor) -> None:
        teacher_moments[name] = _moments(student.network.get_submodule(name), features)

    def renormalise(name: str, features: Tensor) -> None:
        _renormalise(norms[name], features, *teacher_moments[name])

    def shift(name: str, output: Tensor) -> Tensor:
        return _shifted(biased[name], output, teacher_moments[name][0])

    for classifier, of_norms, of_biased in ((teacher, note, note), (student, renormalise, shift)):
        inputs = hooked_inputs(classifier.network, norms, of_norms)
        outputs = hooked_outputs(classifier.network, biased, of_biased)
        with exact_fp32(), evaluating(classifier), inputs, outputs:
            classifier(images)


def _correctable(student: Classifier) -> tuple[dict[str, _BatchNorm], dict[str, QuantizedLayer]]:
    """BatchNorms with statistics and quantized layers with a bias by name, but for those that run several times: what
    they see differs from time to time.
    """
    modules = dict(student.network.named_modules())
    runs = count_runs(student, modules)
    once = {name: module for name, module in modules.items() if runs[name] == 1}
    return (
        {n: each for n, each in once.items() if isinstance(each, _BatchNorm) and each.running_mean is not None},
        {n: each for n, each in once.items() if isinstance(each, QuantizedLayer) and each.bias is not None},
    )


def _shifted(layer: nn.Module, output: Tensor, teacher_mean: Tensor) -> Tensor:
    """The output of a layer whose bias has been moved so that it has the teacher's mean."""
    shift = (teacher_mean - _moments(layer, output)[0]).to(output.dtype)
    layer.get_parameter("bias").add_(shift)
    axis = channel_axis(layer)
    return (output.movedim(axis, -1) + shift).movedim(-1, axis)


def _renormalise(norm: _BatchNorm, features: Tensor, teacher_mean: Tensor, teacher_variance: Tensor) -> None:
    """Let a BatchNorm that is about to run take over how its input's statistics differ from the teacher's."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = _moments(norm, features)
    divisor = norm.running_var.double() + norm.eps
    moves = torch.minimum(variance, teacher_variance) > STILL * divisor
    # BatchNorm adds eps whatever the variance, so it cannot divide by less.
    new_divisor = (divisor * torch.where(moves, variance / teacher_variance, 1.0)).clamp_min(norm.eps)
    norm.running_mean.copy_(mean + (norm.running_mean - teacher_mean) * (new_divisor / divisor).sqrt())
    norm.running_var.copy_(new_divisor - norm.eps)


def _moments(module: nn.Module, activations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel `(C,)`, in float64, of a few images at a time, whose doubles stay in the
    processor's cache.
    """
    few = max(1, CACHED * len(activations) // activations.numel())
    parts = [images.movedim(channel_axis(module), 0).flatten(1) for images in activations.split(few)]
    count = sum(part.shape[1] for part in parts)
    mean = torch.stack([part.double().sum(1) for part in parts]).sum(0) / count
    squares = torch.stack([(part.double() - mean[:, None]).square().sum(1) for part in parts])
    return mean, squares.sum(0) / count
