"""What a report knows of a run: its record, its losses, its images and its layers, as their files hold them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.models.card import ModelCard
from dfcompress.run import METRICS, RunFile

# Of a line of metrics.jsonl, what is no loss.
NO_LOSSES = {"step", "shard", "process", "lr", "images_per_second"}


@dataclass(frozen=True)
class Curve:
    """One loss of one batch of images, or of a training: its values at `steps`."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Losses:
    """The losses of one part of a run (`phase`) by name, with a curve for each batch of images."""

    phase: str
    curves: Mapping[str, list[Curve]]


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run in a report.

    `sets` are the images it made, by the folder inside the run's; `layers` is what quantization wrote of them and
    `widths` what pruning did; `warnings` are those of the run and of its sets. `inside` of another run it has no line
    of its own.
    """

    name: str
    file: RunFile
    losses: Sequence[Losses] = ()
    sets: Mapping[str, SyntheticSet] = field(default_factory=dict)
    layers: Mapping[str, Any] | None = None
    widths: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    inside: bool = False

    @property
    def measured(self) -> Mapping[str, Any]:
        """The measurements, empty where the run is not finished."""
        return self.file.measurements or {}

    @property
    def teachers(self) -> list[Mapping[str, Any]]:
        """The identity of each teacher: its weights' sha256 and its card."""
        options = self.file.options
        return [*options.get("teachers", ()), *([options["teacher"]] if "teacher" in options else ())]

    @property
    def card(self) -> ModelCard | None:
        """The card of the first teacher, None where the run has none."""
        return ModelCard.from_json(self.teachers[0]["card"]) if self.teachers else None

    @property
    def scores(self) -> list[Mapping[str, Any]]:
        """A score for each checkpoint that was evaluated on real images, that of the result last."""
        return list((self.measured.get("evaluation") or {}).get("results", ()))

    @property
    def class_names(self) -> Mapping[int, str]:
        """Names of the result's classes by its outputs, of those that have one: its own, else those of its teachers."""
        options = self.file.options
        if options.get("class_names"):
            return dict(enumerate(options["class_names"]))
        cards = [ModelCard.from_json(teacher["card"]) for teacher in self.teachers]
        outputs = options.get("outputs") or [range(card.classes) for card in cards]
        return {
            output: name
            for card, of_teacher in zip(cards, outputs, strict=True)
            for output, name in zip(of_teacher, card.class_names or (), strict=False)
        }


def read_losses(phase: str, folder: Path) -> Iterator[Losses]:
    """The losses in a folder's `metrics.jsonl`, and in those of its shards while a set is not finished; nothing where
    there are none.
    """
    curves: dict[str, dict[int, Curve]] = {}
    for path in [folder / METRICS, *sorted(folder.glob("shard-*.jsonl"))]:
        for line in _lines(path):
            if "step" not in line:
                continue
            for name, value in line.items():
                if name not in NO_LOSSES and isinstance(value, int | float):
                    curve = curves.setdefault(name, {}).setdefault(line.get("shard", 0), Curve([], []))
                    curve.steps.append(line["step"])
                    curve.values.append(value)
    if curves:
        yield Losses(phase, {name: list(shards.values()) for name, shards in curves.items()})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines without the last, where a killed process left that half written; raises
    `ValueError` for another.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise


def repeated(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """The runs in groups that differ in their seeds alone, in the order of their first."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        options = {name: value for name, value in run.file.options.items() if name != "seed"}
        groups.setdefault(json.dumps([run.file.verb, options], sort_keys=True), []).append(run)
    return list(groups.values())
