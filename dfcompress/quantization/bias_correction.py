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

from dfcompress.machine.process import exact_fp32
from dfcompress.models.channel_statistics import channel_moments, renormalise
from dfcompress.models.classifier import Classifier, count_runs, evaluating
from dfcompress.models.fake_quantizers import QuantizedLayer
from dfcompress.models.hooks import hooked_inputs, hooked_outputs
from dfcompress.models.layers import channel_axis


@torch.no_grad()
def correct(student: Classifier, teacher: Classifier, images: Tensor) -> None:
    """Change the quantized student's BatchNorms and biases so that every channel has the teacher's mean, and behind a
    BatchNorm its variance, at the places where they are, on `images` `(N, C, H, W)` in [0, 1].

    `teacher` is the same network in float. One pass of each: what the student's layer sees is corrected already.
    """
    norms, biased = _correctable(student)
    teacher_moments: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, features: Tensor) -> None:
        teacher_moments[name] = channel_moments(student.network.get_submodule(name), features)

    def take_over(name: str, features: Tensor) -> None:
        renormalise(norms[name], features, *teacher_moments[name])

    def shift(name: str, output: Tensor) -> Tensor:
        return _shifted(biased[name], output, teacher_moments[name][0])

    for classifier, of_norms, of_biased in ((teacher, note, note), (student, take_over, shift)):
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
    shift = (teacher_mean - channel_moments(layer, output)[0]).to(output.dtype)
    layer.get_parameter("bias").add_(shift)
    axis = channel_axis(layer)
    return (output.movedim(axis, -1) + shift).movedim(-1, axis)
