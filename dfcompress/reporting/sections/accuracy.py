"""How models answer: their accuracy on real images, their agreement with the teachers, and their class bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfcompress.reporting.page import Block, Cell, Part, Table
from dfcompress.reporting.runs import ReportedRun
from dfcompress.reporting.sections.parts import class_name, each_run, percent, signed

CLASSES = 20  # The most classes in a table; of more classes, the table shows the first and the last ten in its order.


def accuracy(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> list[Part]:
    """One table of all scores, and for each extended model a table of the accuracies of its old classes before and
    after.
    """
    found = [(run, score) for run in runs for score in run.scores]
    which = any(score.get("images") for _, score in found)
    rows = [
        [
            Cell(run.name, colour=colours.get(run.name)),
            Cell(Path(score["checkpoint"]).name),
            *([Cell(score.get("images") or "")] if which else []),
            Cell(f"{score['correct']:,}"),
            Cell(f"{score['total']:,}"),
            Cell(percent(score["top1"])),
            Cell("" if score.get("standard_error") is None else f"± {100 * score['standard_error']:.2f}"),
            Cell("" if score["top5"] is None else percent(score["top5"])),
            Cell("" if score["agreement"] is None else percent(score["agreement"])),
        ]
        for run, score in found
    ]
    columns = ["run", "checkpoint", *(["images"] if which else []), "right", "of", "top-1", "standard error", "top-5"]
    scores = Table(columns=[*columns, "answers as the first"], rows=rows, texts=3 if which else 2)
    return [Part("", [scores] if rows else []), *each_run(runs, colours, _forgetting)]


def agreement(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Block]:
    """A table of the agreement of every student with each of its teachers."""
    found = [(run, teacher) for run in runs for teacher in run.measured.get("teachers", ())]
    if not found:
        return
    rows = [
        [
            Cell(run.name, colour=colours.get(run.name)),
            Cell(teacher["checkpoint"]),
            _share(teacher["agreement"]),
            _share(teacher["held_out"]),
            _share(teacher["probe"]),
            *(
                [Cell(", ".join(percent(share) for share in teacher["blocks"] or () if share is not None))]
                if _merged(found)
                else []
            ),
        ]
        for run, teacher in found
    ]
    columns = ["run", "teacher", "images trained on", "held out", "probe images"]
    note = "Share of images, made or given, on which student and teacher answer with the same class."
    if _merged(found):
        columns.append("taken for each teacher's classes")
    yield Table(columns=columns, rows=rows, texts=2, note=note)


def class_bias(run: ReportedRun) -> Iterator[Block]:
    """For each teacher a table of the classes, with the shares of the training images that the teacher and the student
    assign to each class.
    """
    names = run.class_names
    for teacher in run.measured.get("teachers", ()):
        by_teacher, by_student = teacher.get("teacher_answers"), teacher.get("student_answers")
        if not by_teacher or not sum(by_teacher):
            continue
        total = sum(by_teacher)
        shares = [
            (label, one / total, other / total)
            for label, (one, other) in enumerate(zip(by_teacher, by_student, strict=True))
            if one or other or len(by_teacher) <= CLASSES
        ]
        most = max(max(one, other) for _, one, other in shares)
        rows = [
            [
                Cell(class_name(names, label)),
                _share(one, most),
                _share(other, most),
                Cell(signed(f"{100 * (other - one):+.2f}")),
            ]
            for label, one, other in _both_ends(shares, key=lambda each: each[2] - each[1])
        ]
        note = f"Shares of the {total:,} images trained on that each takes for a class"
        note += f"; {len(rows)} of {len(by_teacher):,} classes" if len(rows) < len(by_teacher) else ""
        columns = ["class", f"teacher {teacher['checkpoint']}", "student", "points"]
        yield Table(columns=columns, rows=rows, note=f"{note}.")


def _forgetting(run: ReportedRun) -> Iterator[Block]:
    if classes := (run.measured.get("evaluation") or {}).get("forgetting"):
        rows = [
            [Cell(each["name"]), Cell(f"{each['total']:,}"), Cell(percent(each["before"])), _share(each["after"])]
            for each in _both_ends(classes, key=lambda each: each["after"] - each["before"])
        ]
        yield Table(columns=["old class", "images", "right before", "right after"], rows=rows)


def _merged(found: Iterable[tuple[ReportedRun, Mapping[str, Any]]]) -> bool:
    return any(teacher.get("blocks") for _, teacher in found)


def _both_ends(rows: Sequence[Any], key: Callable[[Any], float]) -> list[Any]:
    """All rows in their order; of more than `CLASSES` rows, the ten with the least key and the ten with the largest."""
    if len(rows) <= CLASSES:
        return list(rows)
    ordered = sorted(rows, key=key)
    return ordered[: CLASSES // 2] + ordered[-CLASSES // 2 :]


def _share(share: float | None, most: float = 1.0) -> Cell:
    return Cell("") if share is None else Cell(percent(share), bar=share / most if most else 0.0)
