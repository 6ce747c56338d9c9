"""What a classifier answers, and how often it is right."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfcompress.data.real import ImageSource
from dfcompress.device import exact_fp32, threads, threads_for
from dfcompress.errors import DfcompressError
from dfcompress.models.classifier import Classifier, evaluating, images_a_pass, work_of
from dfcompress.models.recorder import HookRecorder, LayerMoments, Moments

TOP = 5
BATCH = 256  # Images of a batch, usually; what threads are chosen by.


@dataclass(frozen=True)
class Predictions:
    """A classifier's best classes `(N, up to 5)`, best first, and the labels `(N,)`; int64, on the CPU."""

    classes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def correct(self, k: int = 1) -> int:
        """How many labels are among the `k` best classes."""
        return int((self.classes[:, :k] == self.labels[:, None]).any(1).sum())

    def agreement(self, other: Predictions) -> float:
        """The share of images, in [0, 1], on which both give the same best class."""
        return float((self.classes[:, 0] == other.classes[:, 0]).double().mean())


@torch.no_grad()
def predict(classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> Predictions:
    """Ask a classifier, in fp32 and evaluation mode, about float images `(N, C, H, W)` in [0, 1] with labels.

    Of a batch, as many images as fit into memory are in the network at once.
    Raises `DfcompressError` where it answers with something that is not a number.
    """
    device, k = classifier.mean.device, min(TOP, classifier.card.classes)
    classes, labels = [], []
    with evaluating(classifier), exact_fp32(), threads(threads_for(BATCH * work_of(classifier))):
        fit = images_a_pass(classifier)
        for images, truth in batches:
            labels.append(truth.cpu())
            for some in images.split(fit):
                logits = classifier(some.to(device))
                if not logits.isfinite().all():
                    problem = "The network answers with NaN or infinity."
                    raise DfcompressError(problem, "Its weights or its card are wrong.")
                classes.append(logits.topk(k).indices.cpu())
    return Predictions(torch.cat(classes), torch.cat(labels))


def share_correct(classifier: Classifier, source: ImageSource, *, batch_size: int = BATCH) -> float:
    """Top-1 accuracy in [0, 1]."""
    return predict(classifier, source.batches(batch_size)).correct() / len(source)


@torch.no_grad()
def bn_divergence(classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """J_KL of a whole set: how far its BatchNorm inputs are from the running statistics (Haroush 2020, section 3.3).

    `batches` are float images `(N, C, H, W)` in [0, 1] with labels. Mean over channels, then over BatchNorm layers, of
    KL(N(μ̂, σ̂²) ‖ N(μ, σ²)), where the hats are taken over all images at once and σ̂² is biased.

    Compare it between sets of the same classes and of about one size. The classes count most: of 128 real images of two
    of CIFAR-10's ten classes it is 0.041 on ResNet-44 (0.037 on ResNet-20), of 128 of all ten 0.023 (0.017). The size
    adds 6 to 8 % at 128 images to what 1,000 have, and 47 to 89 % at 16.
    """
    device = classifier.mean.device
    sums: list[LayerMoments] = []
    seen = 0
    recorder = HookRecorder(classifier.network, moments=True)
    with evaluating(classifier), exact_fp32(), threads(threads_for(BATCH * work_of(classifier))):
        fit = images_a_pass(classifier)
        for some in (some for images, _ in batches for some in images.split(fit)):
            layers = recorder(classifier.normalise(some.to(device))).layers
            new = [_with_errors(layer, layer.mean_error.sum(0), layer.square_error.sum(0)) for layer in layers]
            sums = [_plus(one, other) for one, other in zip(sums, new, strict=True)] if sums else new
            seen += len(some)
    pooled = [_with_errors(layer, layer.mean_error[None] / seen, layer.square_error[None] / seen) for layer in sums]
    return float(Moments.of(pooled).divergences().mean())


def _plus(one: LayerMoments, other: LayerMoments) -> LayerMoments:
    return _with_errors(one, one.mean_error + other.mean_error, one.square_error + other.square_error)


def _with_errors(layer: LayerMoments, mean_error: Tensor, square_error: Tensor) -> LayerMoments:
    return layer._replace(mean_error=mean_error, square_error=square_error)


def standard_error(correct: int, total: int) -> float:
    """The standard error of the share `correct / total`: √(p (1 − p) / n)."""
    share = correct / total
    return math.sqrt(share * (1 - share) / total)
