"""`evaluate`: how often checkpoints are right on real images, and how often they agree.

dfcompress.evaluate(["resnet20.pt"], data="cifar10-test.npz").results
dfcompress.evaluate(["resnet20.pt", "resnet20-quantize"], data="images", fail_under=0.9).check_gate()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.real import ImageSource, open_images
from dfcompress.errors import BadInput, GateNotMet
from dfcompress.evaluation.metrics import TOP, Predictions, predict, standard_error
from dfcompress.machine.device import resolve_device
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.settings import one_or_more
from dfcompress.verbs._verb import verb


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often a checkpoint is right: on `correct` of `total` images; every share is in [0, 1].

    `top1` has its `standard_error`; `top5` is None for fewer than five classes. `agreement` is the share of images on
    which it answers as the first checkpoint does, None where there is nobody to agree with. After merging, `images`
    names the teacher whose images they are, or `all`; after extending, whether they are of `old` or `new` classes, or
    of `all`; else it is None.
    """

    checkpoint: str
    correct: int
    total: int
    top1: float
    standard_error: float
    top5: float | None
    agreement: float | None
    images: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them; `images` only where it is known."""
        values = asdict(self)
        return values if self.images is not None else {name: values[name] for name in values if name != "images"}


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The shares, in [0, 1], of the `total` images of an old class that were right `before` a model was extended, among
    its own classes, and are right `after`, among all.
    """

    name: str
    total: int
    before: float
    after: float


@dataclass(frozen=True)
class Evaluation:
    """One `Score` a checkpoint, in the order given; after extending, `forgetting` has every old class of the images."""

    results: list[Score]
    fail_under: float | None = None
    forgetting: list[Forgetting] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them; `forgetting` only where it is known."""
        values: dict[str, Any] = {"results": [score.to_json() for score in self.results]}
        if self.forgetting is not None:
            values["forgetting"] = [asdict(each) for each in self.forgetting]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_json` gave."""
        forgetting = [Forgetting(**each) for each in values["forgetting"]] if "forgetting" in values else None
        return cls([Score(**score) for score in values["results"]], forgetting=forgetting)

    def check_gate(self) -> None:
        """Raise `GateNotMet` where the top-1 of any checkpoint is below `fail_under`."""
        for score in self.results:
            if self.fail_under is not None and score.top1 < self.fail_under:
                raise GateNotMet(
                    f"{score.checkpoint} is right on {score.top1:.2%} of the images, "
                    f"below --fail-under {self.fail_under:.2%}."
                )


@verb
def evaluate(
    checkpoints: str | Path | Classifier | Sequence[str | Path | Classifier],
    *,
    data: str | Path,
    device: str = "auto",
    batch_size: int = 256,
    fail_under: float | None = None,
) -> Evaluation:
    """Count the right answers of a checkpoint, or of each of several, on the images at `data`, in fp32.

    `data` is an ImageFolder, an `.npz`, IDX files, the batches of CIFAR or a synthetic set. Everything is loaded and
    checked before anything runs. `fail_under` is a share in [0, 1]; a number above 1 is read as percent. The result
    carries it, and `Evaluation.check_gate` raises, so that the counts are there either way.
    Raises `BadInput` for a checkpoint, data or number that cannot be used, and for unequal numbers of classes.
    """
    gate = None if fail_under is None else as_share(fail_under)
    classifiers = [as_classifier(checkpoint) for checkpoint in one_or_more(checkpoints)]
    if not classifiers:
        raise BadInput("No checkpoint was given.", "Name at least one.")
    target = resolve_device(device)
    names = [str(classifier.path or classifier.name) for classifier in classifiers]
    _check_same_classes(names, classifiers)
    sources = _open_for_each(data, classifiers)
    predicted = [
        _predict(name, classifier, source, target, batch_size)
        for name, classifier, source in zip(names, classifiers, sources, strict=True)
    ]
    first = [_with_classes_of(classifier.card, predicted[0], classifiers[0].card) for classifier in classifiers]
    return Evaluation([score(*each) for each in zip(names, predicted, first, strict=True)], gate)


def as_share(fail_under: float) -> float:
    """An accuracy in [0, 1] from a share, or from percent where it is above 1; raises `BadInput` for others."""
    if not 0 <= fail_under <= 100:
        raise BadInput(
            f"--fail-under {fail_under:g} is no accuracy.", "Give a share such as 0.9, or percent such as 90."
        )
    # Decimal: 99.9 percent is to be the same number as 999 of 1,000.
    return fail_under if fail_under <= 1 else float(Decimal(str(fail_under)) / 100)


def _check_same_classes(names: Sequence[str], classifiers: Sequence[Classifier]) -> None:
    first = classifiers[0].card.classes
    for name, classifier in zip(names, classifiers, strict=True):
        if classifier.card.classes != first:
            raise BadInput(
                f"{names[0]} has {first} classes, {name} has {classifier.card.classes}.", "Compare them separately."
            )


def _open_for_each(data: str | Path, classifiers: Sequence[Classifier]) -> list[ImageSource]:
    """The images as each model wants them; models that want the same share one source, and its notices."""
    wanted = [(classifier.card.input_size, classifier.card.class_names) for classifier in classifiers]
    sources = {want: open_images(data, classifiers[wanted.index(want)].card) for want in dict.fromkeys(wanted)}
    return [sources[want] for want in wanted]


def _with_classes_of(card: ModelCard, predictions: Predictions, own: ModelCard) -> Predictions | None:
    """The predictions of a model whose card is `own` as numbers of another's classes, by name where the names differ;
    None where the classes do.
    """
    names, own_names = card.class_names, own.class_names
    if not names or not own_names or names == own_names:
        return predictions
    if set(names) != set(own_names):
        return None
    numbers = torch.tensor([names.index(name) for name in own_names])
    return replace(predictions, classes=numbers[predictions.classes])


def _predict(
    name: str, classifier: Classifier, source: ImageSource, target: torch.device, batch_size: int
) -> Predictions:
    with placed(classifier, target), console.progress(f"images of {name}", len(source)) as progress:
        return predict(classifier, counted(source.batches(batch_size), progress))


def counted(batches: Iterator[tuple[Tensor, Tensor]], progress: console.Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches themselves, told to `progress` when they are done with."""
    done = 0
    for images, labels in batches:
        yield images, labels
        done += len(images)
        progress.update(done)


@contextmanager
def placed(classifier: Classifier, target: torch.device) -> Iterator[None]:
    """Lend the classifier to a device and bring it home, so that only one model is on it at a time."""
    home = classifier.mean.device
    classifier.to(target)
    try:
        yield
    finally:
        classifier.to(home)


def score(name: str, predictions: Predictions, first: Predictions | None, *, images: str | None = None) -> Score:
    """The score of a checkpoint's answers; without `first` there is nobody to agree with."""
    correct, total = predictions.correct(), len(predictions)
    return Score(
        checkpoint=name,
        correct=correct,
        total=total,
        top1=correct / total,
        standard_error=standard_error(correct, total),
        top5=predictions.correct(TOP) / total if predictions.classes.shape[1] == TOP else None,
        agreement=predictions.agreement(first) if first else None,
        images=images,
    )
