"""The seconds of each part of a run, and the hardware, execution and versions that it ran with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dfcompress.reporting.page import Block, Cell, Table
from dfcompress.reporting.runs import ReportedRun
from dfcompress.reporting.sections.parts import seconds


def machine(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Block]:
    """A table of the seconds of each part, and a table of the hardware, the execution and the versions of each run."""
    wholes = ("total", "invocation")
    parts = sorted({part: None for run in runs for part in _parts(run)}, key=lambda part: part in wholes)
    if parts:
        rows = [
            [Cell(run.name, colour=colours.get(run.name))]
            + [Cell(seconds(told[part]) if part in told else "") for part in parts]
            for run in runs
            if (told := _parts(run))
        ]
        yield Table(columns=["run", *parts], rows=rows, note="Seconds of each part; invocation: of the last call.")
    columns = ["run", "processor", "device", "precision", "compiled", "threads", "peak memory", *_libraries(runs)]
    rows = []
    for run in runs:
        how, memory = _execution(run), run.file.peak_memory_bytes
        rows.append(
            [
                Cell(run.name, colour=colours.get(run.name)),
                Cell(run.file.processor or how.get("processor") or ""),
                Cell(str(how.get("device", ""))),
                Cell(str(how.get("precision", ""))),
                Cell({True: "yes", False: "no", None: ""}[how.get("compile")]),
                Cell(str(how.get("threads", ""))),
                Cell(f"{memory / 2**30:.2f} GiB" if memory else ""),
                *(Cell(run.file.versions.get(name, "")) for name in _libraries(runs)),
            ]
        )
    yield Table(columns=columns, rows=rows, texts=5)


def _libraries(runs: Sequence[ReportedRun]) -> list[str]:
    return list({name: None for run in runs for name in run.file.versions})


def _parts(run: ReportedRun) -> Mapping[str, float]:
    """The seconds of a run by part: from its measurements if they hold seconds by part, else from its run file."""
    by_part = run.measured.get("seconds")
    return by_part if isinstance(by_part, Mapping) else run.file.seconds


def _execution(run: ReportedRun) -> Mapping[str, Any]:
    """The stored execution of the run's training, else of its first set; empty if there is none."""
    trained = (run.measured.get("training") or {}).get("execution")
    first = next(iter(run.sets.values()), None)
    return trained or (first.manifest.get("execution") if first else None) or {}
