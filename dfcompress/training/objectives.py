"""The objectives that a student minimises: a list of named, weighted terms, such as `0.9 * kd(4.0)`.

No objective uses labels; each compares the student's prediction with the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.errors import BadInput
from dfcompress.models.stages import Stage
from dfcompress.training import OBJECTIVES, OF_FEATURES


class Prediction(NamedTuple):
    """A network's outputs for a batch: logits `(N, classes)`, and features `(N, C, H, W)` of each compared stage."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Objective:
    """A named and weighted loss term.

    `value` maps the student's and the teacher's `Prediction`, in this order, to a scalar tensor. `adapters` holds the
    parameters that the objective trains beside the student's.
    """

    name: str
    value: Callable[[Prediction, Prediction], Tensor]
    weight: float = 1.0
    adapters: nn.Module = field(default_factory=nn.Module)

    def __rmul__(self, weight: float) -> Objective:
        return replace(self, weight=weight * self.weight)

    @property
    def needs_features(self) -> bool:
        """Whether the objective compares features besides logits."""
        return self.name in OF_FEATURES


def kd(temperature: float) -> Objective:
    """τ²·KL(p_T ‖ p_S) of the softmax of logits divided by τ, the `temperature`; mean over the batch (Hinton et al.
    2015).

    τ² keeps the gradient's size the same at every temperature. Raises `BadInput` where τ is not positive and finite.
    """

    if not 0 < temperature < math.inf:
        raise BadInput(f"--temperature {temperature} is not positive.", "4 is usual.")

    def value(student: Prediction, teacher: Prediction) -> Tensor:
        student_log, teacher_log = ((each.logits / temperature).log_softmax(1) for each in (student, teacher))
        return F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean") * temperature**2

    return Objective("kd", value)


def ce() -> Objective:
    """Cross-entropy of the student with the teacher's best class as the label, mean over the batch."""
    return Objective("ce", lambda student, teacher: F.cross_entropy(student.logits, teacher.logits.argmax(1)))


def mse_logits() -> Objective:
    """Mean squared difference between the student's and the teacher's logits (Ba and Caruana 2014)."""
    return Objective("mse-logits", lambda student, teacher: F.mse_loss(student.logits, teacher.logits))


def feature(pairs: Sequence[tuple[Stage, Stage]]) -> Objective:
    """Mean squared difference between the student's features, mapped by a trained 1×1 convolution, and the teacher's
    features, divided for each image by the variance of the teacher's features.

    The mean runs over images and over the stages (student's, teacher's) in `pairs` (after Romero et al. 2015, who take
    one stage and pretrain on it). Where both stages have the same number of channels, the convolution begins as the
    identity and has no bias.
    """
    distance = _FeatureDistance(_adapter(student.channels, teacher.channels) for student, teacher in pairs)
    return Objective("feature", distance, adapters=distance)


class _FeatureDistance(nn.ModuleList):
    """The 1×1 convolutions of all stages, and the value of the objective `feature` that uses them. A closure over the
    convolutions would share them with a deep copy of the objective; a module is copied with them.
    """

    def forward(self, student: Prediction, teacher: Prediction) -> Tensor:
        """The mean over the stages of the differences, each as a share of the teacher's variance."""
        adapted = [adapter(features) for adapter, features in zip(self, student.features, strict=True)]
        pairs = zip(adapted, teacher.features, strict=True)
        return torch.stack([_share_of_variance(ours.float(), theirs) for ours, theirs in pairs]).mean()


def _adapter(student_channels: int, teacher_channels: int) -> nn.Conv2d:
    adapter = nn.Conv2d(student_channels, teacher_channels, 1, bias=student_channels != teacher_channels)
    if student_channels == teacher_channels:
        nn.init.dirac_(adapter.weight)
    return adapter


def _share_of_variance(student: Tensor, teacher: Tensor) -> Tensor:
    errors = (student - teacher).square().mean((1, 2, 3))
    return (errors / teacher.var((1, 2, 3)).clamp_min(1e-6)).mean()


def iq() -> Objective:
    """Smooth-L1 distance between the student's and the teacher's features, summed over the elements of an image, mean
    over images and stages: the intermediate quantization loss of Haroush et al. 2020, section 4.2. Student and teacher
    must have the same number of channels.

    The paper weighs "the mean of the smoothed-l1 outputs" by 0.001 and does not say over what the mean runs. As a mean
    over all elements, the term would have 1.3e-5 of kd's gradient (ResNet-20, 4w4a) and no effect. Summed over an
    image, it is 0.34 beside kd's 0.99 on the same network, so we use the sum.
    """

    def value(student: Prediction, teacher: Prediction) -> Tensor:
        pairs = zip(student.features, teacher.features, strict=True)
        distances = [F.smooth_l1_loss(ours, theirs, reduction="sum") / len(ours) for ours, theirs in pairs]
        return torch.stack(distances).mean()

    return Objective("iq", value)


def attention() -> Objective:
    """Squared distance between normalised attention maps, mean over batch and stages (Zagoruyko and Komodakis 2017).

    A stage's map is Σ_c A_c², flattened and divided by its L2 norm.
    """

    def attended(features: Tensor) -> Tensor:
        return F.normalize(features.square().mean(1).flatten(1))

    def value(student: Prediction, teacher: Prediction) -> Tensor:
        pairs = zip(student.features, teacher.features, strict=True)
        distances = [(attended(ours) - attended(theirs)).square().sum(1).mean() for ours, theirs in pairs]
        return torch.stack(distances).mean()

    return Objective("attention", value)


def make_objectives(
    weights: Mapping[str, float], *, temperature: float, pairs: Sequence[tuple[Stage, Stage]], seed: int
) -> list[Objective]:
    """Make an objective for each name in `weights`, with its weight.

    `pairs` are the stages (student's, teacher's) whose features are compared; `seed` decides the first weights of the
    adapters; `temperature` is for kd.
    Raises `BadInput` for an unknown name, a weight that is not positive and finite, weights without an objective of
    logits, and `iq` with stages of different numbers of channels.
    """
    if all(name in OF_FEATURES for name in weights):
        raise BadInput("No objective compares the student's logits.", "Add kd, ce or mse-logits.")
    objectives = []
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise BadInput(f"There is no objective {name!r}.", f"Known: {', '.join(OBJECTIVES)}.")
        if name == "iq" and any(ours.channels != theirs.channels for ours, theirs in pairs):
            raise BadInput("Objective iq compares equally many channels.", "Use feature, which adapts them.")
        if not 0 < weight < math.inf:
            raise BadInput(f"The weight {weight} of objective {name} is not positive.", "Leave the objective out.")
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            objectives.append(weight * _make(name, temperature, pairs))
    return objectives


def _make(name: str, temperature: float, pairs: Sequence[tuple[Stage, Stage]]) -> Objective:
    if name == "kd":
        return kd(temperature)
    if name == "feature":
        return feature(pairs)
    return {"ce": ce, "mse-logits": mse_logits, "attention": attention, "iq": iq}[name]()
