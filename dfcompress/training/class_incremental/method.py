"""`IncrementalMethod`: a distiller of an old model and labelled images, and what belongs to it where nothing else is
asked for.
"""

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

OLD, NEW = 0, 1  # The sources of a batch: images that stand for the old classes, and the labelled ones of the new.


@dataclass(frozen=True, kw_only=True)
class ExtensionTask:
    """What a method is told: the `old` model, the `student`, which has its outputs first, and a model of the new
    classes alone (`expert`), where the method asks for one.

    `class_weights` `(classes,)` weigh the images of a class so that all classes count the same in a batch; `steps` is
    the length of the training; `seed` is for what a method initialises itself.
    """

    old: Classifier
    student: Classifier
    expert: Classifier | None
    class_weights: Tensor
    steps: int
    seed: int

    @property
    def known(self) -> int:
        """How many classes the old model has: the student's outputs below this number are its own."""
        return self.old.card.classes

    @property
    def shares(self) -> tuple[float, float]:
        """The shares of the old and of the new classes among all."""
        old = self.known / self.student.card.classes
        return old, 1 - old


@dataclass(frozen=True, kw_only=True)
class IncrementalMethod:
    """A way to extend.

    With `replays` a batch holds images that stand for the old classes beside the labelled ones of the new; they are
    real ones where the method is `real`. With `expert` a model of the new classes alone is trained first. The usual
    training lasts until every new image came so often as there are `passes`, if it is not longer by itself.
    """

    distiller: Callable[[ExtensionTask], Distiller]
    training: Training
    replays: bool = True
    real: bool = False
    expert: bool = False
    passes: int = 0


def usual_training(steps: int = 1000) -> Training:
    """A short training, in which the methods were compared.

    Augmentation is as usual for labelled images (shifts and, in colour, flips); nothing is mixed, because labels would
    not follow.
    """
    return Training(steps=steps, lr=0.05, batch_size=128, augmentation=Augmentation(shift=4, flip=True))


def answer_by_source(student: nn.Module, batch: Batch) -> Tensor:
    """The student's logits, `(N, classes)`; replayed images, which come first, and new ones go through it in passes of
    their own, so that BatchNorm cannot tell them apart.
    """
    kinds = (batch.sources != NEW, batch.sources == NEW)
    return torch.cat([student(batch.images[kind]) for kind in kinds if kind.any()]).float()


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Cross-entropy of each image `(N,)` times the weight of its class; 0 for an image without a label."""
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED) * class_weights[labels]


def kl_divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax of the targets ‖ softmax of the logits) of each image, `(N,)`."""
    return F.kl_div(logits.log_softmax(1), target_logits.log_softmax(1), log_target=True, reduction="none").sum(1)


class Head:
    """The last layer of a classifier, whose output is its answer, and the features `(N, F)` that it takes.

    Raises `BadInput` where the network does something between its last layer and its answer.
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
        """How many features the layer takes."""
        assert isinstance(self.layer, nn.Linear)
        return self.layer.in_features

    @contextmanager
    def attached(self) -> Iterator[Head]:
        """Inside, every forward pass of the classifier leaves its features for `taken`."""
        with hooked_inputs(self.classifier.network, [self.name], self._note):
            try:
                yield self
            finally:
                self._seen.clear()

    def taken(self) -> Tensor:
        """The features of all passes since they were taken last, in fp32."""
        features = torch.cat(self._seen).float()
        self._seen.clear()
        return features

    def answer(self, features: Tensor) -> Tensor:
        """The logits of features, in fp32."""
        layer = self.layer
        assert isinstance(layer, nn.Linear)
        return F.linear(features, layer.weight, layer.bias).float()

    def _note(self, name: str, features: Tensor) -> None:
        self._seen.append(features)
