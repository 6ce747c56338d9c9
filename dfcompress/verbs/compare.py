"""`compare`: evaluate several models on several sets of images, and test whether they differ by more than chance.

dfcompress.compare(["resnet20.pt", "resnet20-quantize"], sets=["cifar10-test.npz"]).differences
dfcompress.compare(["resnet44.pt"], sets=["test.npz", "images", "random", "fgsm:test.npz"], own="test.npz").results
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.batches import UNLABELLED
from dfcompress.data.fitted import Fitted
from dfcompress.data.image_folder import ImageFolder
from dfcompress.data.image_source import ImageSource
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import Observation, calibration_error, observe, standard_error
from dfcompress.evaluation.pairs import NOISE, difference_interval, mcnemar, moves, tail_degradation
from dfcompress.evaluation.probes import attacked, noise, require_gradient
from dfcompress.machine.device import resolve_device
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.models.statistics import why_no_statistics
from dfcompress.settings import one_or_more
from dfcompress.synthesis.transfer_set import parts_of
from dfcompress.verbs._comparison import Change, ComparedModel, Comparison, Difference, ModelOnSet, Outlier
from dfcompress.verbs._verb import verb
from dfcompress.verbs.evaluate import counted, placed

RANDOM, FGSM, ALONE = "random", "fgsm:", "images:"
RANDOM_IMAGES = 1024  # J_KL of 256, 1,024 and 4,096: 0.490 each on ResNet-20; 0.468, 0.478 and 0.479 on LeNet-5.
SETS = "Name images, synthetic sets or run folders, random, or fgsm: before one of them."


@verb
def compare(
    checkpoints: str | Path | Classifier | Sequence[str | Path | Classifier],
    *,
    sets: str | Path | Sequence[str | Path],
    own: str | Path | Sequence[str | Path] | None = None,
    epsilon: float = 0.1,
    outliers: int = 0,
    tail_by: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 256,
) -> Comparison:
    """Evaluate every model on every set in fp32, and compare all models with the first.

    - `checkpoints`: one model or several; the first is the reference.
    - `sets`: one set or several: images as `evaluate` takes them; a run folder (all its synthetic sets together);
      `random` (N(0, 1) noise in each model's normalised space); `fgsm:SET` (the set attacked by each model's own
      gradient); or `images:SET` (the set without its labels). Labels that do not fit a model are ignored.
    - `own`: the set that represents the training distribution, one for all models or one per model; each must be in
      `sets`. The result then also has J_KL divided by J_KL on that set. A model whose `own` set differs from the first
      model's is not compared with the first model. Labels of a set that is another model's `own` set are ignored.
    - `epsilon`: step of the FGSM attack in each model's normalised space, above 0.
    - `outliers`: number of images with the largest spread score that are listed for each set.
    - `tail_by`: one of `sets`; the first model's mean predictions on it order the classes for the tail degradation.
      Default: for each set the set itself.
    - `device`: `auto`, `cpu`, `cuda` or `cuda:N`. `batch_size`: number of images read at once.

    Raises `BadInput`, before any model runs, for a checkpoint, a set or a number that cannot be used.
    """
    if not checkpoints:
        raise BadInput("No checkpoint was given.", "Name at least one.")
    if not sets:
        raise BadInput("No set of images was given.", f"{SETS} The models stand before --sets.")
    if not 0 < epsilon < float("inf"):
        raise BadInput(f"--epsilon must be above 0; it is {epsilon:g}.", "Give a number above 0, such as 0.1.")
    target = resolve_device(device)
    names = list(dict.fromkeys(map(str, one_or_more(sets))))
    classifiers = [as_classifier(checkpoint) for checkpoint in one_or_more(checkpoints)]
    owned = _owned(own, names, len(classifiers))
    order_by = _listed(tail_by, "--tail-by", names) if tail_by is not None else None
    called = _different([str(each.path or each.name) for each in classifiers])
    models = [
        _described(name, each, belongs, classifiers[0], owned[0])
        for name, each, belongs in zip(called, classifiers, owned, strict=True)
    ]
    asked = [_Asked.of(name) for name in names]
    if any(each.attack for each in asked):
        for classifier in classifiers:
            require_gradient(classifier)
    opener = _Opener(classifiers, models)
    shown = zip(*[opener.open(each) for each in asked], strict=True)
    answers = []
    for model, classifier, row in zip(models, classifiers, shown, strict=True):
        seen = [_observed(classifier, one, target, batch_size, epsilon, outliers) for one in row]
        base = seen[names.index(model.own)].divergence if model.own else None
        answers.append(
            [
                _Answers(_result(model, one, observed, base, outliers), one, observed)
                for one, observed in zip(row, seen, strict=True)
            ]
        )
    differences = []
    for model, row_of_answers in zip(models[1:], answers[1:], strict=True):
        for number, now in enumerate(row_of_answers if model.compared else []):
            by = answers[0][names.index(order_by) if order_by else number].seen
            differences.append(_difference(now, answers[0][number], by.soft.argsort().tolist()))
    return Comparison(
        models=models,
        sets=names,
        results=[each.result for row in answers for each in row],
        differences=differences,
    )


def _listed(name: str | Path, option: str, names: Sequence[str]) -> str:
    if str(name) not in names:
        raise BadInput(f"{option} {name} is not one of the sets: {', '.join(names)}.", "Name it among --sets, too.")
    return str(name)


def _owned(own: str | Path | Sequence[str | Path] | None, names: Sequence[str], models: int) -> list[str | None]:
    """The `own` set of each model, None for all where none was given."""
    found = [_listed(each, "--own", names) for each in one_or_more(own or ())]
    if len(found) not in (0, 1, models):
        raise BadInput(f"--own names {len(found)} sets for {models} models.", "Name one for all, or one for each.")
    if len(found) == 1:
        found *= models
    return [*found] or [None] * models


@dataclass(frozen=True)
class _Asked:
    """A requested set: its `name`, its `place` on disk (None for `random`), whether its labels are used (`labelled`),
    and whether the models are attacked (`attack`).
    """

    name: str
    place: str | None
    labelled: bool = True
    attack: bool = False

    @classmethod
    def of(cls, name: str) -> _Asked:
        place = name.removeprefix(FGSM)
        if name.startswith(FGSM) and place == RANDOM:
            raise BadInput(f"{name} attacks noise.", "Name a set of images behind fgsm:.")
        if name == RANDOM:
            return cls(name, None, labelled=False)
        alone = place.removeprefix(ALONE)
        return cls(name, alone, labelled=alone == place, attack=name.startswith(FGSM))


@dataclass(frozen=True)
class _Shown:
    """A set as one model receives it; `labels` `(N,)` are None where they are ignored."""

    asked: _Asked
    sources: list[ImageSource]
    labels: Tensor | None

    def __len__(self) -> int:
        return sum(map(len, self.sources)) if self.asked.place is not None else RANDOM_IMAGES

    def batches(self, classifier: Classifier, batch_size: int, epsilon: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of float images in [0, 1] with their labels; ignored labels are `UNLABELLED`."""
        if self.asked.place is None:
            return noise(classifier, len(self), batch_size)
        stored = itertools.chain.from_iterable(source.batches(batch_size) for source in self.sources)
        known = self.labels is not None
        plain = ((images, labels if known else torch.full_like(labels, UNLABELLED)) for images, labels in stored)
        return attacked(classifier, plain, epsilon) if self.asked.attack else plain

    def image(self, number: int) -> str:
        """The file of an image; without files its number in the set, or `part/number` in a set of several parts."""
        for source in self.sources:
            if number < len(source):
                stored = source.source if isinstance(source, Fitted) else source
                if isinstance(stored, ImageFolder):
                    return str(stored.files[number])
                if isinstance(stored, SyntheticSet) and len(self.sources) > 1:
                    return f"{stored.folder.name}/{number}"
                return str(number)
            number -= len(source)
        return str(number)


