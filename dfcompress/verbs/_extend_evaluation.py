"""Evaluation of a model on real images before and after it was extended: on old, on new and on all classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dfcompress.data.real import open_images, require_decodable
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import Predictions, predict
from dfcompress.machine.device import resolve_device
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.verbs._finish import Measure
from dfcompress.verbs._new_images import open_new_images
from dfcompress.verbs.evaluate import Evaluation, Forgetting, placed, score


def extended_evaluator(
    data: Sequence[str | Path],
    old: Classifier,
    card: ModelCard,
    *,
    names_file: str | Path | None,
    also_old: bool,
    device: str,
) -> Measure | None:
    """A function that evaluates the old model and a saved extended model on real images; None without `data`.

    `data`: one source whose labels are the extended model's, or two sources: one of the old classes, and one of new
    classes with the labels of the new images. `card`: card of the extended model. `names_file`, `also_old`: as for the
    new images (see `open_new_images`).
    Raises `BadInput` for more sources, and for images that do not fit or cannot be decoded.
    """
    if len(data) > 2:
        raise BadInput(
            f"--eval-data was given {len(data)} times.", "Give one source of all classes, or one of old, one of new."
        )
    if not data:
        return None
    sources = [(each, each.labels) for each in [open_images(data[0], card if len(data) == 1 else old.card)]]
    if len(data) == 2:
        new = open_new_images(data[1], old.card, names_file=names_file, also_old=also_old, part="test")
        unknown = [name for name in new.class_names if name not in (card.class_names or ())]
        if unknown:
            raise BadInput(
                f"{data[1]} has the class {unknown[0]!r}, which is not learnt.", "Give images of new classes."
            )
        outputs = torch.tensor([(card.class_names or ()).index(name) for name in new.class_names])
        sources.append((new.source, outputs[new.labels]))
    for source, _ in sources:
        require_decodable(source)

    def measure(saved: Classifier) -> Evaluation:
        target, labels = resolve_device(device), torch.cat([labels for _, labels in sources])
        predictions = []
        for classifier in (old, saved):
            with placed(classifier, target):
                found = [predict(classifier, source.batches(256)).classes for source, _ in sources]
            predictions.append(Predictions(torch.cat(found), labels))
        return evaluate_extended(old, saved, *predictions)

    return measure


def evaluate_extended(old: Classifier, extended: Classifier, before: Predictions, after: Predictions) -> Evaluation:
    """The scores of both models on images of old classes, and of the extended model on images of new classes and on all
    images; for every old class, its accuracy `before` and `after`.

    The old model chooses among its own classes, the extended model among all classes, which is harder.
    """
    known = old.card.classes
    of_old = after.labels < known
    name, scores = str(extended.path or extended.name), []
    if of_old.any():
        old_before, old_after = _part(before, of_old), _part(after, of_old)
        scores += [score(str(old.path or old.name), old_before, old_before, images="old")]
        scores += [score(name, old_after, old_before, images="old")]
    if not of_old.all():
        scores += [score(name, _part(after, ~of_old), None, images="new")]
    scores += [score(name, after, None, images="all")]
    names = old.card.class_names or tuple(map(str, range(known)))
    forgetting = [
        _forgotten(names[label], _part(before, after.labels == label), _part(after, after.labels == label))
        for label in after.labels[of_old].unique().tolist()
    ]
    return Evaluation(scores, forgetting=forgetting)


def _part(predictions: Predictions, chosen: Tensor) -> Predictions:
    return Predictions(predictions.classes[chosen], predictions.labels[chosen])


def _forgotten(name: str, before: Predictions, after: Predictions) -> Forgetting:
    total = len(after)
    return Forgetting(name=name, total=total, before=before.correct() / total, after=after.correct() / total)
