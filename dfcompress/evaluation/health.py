"""Checks of images that need no data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dfcompress.device import exact_fp32
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import HookRecorder, Moments


@torch.no_grad()
def bn_divergence(classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """J_KL of a whole set: how far its BatchNorm inputs are from the running statistics (Haroush 2020, section 3.3).

    `batches` are float images `(N, C, H, W)` in [0, 1] with labels. Mean over channels, then over BatchNorm layers, of
    KL(N(μ̂, σ̂²) ‖ N(μ, σ²)), where the hats are taken over all images at once and σ̂² is biased.
    The value falls with the number of images, so it is only comparable between sets of one size.
    """
    device = classifier.mean.device
    pooled: list[Moments] = []
    seen = 0
    with exact_fp32(), HookRecorder(classifier.network, moments=True) as recorder:
        for images, labels in batches:
            trace = recorder(classifier.normalise(images.to(device)), labels)
            pooled = [
                _pool(old, seen, new, len(images))
                for old, new in zip(pooled or trace.moments, trace.moments, strict=True)
            ]
            seen += len(images)
    return float(torch.stack([moments.divergence() for moments in pooled]).mean())


def _pool(old: Moments, old_count: int, new: Moments, new_count: int) -> Moments:
    share = new_count / (old_count + new_count)
    mean_error = torch.lerp(old.mean_error, new.mean_error, share)
    second = torch.lerp(old.var + old.mean_error**2, new.var + new.mean_error**2, share)
    return Moments(mean_error, second - mean_error**2, old.running_mean, old.running_var)