class _Opener:
    """Opens each set once for all models that need it in the same form, so that each notice is printed once."""

    def __init__(self, classifiers: Sequence[Classifier], models: Sequence[ComparedModel]) -> None:
        self._cards, self._models = [classifier.card for classifier in classifiers], models
        self._owned = {_Asked.of(model.own).place for model in models if model.own}
        self._opened: dict[Any, tuple[list[ImageSource], Tensor | None]] = {}

    def open(self, asked: _Asked) -> list[_Shown]:
        """The set for each model. All compared models get the same images, either with the same labels or with none.

        Raises `BadInput` where the labels differ between compared models.
        """
        shown = [self._open_for(asked, *each) for each in zip(self._cards, self._models, strict=True)]
        compared = [number for number, model in enumerate(self._models) if model.compared]
        known = {number: labels for number in compared if (labels := shown[number].labels) is not None}
        if known and len(known) < len(compared):
            console.notice(f"{asked.name} is taken as images alone for all models that are compared.")
            alone = replace(asked, labelled=False)
            for number in compared:
                shown[number] = self._open_for(alone, self._cards[number], self._models[number])
            return shown
        for number, labels in known.items():
            if not torch.equal(labels, known[0]):
                name, first = self._models[number].checkpoint, self._models[0].checkpoint
                raise BadInput(
                    f"{asked.name} has other labels for {name} than for {first}: one of them has no class names.",
                    "Give the class names in the models' order with --class-names FILE.",
                )
        return shown

    def _open_for(self, asked: _Asked, card: ModelCard, model: ComparedModel) -> _Shown:
        if asked.place is None:
            return _Shown(asked, [], None)
        foreign = model.own is not None and asked.place in self._owned - {_Asked.of(model.own).place}
        labelled = asked.labelled and not foreign
        key = (asked.place, labelled, card.input_size, card.class_names, card.classes)
        if key not in self._opened:
            self._opened[key] = _opened(asked.place, labelled, card)
        return _Shown(asked, *self._opened[key])


