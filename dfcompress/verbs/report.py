"""`report`: one HTML page about runs that needs no internet connection.

dfcompress.report(["resnet20-quantize"])
dfcompress.report(["seed-0", "seed-1", "seed-2"], output="seeds.html", data="cifar10-test.npz")
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.data.image_source import ImageSource
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.quantization.layer_report import REPORT as LAYERS
from dfcompress.reporting.contents import sections_of
from dfcompress.reporting.page import Section, render
from dfcompress.reporting.runs import Losses, ReportedRun, read_losses
from dfcompress.reporting.sections.class_images import RealImages
from dfcompress.run import RUN_FILE, RunFile, check_output_file, write_atomically
from dfcompress.settings import one_or_more
from dfcompress.synthesis.set_builder import warnings_of
from dfcompress.synthesis.transfer_set import PROBE
from dfcompress.verbs._prune_step import REPORT as WIDTHS
from dfcompress.verbs._verb import verb
from dfcompress.verbs.extend import EXPERT

FILE = "report.html"
PACKAGES = ("jinja2", "matplotlib")
# Exceptions of reading values that have another form than this version writes.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Report:
    """The page that was written: its file `output`, its size in `bytes`, the names of its `runs` and its `sections`."""

    output: str
    bytes: int
    runs: list[str]
    sections: list[str]

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return asdict(self)


@verb
def report(
    runs: str | Path | Sequence[str | Path],
    *,
    output: str | Path = FILE,
    data: str | Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Write one HTML page about run folders: settings, results, images, losses and layers.

    The page contains all its data, and loads nothing from the internet.

    - `runs`: one run folder or several; a run of `demo` includes the runs inside its folder.
    - `output`: HTML file to write. `overwrite`: replace an existing file.
    - `data`: real images, as `evaluate` takes them, to show beside the synthetic images.

    Raises `BadInput`, with nothing written, where a folder is not a run folder, jinja2 or matplotlib is missing, `data`
    fits no model, or `output` exists and `overwrite` is false.
    """
    require_packages()
    found = _all(one_or_more(runs))
    path = Path(output)
    check_output_file(path, example=FILE, overwrite=overwrite)
    named = [_named(run, found) for run in found]
    opened: dict[str, ImageSource | None] = {}
    refused: dict[Path, BadInput] = {}

    def real(synthetic: SyntheticSet) -> ImageSource | None:
        if data is None:
            return None
        card = synthetic.manifest["card"]
        key = json.dumps([card["input_size"], card["classes"], card.get("class_names")])
        if key not in opened:
            try:
                opened[key] = open_images(data, ModelCard.from_json(card))
            except BadInput as error:  # One run of several may have a model with other classes.
                opened[key] = None
                refused[synthetic.folder] = error
        return opened[key]

    sections = _sections(named, real)
    if refused and not any(opened.values()):
        raise next(iter(refused.values()))
    for folder, error in refused.items():
        console.notice(f"{folder} has no real images beside it: {error.problem}")
    title = named[0].name if all(run.inside for run in named[1:]) else f"{len(named)} runs"
    subtitle = f"dfcompress {metadata.version('dfcompress')}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    page = render(title, subtitle, sections)
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Report(str(path), path.stat().st_size, [run.name for run in named], [section.name for section in sections])


def missing_packages() -> list[str]:
    """The packages that a report needs and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Raise `BadInput` where a package is missing."""
    if missing := missing_packages():
        raise BadInput(f"A report needs {', '.join(missing)}.", "Install them with: pip install 'dfcompress[report]'.")


def _all(folders: Sequence[str | Path]) -> list[ReportedRun]:
    """The runs of the folders in their order, each run once; raises `BadInput` where no folder is given."""
    if not folders:
        raise BadInput("No run was named.", "Name the folder of at least one run.")
    found: dict[Path, ReportedRun] = {}
    for folder in folders:
        for run in _read(Path(folder)):
            found.setdefault(run.file.folder.resolve(), run)
    return list(found.values())


def _read(folder: Path, *, inside: bool = False) -> Iterator[ReportedRun]:
    """The run in `folder`, and the runs of a demo inside it; raises `BadInput` where there is no readable run."""
    file = RunFile.read(folder)
    if not file.options:
        raise BadInput(f"{folder} was being overwritten and holds no run.", "Make the run again, or leave it out.")
    inner = sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))
    sets = {} if inner else dict(_sets(folder))
    try:
        warnings = list((file.measurements or {}).get("warnings", ()))
        for synthetic in sets.values():
            # The run file of a finished run has these warnings, each after the name of its teacher.
            warnings += [each for each in warnings_of(synthetic) if not any(known.endswith(each) for known in warnings)]
        yield ReportedRun(
            name=str(folder),
            file=file,
            losses=list(_losses(folder, file.verb, sets)),
            sets=sets,
            layers=_json(folder / LAYERS),
            widths=_json(folder / WIDTHS),
            warnings=warnings,
            inside=inside,
        )
    except MALFORMED as error:
        raise _unreadable(folder, error) from None
    for path in inner:
        yield from _read(path, inside=True)


def _sets(folder: Path) -> Iterator[tuple[str, SyntheticSet]]:
    """The synthetic sets in a run folder by their relative path, without probe images."""
    for path in sorted(folder.rglob(MANIFEST)):
        place = path.parent.relative_to(folder)
        if PROBE not in place.parts:
            yield str(place), SyntheticSet(path.parent)


def _losses(folder: Path, verb: str, sets: dict[str, SyntheticSet]) -> Iterator[Losses]:
    for synthetic in sets.values():
        recipe = synthetic.manifest["recipe"]["name"]
        yield from read_losses(f"images by {recipe}", synthetic.folder)
        yield from read_losses(f"student beside {recipe}", synthetic.folder / "student")
    for round_folder in sorted(folder.glob("round-*")):
        yield from read_losses(f"training, {round_folder.name.replace('-', ' ')}", round_folder)
    yield from read_losses("training of the new classes alone", folder / EXPERT)
    if verb != "invert":
        yield from read_losses("training", folder)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _sections(runs: Sequence[ReportedRun], real: RealImages) -> list[Section]:
    """The sections of the page; raises `BadInput` for the first run whose files are malformed."""
    try:
        return sections_of(runs, real)
    except MALFORMED as error:
        if len(runs) == 1:
            raise _unreadable(runs[0].file.folder, error) from None
        for run in runs:
            _sections([run], real)
        raise


def _unreadable(folder: Path, error: Exception) -> BadInput:
    return BadInput(
        f"{folder} holds files that are not as this version writes them ({type(error).__name__}: {error}).",
        "Make the run again, or use the version that made it.",
    )


def _named(run: ReportedRun, all_runs: Sequence[ReportedRun]) -> ReportedRun:
    """The run, named by the shortest end of its path that differs from the other runs' paths."""
    own = Path(run.name).resolve().parts
    others = [Path(other.name).resolve().parts for other in all_runs if other is not run]
    length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
    return replace(run, name=str(Path(*own[-length:])))
