"""A page of sections, rendered to one HTML file that loads nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `bar` is the length of a bar behind its text, in [0, 1], and `colour` the number of the run's
    colour.
    """

    text: str
    bar: float | None = None
    colour: int | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: texts are aligned left, numbers right; `emphasised` are the rows that summarise other rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1  # Number of columns, from the left, that hold texts.
    emphasised: Sequence[int] = ()
    note: str = ""
    kind: str = "table"

    def stands_left(self, column: int) -> bool:
        """Whether the head of a column is aligned left, as texts and bars are."""
        return column < self.texts or any(row[column].bar is not None for row in self.rows)


@dataclass(frozen=True)
class Figure:
    """A drawing as an `<svg>` element, its `caption`, its first and last value (`ends`), and a `description` of it for
    screen readers.
    """

    svg: str
    caption: str
    ends: str
    description: str


@dataclass(frozen=True)
class Figures:
    """Drawings side by side, and a `legend` of (run, number of its colour)."""

    figures: Sequence[Figure]
    legend: Sequence[tuple[str, int]] = ()
    kind: str = "figures"


@dataclass(frozen=True)
class ClassPicture:
    """Some of the `count` synthetic images of a class as one picture, and some real images if there are any; both as
    data URLs.
    """

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
    """A command line for the shell."""

    text: str
    kind: str = "line"


@dataclass(frozen=True)
class Text:
    """A paragraph; a `warning` is highlighted."""

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
    """A long text that is collapsed until the reader opens it."""

    title: str
    text: str
    kind: str = "details"


Block = Table | Figures | Pictures | Line | Text | Facts | Details


@dataclass(frozen=True)
class Part:
    """The blocks of one run below its name as a title; the title is empty on a page of a single run."""

    title: str
    blocks: Sequence[Block]
    colour: int | None = None


@dataclass(frozen=True)
class Section:
    """A section of the page; `name` is its anchor on the page."""

    name: str
    title: str
    parts: Sequence[Part] = field(default_factory=list)


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Render the page as HTML; all texts are escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, subtitle=subtitle, sections=sections)
