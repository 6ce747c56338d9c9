"""`dfcompress report`."""

from __future__ import annotations

from pathlib import Path

import click

from dfcompress import console
from dfcompress.commands import _options


@click.command(epilog=_options.example("dfcompress report resnet20-quantize -o report.html"))
@click.argument("runs", nargs=-1, required=True, type=_options.PATH)
@click.option(
    "-o", "--output", type=_options.PATH, default="report.html", show_default=True, help="The HTML file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@click.option(
    "--data", type=_options.PATH, help="Real images to show beside those that were made, as evaluate takes them."
)
@_options.reporting
def report(runs: tuple[Path, ...], output: Path, overwrite: bool, data: Path | None, as_json: bool) -> None:
    """Write one HTML page about runs: settings, numbers, images, losses, layers; it needs no network."""
    from dfcompress.verbs.report import report

    written = report(runs, output=output, data=data, overwrite=overwrite)
    if as_json:
        console.result_json(written.to_json())
    else:
        runs_shown = "one run" if len(written.runs) == 1 else f"{len(written.runs)} runs"
        console.result(
            f"{written.output}: {runs_shown}, {written.bytes:,} bytes, sections {', '.join(written.sections)}"
        )
