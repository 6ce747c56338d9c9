"""`evaluate`: accuracy of checkpoints on real images, and their agreement.

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
from dfcompress.data.image_source import ImageSource
from dfcompress.data.real import open_images
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
    """The accuracy of one checkpoint; every share is in [0, 1].

    `checkpoint`: path or name. `correct`: number of correct images of `total`. `top1`: their share.
    `standard_error`: of `top1`. `top5`: top-5 accuracy, None for fewer than five classes. `agreement`: share of images
    for which it predicts the same class as the first checkpoint, None where there is no such comparison or the class
    names differ. `images`: after merging, the teacher whose images these are, or `all`; after extending, `old`, `new`
    or `all` classes; else None.
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
        """The fields as `--json` prints them, without `images` where it is None."""
        values = asdict(self)
        return values if self.images is not None else {name: values[name] for name in values if name != "images"}


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The accuracy on one old class before and after a model was extended.

    `name`: the class. `total`: number of its images. `before`: accuracy, in [0, 1], of the old model among the old
    classes. `after`: accuracy of the extended model among all classes.
    """

    name: str
    total: int
    before: float
    after: float


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    `results`: scores, for `evaluate` one for each checkpoint in the order given. `fail_under`: the smallest top-1
    accuracy, in [0, 1], that `check_gate` accepts, None for no limit. `forgetting`: after extending, the accuracy on
    every old class of the images; else None.
    """

    results: list[Score]
    fail_under: float | None = None
    forgetting: list[Forgetting] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them, without `fail_under`, and without `forgetting` where it is None."""
        values: dict[str, Any] = {"results": [score.to_json() for score in self.results]}
        if self.forgetting is not None:
            values["forgetting"] = [asdict(each) for each in self.forgetting]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """Read an evaluation from the values of `to_json`."""
        forgetting = [Forgetting(**each) for each in values["forgetting"]] if "forgetting" in values else None
        return cls([Score(**score) for score in values["results"]], forgetting=forgetting)

    def check_gate(self) -> None:
        """Raise `GateNotMet` where the top-1 accuracy of any checkpoint is below `fail_under`."""
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
    """Count the correct predictions of one checkpoint, or of several, on labelled images, in fp32.

    - `checkpoints`: one model or several; agreement is counted with the first.
    - `data`: an ImageFolder, an `.npz`, IDX files, the batches of CIFAR or a synthetic set.
    - `device`: `auto`, `cpu`, `cuda` or `cuda:N`. `batch_size`: number of images that a network computes at once.
    - `fail_under`: smallest accepted top-1 accuracy, a share in [0, 1]; a number above 1 is read as percent. It is only
      stored in the result; `Evaluation.check_gate` raises.

    All models and images are loaded and checked before any model runs. Raises `BadInput` for a checkpoint, data or a
    number that cannot be used, and for checkpoints with different numbers of classes.
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
    """An accuracy in [0, 1] from a share, or from percent where `fail_under` is above 1.

    Raises `BadInput` for a number below 0 or above 100.
    """
    if not 0 <= fail_under <= 100:
        raise BadInput(
            f"--fail-under must be an accuracy; it is {fail_under:g}.",
            "Give a share such as 0.9, or percent such as 90.",
        )
    # Decimal, so that 99.9 percent is the same number as 999 of 1,000.
    return fail_under if fail_under <= 1 else float(Decimal(str(fail_under)) / 100)


def _check_same_classes(names: Sequence[str], classifiers: Sequence[Classifier]) -> None:
    first = classifiers[0].card.classes
    for name, classifier in zip(names, classifiers, strict=True):
        if classifier.card.classes != first:
            raise BadInput(
                f"{names[0]} has {first} classes, {name} has {classifier.card.classes}.", "Compare them separately."
            )


def _open_for_each(data: str | Path, classifiers: Sequence[Classifier]) -> list[ImageSource]:
    """The images in the form that each model needs; models that need the same form share one source."""
    wanted = [(classifier.card.input_size, classifier.card.class_names) for classifier in classifiers]
    sources = {want: open_images(data, classifiers[wanted.index(want)].card) for want in dict.fromkeys(wanted)}
    return [sources[want] for want in wanted]


def _with_classes_of(card: ModelCard, predictions: Predictions, own: ModelCard) -> Predictions | None:
    """The predictions of the model with the card `own`, as class indices of the model with `card`; classes are matched
    by name. None where the two models have different class names.
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
    """The same batches; `progress` is updated after each batch was used."""
    done = 0
    for images, labels in batches:
        yield images, labels
        done += len(images)
        progress.update(done)


@contextmanager
def placed(classifier: Classifier, target: torch.device) -> Iterator[None]:
    """Move the classifier to the device `target` inside the block, and back afterwards, so that only one model occupies
    the device at a time.
    """
    home = classifier.mean.device
    classifier.to(target)
    try:
        yield
    finally:
        classifier.to(home)


def score(name: str, predictions: Predictions, first: Predictions | None, *, images: str | None = None) -> Score:
    """The score of a checkpoint's predictions; `agreement` is with the predictions `first`, and None without them."""
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