def _opened(place: str, labelled: bool, card: ModelCard) -> tuple[list[ImageSource], Tensor | None]:
    """The image sources at `place`, and their labels, None where `labelled` is false or they do not fit the model."""
    parts = parts_of(place)
    for part in parts:
        if (part / MANIFEST).exists():
            SyntheticSet(part).require_complete()
    if labelled:
        try:
            sources = [open_images(part, card) for part in parts]
            return sources, torch.cat([source.labels for source in sources])
        except BadInput as error:
            why = error.problem
    sources = [open_images(part, card, labelled=False) for part in parts]
    if labelled:
        console.notice(f"{place} is taken as images alone for {card.architecture}: {why}")
    return sources, None


def _different(names: Sequence[str]) -> list[str]:
    """The names; a repeated name gets a number, as in `model (2)`."""
    before = [names[:number].count(name) for number, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]


def _described(
    name: str, classifier: Classifier, own: str | None, first: Classifier, first_own: str | None
) -> ComparedModel:
    card = classifier.card
    named = card.class_names is not None and first.card.class_names is not None
    same = card.classes == first.card.classes and (not named or card.class_names == first.card.class_names)
    if not (same and own == first_own):
        what = "has other classes than the first model" if not same else "has other data of its own than the first"
        console.notice(f"{name} {what}: their answers are not compared.")
    why = why_no_statistics(classifier.network)
    if why:
        console.notice(f"J_KL is not defined for {name}: {why}.")
    return ComparedModel(
        checkpoint=name,
        classes=card.classes,
        class_names=list(card.class_names) if card.class_names else None,
        own=own,
        no_divergence=why,
        compared=same and own == first_own,
    )


def _observed(
    classifier: Classifier, shown: _Shown, target: torch.device, batch_size: int, epsilon: float, outliers: int
) -> Observation:
    what = f"{classifier.name} on {shown.asked.name}"
    with placed(classifier, target), console.progress(what, len(shown)) as progress:
        batches = counted(shown.batches(classifier, batch_size, epsilon), progress)
        return observe(classifier, batches, scores=outliers > 0)


def _result(
    model: ComparedModel, shown: _Shown, seen: Observation, own_divergence: float | None, outliers: int
) -> ModelOnSet:
    divergence = seen.divergence
    furthest = () if seen.scores is None else zip(*seen.scores.topk(min(outliers, len(seen.scores))), strict=True)
    return ModelOnSet(
        checkpoint=model.checkpoint,
        set=shown.asked.name,
        images=len(seen.classes),
        bn_divergence=divergence,
        divergence_ratio=divergence / own_divergence if divergence is not None and own_divergence else None,
        soft=seen.soft.tolist(),
        hard=seen.hard.tolist(),
        outliers=[Outlier(image=shown.image(int(number)), score=float(score)) for score, number in furthest],
        **({} if shown.labels is None else _counts(model.classes, shown.labels, seen)),
    )


def _counts(classes: int, labels: Tensor, seen: Observation) -> dict[str, Any]:
    """The fields of a result that need labels."""
    right = seen.classes == labels
    correct, total = int(right.sum()), len(labels)
    return {
        "correct": correct,
        "top1": correct / total,
        "standard_error": standard_error(correct, total),
        "calibration_error": calibration_error(seen.confidences, right),
        "class_images": labels.bincount(minlength=classes).tolist(),
        "class_correct": labels[right].bincount(minlength=classes).tolist(),
    }


@dataclass(frozen=True)
class _Answers:
    """A model's result on a set, with the set and the observation that it was computed from."""

    result: ModelOnSet
    shown: _Shown
    seen: Observation


def _difference(now: _Answers, before: _Answers, order: Sequence[int]) -> Difference:
    """The difference of a model (`now`) from the reference (`before`); `order`: classes, the least predicted first."""
    old, new = before.seen.classes, now.seen.classes
    labels = before.shown.labels if now.shown.labels is not None else None
    changed = (old != new).nonzero()[:, 0].tolist()
    return Difference(
        checkpoint=now.result.checkpoint,
        reference=before.result.checkpoint,
        set=now.result.set,
        images=len(new),
        agreement=1 - len(changed) / len(new),
        changed=len(changed),
        moves=moves(old, new),
        changes=[
            Change(
                image=before.shown.image(each),
                label=None if labels is None else int(labels[each]),
                before=int(old[each]),
                after=int(new[each]),
            )
            for each in changed
        ],
        **({} if labels is None else _judged(old == labels, new == labels)),
        tail_degradation=None
        if labels is None
        else tail_degradation(before.result.class_accuracy, now.result.class_accuracy, order),
    )


def _judged(before: Tensor, now: Tensor) -> dict[str, Any]:
    """The fields of a difference that need labels; `before`, `now`: whether each image is correct, bool `(N,)`."""
    gained, lost, total = int((now & ~before).sum()), int((before & ~now).sum()), len(now)
    p_value = mcnemar(gained, lost)
    return {
        "gained": gained,
        "lost": lost,
        "difference": (gained - lost) / total,
        "interval": difference_interval(gained, lost, total),
        "p_value": p_value,
        "within_noise": p_value >= NOISE,
    }
