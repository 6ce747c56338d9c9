"""A page of sections, rendered to one HTML file that asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `bar` is the length of a bar behind its text, in [0, 1], and `colour` that of the run."""

    text: str
    bar: float | None = None
    colour: int | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: texts stand left, numbers right; `emphasised` are the rows that sum up others."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1  # So many columns, from the left, hold texts.
    emphasised: Sequence[int] = ()
    note: str = ""
    kind: str = "table"

    def stands_left(self, column: int) -> bool:
        """Whether the head of a column stands left, as texts and bars do."""
        return column < self.texts or any(row[column].bar is not None for row in self.rows)


@dataclass(frozen=True)
class Figure:
    """A drawing as an `<svg>` element, its name, its first and last value, and what it shows for who cannot see it."""

    svg: str
    caption: str
    ends: str
    description: str


@dataclass(frozen=True)
class Figures:
    """Drawings side by side, and the run of each colour."""

    figures: Sequence[Figure]
    legend: Sequence[tuple[str, int]] = ()
    kind: str = "figures"


@dataclass(frozen=True)
class ClassPicture:
    """Some of the `count` images of a class, as data URLs: made ones, and real ones where there are some."""

    name: str
    count: str
    made: str
    real: str | None = None


@dataclass(frozen=True)
class Pictures:
    """Images by class."""

    classes: Sequence[ClassPicture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Line:
    """A line for the shell."""

    text: str
    kind: str = "line"


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    warning: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Facts:
    """A list of short statements."""

    texts: Sequence[str]
    kind: str = "facts"


@dataclass(frozen=True)
class Details:
    """A long text that is shown when it is asked for."""

    title: str
    text: str
    kind: str = "details"


Block = Table | Figures | Pictures | Line | Text | Facts | Details


@dataclass(frozen=True)
class Part:
    """Blocks below a title of their own, that of a run; without one where there is a single run."""

    title: str
    blocks: Sequence[Block]
    colour: int | None = None


@dataclass(frozen=True)
class Section:
    """A section of the page; `name` is its address on the page."""

    name: str
    title: str
    parts: Sequence[Part] = field(default_factory=list)


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page; whatever stands in the texts is shown, never obeyed."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, subtitle=subtitle, sections=sections)
