"""The result of `compare`, and its tables as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dfcompress.evaluation.pairs import Move
from dfcompress.run import write_atomically


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """A model of the comparison.

    `checkpoint`: path or name. `classes`: number of classes. `class_names`: None where they are unknown. `own`: the set
    that represents its training distribution, None where none was given. `no_divergence`: the reason why J_KL is not
    defined for it, None where J_KL is defined. `compared`: whether it is compared with the first model image by image.
    """

    checkpoint: str
    classes: int
    class_names: list[str] | None
    own: str | None
    no_divergence: str | None
    compared: bool


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An image whose features are far from the training statistics.

    `image`: its file, or its number in the set from 0. `score`: its spread score; larger is farther.
    """

    image: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ModelOnSet:
    """The result of one model on one set; every share is in [0, 1].

    `checkpoint`, `set`: names of model and set. `images`: number of images. `bn_divergence`: J_KL, None for a model
    without BatchNorm statistics. `divergence_ratio`: J_KL divided by J_KL on the model's `own` set, None without such a
    set. `soft`: mean softmax of each class. `hard`: share of images for which each class is predicted. `outliers`: the
    images with the largest spread score.
    The other fields need labels, and are None where labels are ignored. `correct`: number of correct images. `top1`:
    their share. `standard_error`: of `top1`. `calibration_error`: expected calibration error (ECE). `class_images`:
    number of images of each class. `class_correct`: number of them that are correct.
    """

    checkpoint: str
    set: str
    images: int
    bn_divergence: float | None
    divergence_ratio: float | None
    soft: list[float] = field(repr=False)
    hard: list[float] = field(repr=False)
    correct: int | None = None
    top1: float | None = None
    standard_error: float | None = None
    calibration_error: float | None = None
    class_images: list[int] | None = field(default=None, repr=False)
    class_correct: list[int] | None = field(default=None, repr=False)
    outliers: list[Outlier] = field(default_factory=list)

    @property
    def class_accuracy(self) -> list[float | None]:
        """The accuracy on each class, in [0, 1]; None for a class without images, and where labels are ignored."""
        if self.class_images is None or self.class_correct is None:
            return [None] * len(self.soft)
        counts = zip(self.class_correct, self.class_images, strict=True)
        return [correct / images if images else None for correct, images in counts]


@dataclass(frozen=True, kw_only=True)
class Change:
    """An image for which the reference and another model predict different classes.

    `image`: its file, or its number in the set from 0. `label`: its true class, None where labels are ignored.
    `before`, `after`: class predicted by the reference, and by the other model.
    """

    image: str
    label: int | None
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between the model `checkpoint` and the first model, the `reference`, on one set.

    `images`: number of images. `agreement`: share of images, in [0, 1], with equal predictions. `changed`: number of
    images with different predictions. `moves`: number of changed images for each pair of classes. `changes`: each
    changed image.
    The other fields need labels, and are None where labels are ignored. `gained`: number of images that the model has
    right and the reference wrong. `lost`: number of images that the reference has right and the model wrong.
    `difference`: accuracy of the model minus accuracy of the reference. `interval`: 95 % confidence interval of
    `difference`. `p_value`: of McNemar's exact test. `within_noise`: whether `p_value` is 0.05 or more.
    `tail_degradation`: for N = 1, 2, ..., take the N classes that the reference predicts least; the value is the mean
    relative loss of accuracy over those of them that lost accuracy.
    """

    checkpoint: str
    reference: str
    set: str
    images: int
    agreement: float
    changed: int
    moves: list[Move] = field(repr=False)
    changes: list[Change] = field(repr=False)
    gained: int | None = None
    lost: int | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    within_noise: bool | None = None
    tail_degradation: list[float] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them: all except `changes`."""
        return {**_without(vars(self), ("changes",)), "moves": [move._asdict() for move in self.moves]}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `compare`.

    `models`: the models, the reference first. `sets`: names of the sets. `results`: every model on every set, ordered
    by model, then by set. `differences`: every compared model against the first, ordered by model, then by set.
    """

    models: list[ComparedModel]
    sets: list[str]
    results: list[ModelOnSet]
    differences: list[Difference]

    def on(self, name: str) -> list[ModelOnSet]:
        """The results of one set, in the order of the models."""
        return [result for result in self.results if result.set == name]

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return {
            "models": [asdict(model) for model in self.models],
            "sets": self.sets,
            "results": [asdict(result) for result in self.results],
            "differences": [difference.to_json() for difference in self.differences],
        }

    def write_csv(self, folder: str | Path) -> None:
        """Write the complete tables `results`, `classes`, `differences`, `moves`, `tail`, `changes` and `outliers` as
        `.csv` files in `folder`, which is created if needed. Tables without rows are not written.

        Raises `DfcompressError` where a file cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, rows in self._tables().items():
            if rows:
                with (
                    write_atomically(Path(folder) / f"{name}.csv") as path,
                    path.open("w", newline="", encoding="utf-8") as file,
                ):
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)

    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        lists = ("soft", "hard", "class_images", "class_correct", "outliers")
        tables: dict[str, list[dict[str, Any]]] = {
            "results": [_without(asdict(result), lists) for result in self.results],
            "classes": [],
            "differences": [_difference_row(difference) for difference in self.differences],
            "moves": [],
            "tail": [],
            "changes": [],
            "outliers": [],
        }
        names = {model.checkpoint: model.class_names for model in self.models}
        for result in self.results:
            of = {"checkpoint": result.checkpoint, "set": result.set}
            columns: dict[str, Sequence[Any] | None] = {
                "name": names[result.checkpoint],
                "soft": result.soft,
                "hard": result.hard,
                "images": result.class_images,
                "correct": result.class_correct,
            }
            for number in range(len(result.soft)):
                values = {name: column[number] if column else None for name, column in columns.items()}
                tables["classes"].append({**of, "class": number, **values})
            tables["outliers"] += [{**of, **asdict(outlier)} for outlier in result.outliers]
        for each in self.differences:
            of = {"checkpoint": each.checkpoint, "set": each.set}
            tables["moves"] += [{**of, **move._asdict()} for move in each.moves]
            curve = enumerate(each.tail_degradation or [], 1)
            tables["tail"] += [{**of, "classes": count, "degradation": value} for count, value in curve]
            tables["changes"] += [{**of, **asdict(change)} for change in each.changes]
        return tables


def _without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _difference_row(difference: Difference) -> dict[str, Any]:
    values = _without(vars(difference), ("moves", "changes", "tail_degradation", "interval"))
    low, high = difference.interval or (None, None)
    return {**values, "low": low, "high": high}
