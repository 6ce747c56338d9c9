"""Bias correction: biases and BatchNorm statistics are changed so that they undo the shifts that quantization causes.

Rounding moves the mean and widens the variance of every channel, layer after layer, but BatchNorm still normalises by
the statistics of the float network. (Bias correction: Nagel et al. 2019, section 4.2, who compute the means without
images. Re-estimated statistics: Sun et al. 2019. It is our own idea that a BatchNorm takes over only the *change*
between both networks on the same images, so that the images need not have the statistics of the training data.)
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
    """Change the quantized student's BatchNorm statistics and biases in place. Then, on `images` `(N, C, H, W)` in
    [0, 1], every channel behind a bias has the teacher's mean, and behind a BatchNorm the teacher's mean and variance.

    `teacher` is the same network in float. One pass of each network suffices, because the input of every layer of the
    student is already corrected when the layer runs.
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
    """The BatchNorms with statistics, and the quantized layers with a bias, by name. Layers that run several times are
    left out, because their input differs from run to run.
    """
    modules = dict(student.network.named_modules())
    runs = count_runs(student, modules)
    once = {name: module for name, module in modules.items() if runs[name] == 1}
    return (
        {n: each for n, each in once.items() if isinstance(each, _BatchNorm) and each.running_mean is not None},
        {n: each for n, each in once.items() if isinstance(each, QuantizedLayer) and each.bias is not None},
    )


def _shifted(layer: nn.Module, output: Tensor, teacher_mean: Tensor) -> Tensor:
    """Move the bias of a layer so that its output has the teacher's mean in every channel, and return this output."""
    shift = (teacher_mean - channel_moments(layer, output)[0]).to(output.dtype)
    layer.get_parameter("bias").add_(shift)
    axis = channel_axis(layer)
    return (output.movedim(axis, -1) + shift).movedim(-1, axis)
