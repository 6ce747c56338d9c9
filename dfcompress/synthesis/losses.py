"""What the images are asked to minimise: one function a loss, reduced exactly as its paper reduces it.

    losses = [class_cross_entropy(), 10.0 * bn_distance(), 2.5e-5 * total_variation()]

A loss is a scalar of a `Trace`; weighting it keeps its name in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress.models.recorder import Trace


@dataclass(frozen=True)
class Loss:
    """A named, weighted scalar of a `Trace`, and what it needs to be there."""

    name: str
    value: Callable[[Trace], Tensor]
    weight: float = 1.0
    needs_moments: bool = False
    needs_labels: bool = False

    def __rmul__(self, weight: float) -> Loss:
        return replace(self, weight=weight * self.weight)


def class_cross_entropy() -> Loss:
    """Cross-entropy of the teacher's logits against the intended class, mean over the batch (Yin 2020, L(x̂, y))."""
    return Loss("cross_entropy", lambda trace: F.cross_entropy(trace.logits, trace.labels), needs_labels=True)


def bn_distance() -> Loss:
    """Σ_l ‖μ_l − BN mean‖₂ + ‖σ²_l − BN var‖₂ over BatchNorm inputs; norms over channels, not squared (Yin 2020)."""

    def value(trace: Trace) -> Tensor:
        terms = [
            torch.linalg.vector_norm(moments.mean_error) + torch.linalg.vector_norm(moments.var - moments.running_var)
            for moments in trace.moments
        ]
        return torch.stack(terms).sum()

    return Loss("bn_distance", value, needs_moments=True)


def total_variation() -> Loss:
    """Sum over the directions →, ↓, ↘, ↙ of the L2 norm of the shifted difference (Yin 2020, R_TV, as coded).

    The norm runs over the whole batch tensor, so the value grows with the square root of the batch size.
    """

    def value(trace: Trace) -> Tensor:
        images = trace.images
        differences = (
            images[..., :, 1:] - images[..., :, :-1],
            images[..., 1:, :] - images[..., :-1, :],
            images[..., 1:, 1:] - images[..., :-1, :-1],
            images[..., 1:, :-1] - images[..., :-1, 1:],
        )
        return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()

    return Loss("total_variation", value)


def image_norm() -> Loss:
    """‖x̂‖₂ of the whole batch in normalised space (Yin 2020, R_l2, as coded for CIFAR)."""
    return Loss("image_norm", lambda trace: torch.linalg.vector_norm(trace.images))
