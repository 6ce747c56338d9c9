"""What `compare` finds, and its tables as CSV files."""

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
    """A model: its classes, their names where known, the set that is its `own` data where that was told, why it has no
    J_KL where it has none, and whether it is `compared` with the first model, answer by answer.
    """

    checkpoint: str
    classes: int
    class_names: list[str] | None
    own: str | None
    no_divergence: str | None
    compared: bool


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An image that lies far out: its file, or its number in the set from 0, and its spread `score`."""

    image: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ModelOnSet:
    """What a model shows of a set.

    `bn_divergence` is J_KL, None where the model knows no statistics; `divergence_ratio` is that divided by J_KL of the
    model's own data. `soft` and `hard` are the mean softmax of each class and the share of images taken for it.
    Where the labels count, `correct` images are right, a share `top1` with its `standard_error`; `calibration_error` is
    the ECE; `class_images` and `class_correct` count by class. Else these are None. `outliers` lie furthest out.
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
        """The share that is right of each class, None where it has no images or labels do not count."""
        if self.class_images is None or self.class_correct is None:
            return [None] * len(self.soft)
        counts = zip(self.class_correct, self.class_images, strict=True)
        return [correct / images if images else None for correct, images in counts]


@dataclass(frozen=True, kw_only=True)
class Change:
    """An image that two models answer differently: its file or number, its label, and both answers."""

    image: str
    label: int | None
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model against the first one, the `reference`, on a set.

    `agreement` is the share of equal answers; `changed` images have others, and `moves` says from which class to which.
    Where labels count, the model is right on `gained` images on which the reference is wrong, and wrong on `lost` ones
    on which that is right; `difference` of their shares has the 95 % `interval`, and `p_value` is that of McNemar's
    exact test: `within_noise` where it is 0.05 or more. `tail_degradation` is the mean relative loss of accuracy over
    those that lost of the N classes that the reference predicts least, for N = 1, 2, ...
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
        """The fields as `--json` prints them: all but the single images that changed."""
        return {**_without(vars(self), ("changes",)), "moves": [move._asdict() for move in self.moves]}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every model on every set, model by model, and every compared model against the first, set by set."""

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
        """Write every table in full: `results`, `classes`, `differences`, `moves`, `tail`, `changes` and `outliers`,
        each a `.csv` in `folder`, which is made; those without a row are left out.
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
