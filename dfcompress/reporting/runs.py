"""The data of a run that a report shows, read from the run's files: its run file, losses, images and layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.models.card import ModelCard
from dfcompress.run import METRICS, RunFile

# The entries of a line of metrics.jsonl that are not losses.
NO_LOSSES = {"step", "shard", "process", "lr", "images_per_second"}


@dataclass(frozen=True)
class Curve:
    """One loss of one batch of synthetic images, or of a training: its `values` at `steps`."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Losses:
    """The losses of one part of a run (`phase`) by name, with one curve for each batch of synthetic images."""

    phase: str
    curves: Mapping[str, list[Curve]]


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run in a report.

    `sets` are the synthetic sets of the run, by their folder inside the run's folder. `layers` is the report that
    quantization wrote on the layers, and `widths` the report of pruning. `warnings` are the warnings of the run and of
    its sets. `inside` says that the run belongs to another run and has no command line of its own.
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
        """The measurements of the run; empty if the run is not finished."""
        return self.file.measurements or {}

    @property
    def teachers(self) -> list[Mapping[str, Any]]:
        """The identity of each teacher: the sha256 of its weights, and its card."""
        options = self.file.options
        return [*options.get("teachers", ()), *([options["teacher"]] if "teacher" in options else ())]

    @property
    def card(self) -> ModelCard | None:
        """The card of the first teacher, or None if the run has no teacher."""
        return ModelCard.from_json(self.teachers[0]["card"]) if self.teachers else None

    @property
    def scores(self) -> list[Mapping[str, Any]]:
        """The scores of the checkpoints that were evaluated on real images, with the score of the result last."""
        return list((self.measured.get("evaluation") or {}).get("results", ()))

    @property
    def class_names(self) -> Mapping[int, str]:
        """The names of the result's classes by output, for classes with a name: its own names, else its teachers'."""
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
    """Read the losses in a folder's `metrics.jsonl` and, while a set is not finished, in the files of its shards;
    yields nothing without losses.
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
    """The objects of a file of JSON lines. A last line that a killed process left half written is skipped; any other
    malformed line raises `ValueError`.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise


def repeated(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Group the runs that differ in their seeds alone; the groups are in the order of their first runs."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        options = {name: value for name, value in run.file.options.items() if name != "seed"}
        groups.setdefault(json.dumps([run.file.verb, options], sort_keys=True), []).append(run)
    return list(groups.values())
