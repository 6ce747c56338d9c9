"""The summary: a verdict on each model, a table of the models and a table of the synthetic sets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dfcompress.reporting.page import Block, Cell, Facts, Table
from dfcompress.reporting.runs import ReportedRun, repeated
from dfcompress.reporting.sections.done import short
from dfcompress.reporting.sections.parts import percent, seconds

Row = Mapping[str, float | None]

FORMATS: Mapping[str, Callable[[float], str]] = {
    "top-1": percent,
    "teacher's top-1": percent,
    "agreement": percent,
    "bytes": lambda value: f"{value:,.0f}",
    "of fp32": percent,
    "ms": lambda value: f"{value:,.1f}",
    "ms in fp32": lambda value: f"{value:,.1f}",
    "images": lambda value: f"{value:,.0f}",
    "taken as intended": percent,
    "J_KL": lambda value: f"{value:.3f}",
    "seconds": seconds,
}


def summary(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Block]:
    """The verdict on each model, a table of the models and a table of the synthetic sets, both with mean and standard
    deviation over seeds.
    """
    sets = [run for run in runs if run.file.verb == "invert"]
    models = [run for run in runs if run.file.verb not in ("invert", "demo")]
    if models:
        verdicts = {run.name: _verdict(run) for run in models if run.file.finished}
        if told := [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict]:
            yield Facts(told)
        yield _numbers(
            models, colours, _of_model, "ms: 64 images in onnxruntime on one thread, where a file was exported."
        )
    if sets:
        yield _numbers(sets, colours, _of_set, "J_KL: how far the images are from the BatchNorm statistics.")


def _of_model(run: ReportedRun) -> Row:
    measured, scores = run.measured, run.scores
    export = measured.get("export") or {}
    return {
        "top-1": scores[-1]["top1"] if scores else None,
        "teacher's top-1": _teachers_top1(run),
        "agreement": measured.get("agreement"),
        "bytes": measured.get("bytes"),
        "of fp32": measured.get("bytes_ratio"),
        "seconds": measured.get("seconds", {}).get("total"),
        "ms": export.get("milliseconds"),
        "ms in fp32": export.get("milliseconds_fp32"),
    }


def _verdict(run: ReportedRun) -> str:
    """How much smaller, faster and less accurate than its teacher a model is, as text. Without accuracies on real
    images, the text states the agreement of both instead.
    """
    found = _of_model(run)
    share, ms, ms_fp32, agreement = (found[name] for name in ("of fp32", "ms", "ms in fp32", "agreement"))
    said = []
    if share and share < 1:
        said.append(f"{1 / share:.1f} times smaller than the teacher")
    if ms and ms_fp32:
        said.append(f"{ms_fp32 / ms:.1f} times as fast in onnxruntime")
    if found["teacher's top-1"] is not None:
        teacher, student = run.scores[0], run.scores[-1]
        lost = teacher["correct"] - student["correct"]
        change = f"{100 * abs(lost) / student['total']:.2f} points {'less' if lost > 0 else 'more'} accurate"
        noise = ", which may be noise" if lost and _may_be_noise(lost, student) else ""
        said.append(f"{change if lost else 'as accurate'} on {student['total']:,} real images{noise}")
    elif agreement is not None:
        said.append(f"{percent(agreement)} of the answers to its images as the teacher's")
    return ", ".join(said)


def _may_be_noise(lost: int, student: Mapping[str, Any]) -> bool:
    """Whether McNemar's test at 5 % may call a loss of `lost` correct images noise. The number of images that only one
    model has right is not known; it is at most the number on which the models disagree.
    """
    if student["agreement"] is None:
        return True
    differ = (1 - student["agreement"]) * student["total"]
    return bool(lost**2 <= 1.96**2 * differ)


def _teachers_top1(run: ReportedRun) -> float | None:
    """The top-1 accuracy of the teacher on the images on which its student is evaluated. None where there is no such
    number: several teachers each have their own images, and an extended model also has classes that its teacher lacks.
    """
    scores = run.scores
    if len(scores) < 2 or scores[0]["total"] != scores[-1]["total"] or scores[0].get("images") in ("new", "all"):
        return None
    return float(scores[0]["top1"])


def _of_set(run: ReportedRun) -> Row:
    measured = run.measured
    return {
        "images": measured.get("images"),
        "taken as intended": measured.get("teacher_top1"),
        "J_KL": measured.get("bn_divergence"),
        "seconds": measured.get("seconds"),
    }


def _numbers(
    runs: Sequence[ReportedRun], colours: Mapping[str, int], numbers: Callable[[ReportedRun], Row], note: str
) -> Table:
    found = {run.name: numbers(run) for run in runs}
    columns = [name for name in next(iter(found.values())) if any(row[name] is not None for row in found.values())]
    groups = repeated(runs)
    seeds = any(len(group) > 1 for group in groups)
    rows: list[list[Cell]] = []
    sums: list[int] = []
    for group in groups:
        for run in group:
            seed = [Cell(str(run.file.options.get("seed", "")))] if seeds else []
            cells = [_cell(name, [found[run.name][name]]) for name in columns]
            what = short(run) if run.file.finished else f"{short(run)} (not finished)"
            rows.append([Cell(run.name, colour=colours.get(run.name)), Cell(what), *seed, *cells])
        finished = [run for run in group if run.file.finished]
        if len(finished) > 1:
            sums.append(len(rows))
            cells = [_cell(name, [found[run.name][name] for run in finished]) for name in columns]
            rows.append([Cell("mean ± sd"), Cell(short(group[0])), Cell(f"{len(finished)} seeds"), *cells])
    if not any(name in columns for name in ("ms", "J_KL")):
        note = ""
    if sums:
        note = f"{note} sd: standard deviation over the seeds (n − 1).".strip()
    return Table(
        columns=["run", "what", *(["seed"] if seeds else []), *columns], rows=rows, texts=2, emphasised=sums, note=note
    )


def _cell(name: str, values: Sequence[float | None]) -> Cell:
    """A cell with a single value, or with the mean and standard deviation of several values; None is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell("")
    if len(known) == 1:
        return Cell(FORMATS[name](known[0]))
    spread, mean = statistics.stdev(known), FORMATS[name](statistics.mean(known))
    return Cell(f"{mean} ± {FORMATS[name](spread).removesuffix(' %')}" if spread else mean)
