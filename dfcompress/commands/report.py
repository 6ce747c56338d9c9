"""`dfcompress report`."""

from __future__ import annotations

from pathlib import Path

import click

from dfcompress import console
from dfcompress.commands import _help, _options


@click.command(cls=_help.Command, epilog=_options.example("dfcompress report resnet20-quantize -o report.html"))
@click.argument(
    "runs", cls=_help.Argument, nargs=-1, required=True, type=_options.PATH, explanation="The folders of finished runs."
)
@click.option(
    "-o", "--output", type=_options.PATH, default="report.html", show_default=True, help="HTML file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option(
    "--data", type=_options.PATH, help="Real images to show beside those that were made, as evaluate takes them."
)
@_options.reporting
def report(runs: tuple[Path, ...], output: Path, overwrite: bool, data: Path | None, as_json: bool) -> None:
    """Write one HTML page about runs. It shows settings, results, images, losses and layers, and works offline."""
    from dfcompress.verbs.report import report

    written = report(runs, output=output, data=data, overwrite=overwrite)
    if as_json:
        console.result_json(written.to_json())
    else:
        runs_shown = "one run" if len(written.runs) == 1 else f"{len(written.runs)} runs"
        console.result(
            f"{written.output}: {runs_shown}, {written.bytes:,} bytes, sections {', '.join(written.sections)}"
        )
