"""What several sections share: a part for each run, and the texts for shares, seconds, signs and classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dfcompress.reporting.page import Block, Part
from dfcompress.reporting.runs import ReportedRun


def each_run(
    runs: Sequence[ReportedRun], colours: Mapping[str, int], tell: Callable[[ReportedRun], Iterable[Block]]
) -> list[Part]:
    """A part for each run for which `tell` yields blocks. It has no title if the report has a single run."""
    told = [(run, list(tell(run))) for run in runs]
    return [Part(run.name if colours else "", blocks, colours.get(run.name)) for run, blocks in told if blocks]


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.2f} %"


def seconds(value: float) -> str:
    """A number of seconds without its unit, from 100 on without decimals."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def signed(number: str) -> str:
    """The number with the typographic minus sign, which is as wide as a plus sign."""
    return number.replace("-", "−")


def class_name(names: Mapping[int, str], label: int) -> str:
    """The name of a class, or `class` and its number if it has no name."""
    return str(names.get(label, f"class {label}"))
