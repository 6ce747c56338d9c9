"""`IncrementalMethod`: a distiller for an old model and labelled images of new classes, and its default settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.batches import UNLABELLED, Batch
from dfcompress.data.pool import Augmentation
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_inputs, hooked_outputs
from dfcompress.models.layers import last_weighted_layer
from dfcompress.training.distiller import Distiller
from dfcompress.training.settings import Training

OLD, NEW = 0, 1  # `Batch.sources`: replayed images that stand for old classes, and labelled images of new classes.


@dataclass(frozen=True, kw_only=True)
class ExtensionTask:
    """The input of a method: the `old` model, the `student`, whose first outputs are the old classes, and the `expert`,
    a model of the new classes alone, if the method needs one.

    `class_weights` `(classes,)` weigh the images of each class so that all classes count the same in a batch. `steps`
    is the length of the training. `seed` initialises the method's own parameters.
    """

    old: Classifier
    student: Classifier
    expert: Classifier | None
    class_weights: Tensor
    steps: int
    seed: int

    @property
    def known(self) -> int:
        """The number of classes of the old model; the student's outputs below this number are the old classes."""
        return self.old.card.classes

    @property
    def shares(self) -> tuple[float, float]:
        """The share of the old classes among all classes, and the share of the new classes."""
        old = self.known / self.student.card.classes
        return old, 1 - old


@dataclass(frozen=True, kw_only=True)
class IncrementalMethod:
    """A method of extension: a function that makes its distiller, and its default `training`.

    With `replays` a batch holds images that stand for the old classes beside the labelled images of new classes; these
    replayed images are real if the method is `real`. With `expert` a model of the new classes alone is trained first.
    The default training is lengthened, if necessary, until every new image has been shown `passes` times.
    """

    distiller: Callable[[ExtensionTask], Distiller]
    training: Training
    replays: bool = True
    real: bool = False
    expert: bool = False
    passes: int = 0


def usual_training(steps: int = 1000) -> Training:
    """The default settings of the methods, in which they were compared: a short training.

    Images are shifted by up to 4 pixels and flipped. Mixup is off, because it would not mix the labels.
    """
    return Training(steps=steps, lr=0.05, batch_size=128, augmentation=Augmentation(shift=4, flip=True))


def answer_by_source(student: nn.Module, batch: Batch) -> Tensor:
    """The student's logits `(N, classes)`. Replayed images, which come first in a batch, and new images go through the
    student in separate passes, so that BatchNorm cannot tell them apart.
    """
    kinds = (batch.sources != NEW, batch.sources == NEW)
    return torch.cat([student(batch.images[kind]) for kind in kinds if kind.any()]).float()


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """The cross-entropy of each image times the weight of its class, `(N,)`; 0 for an image without a label."""
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED) * class_weights[labels]


def kl_divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target_logits) ‖ softmax(logits)) of each image, `(N,)`."""
    return F.kl_div(logits.log_softmax(1), target_logits.log_softmax(1), log_target=True, reduction="none").sum(1)


class Head:
    """The last layer of a classifier, whose output are the logits, and its input, the features `(N, F)`.

    Raises `BadInput` where the last layer is not linear, or where the network changes its output before the logits.
    """

    REMEDY: ClassVar[str] = "Use --method deepinversion, which looks at answers alone."

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.name = classifier, last_weighted_layer(classifier)
        self.layer: nn.Module = classifier.network.get_submodule(self.name)
        answers: list[Tensor] = []
        self._seen: list[Tensor] = []
        with hooked_outputs(classifier.network, [self.name], lambda name, output: answers.append(output)):
            logits = pass_once(classifier)
        if not isinstance(self.layer, nn.Linear) or not torch.equal(answers[-1], logits):
            kind, architecture = type(self.layer).__name__, classifier.card.architecture
            raise BadInput(f"The answer of {architecture} is not what its last layer ({kind}) gives.", self.REMEDY)

    @property
    def width(self) -> int:
        """The number of features F that the layer takes."""
        assert isinstance(self.layer, nn.Linear)
        return self.layer.in_features

    @contextmanager
    def attached(self) -> Iterator[Head]:
        """Inside, every forward pass of the classifier stores its features for `taken`."""
        with hooked_inputs(self.classifier.network, [self.name], self._note):
            try:
                yield self
            finally:
                self._seen.clear()

    def taken(self) -> Tensor:
        """The features `(N, F)` of all passes since the last call, in fp32."""
        features = torch.cat(self._seen).float()
        self._seen.clear()
        return features

    def answer(self, features: Tensor) -> Tensor:
        """The logits of features `(N, F)`, in fp32."""
        layer = self.layer
        assert isinstance(layer, nn.Linear)
        return F.linear(features, layer.weight, layer.bias).float()

    def _note(self, name: str, features: Tensor) -> None:
        self._seen.append(features)
