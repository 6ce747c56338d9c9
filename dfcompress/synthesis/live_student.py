"""`LiveStudent`: the copy of the student that images compete with, whose weights are replaced in place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dfcompress.machine.device import PRECISIONS
from dfcompress.machine.execution import Execution, maybe_compiled
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, is_quantized
from dfcompress.models.recorder import FusedRecorder
from dfcompress.models.trace import Recording


class LiveStudent:
    """The student that images compete with: a copy that is compiled once. `update` replaces its weights in place, where
    compiled code and captured steps read them.

    The student gets the images with its own normalisation.
    """

    def __init__(self, student: Classifier, teacher: Classifier, execution: Execution) -> None:
        self._teacher, self._student = teacher, _frozen_copy(student, teacher.mean.device)
        # The grids of a quantized student are in fp32, and so are all tensors between them.
        quantized = is_quantized(student.network)
        precision = torch.float32 if quantized else PRECISIONS[execution.precision]
        self._recorder = FusedRecorder(self._student.network, precision=precision)
        self._network = maybe_compiled(self._recorder, execution)
        same_mean, same_std = torch.equal(self._student.mean, teacher.mean), torch.equal(self._student.std, teacher.std)
        self._normalised_alike = same_mean and same_std

    def update(self, student: Classifier) -> None:
        """Take over the present weights of `student`. The activation ranges of a quantized student must not have
        changed, because a captured step keeps the old ones.
        """
        quantized = is_quantized(student.network)
        frozen = _frozen_copy(student, self._teacher.mean.device) if quantized else student
        self._recorder.take_weights(frozen.network)

    def logits(self, seen: Tensor) -> Tensor:
        """The student's logits `(N, classes)` for images in the teacher's normalisation."""
        if not self._normalised_alike:
            seen = self._student.normalise(self._teacher.denormalise(seen))
        recording: Recording = self._network(seen)
        return recording.logits


def _frozen_copy(student: Classifier, target: torch.device) -> Classifier:
    """A copy on the device `target`, with the weights of quantized layers rounded to their grids."""
    frozen = copy.deepcopy(student).to(target)
    freeze(frozen.network)
    return frozen
