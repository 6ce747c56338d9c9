"""`dfcompress demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _help, _options

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute


@click.command(cls=_help.Command, epilog=_options.example("dfcompress demo"))
@click.option(
    "-o", "--output", type=_options.PATH, default="dfcompress-demo", show_default=True, help="Folder for the results."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run in that folder.")
@click.option("--overwrite", is_flag=True, help="Replace the contents of that folder.")
@_options.compute
@_options.reporting
def demo(output: Path, resume: bool, overwrite: bool, compute: Compute, as_json: bool) -> None:
    """Compress a small MNIST classifier that is part of the package, in one or two minutes."""
    from dfcompress.verbs.demo import demo

    shown = demo(output=output, compute=compute, resume=resume, overwrite=overwrite)
    if as_json:
        console.result_json(shown.to_json())
        return
    rows = [
        [
            row.model,
            f"{row.score.correct}/{row.score.total}",
            f"{row.score.top1:.2%}",
            f"{row.bytes:,}",
            f"{row.seconds:.0f}",
        ]
        for row in shown.rows
    ]
    console.table(["MNIST, no training image used", "correct", "top-1", "bytes", "seconds"], rows)
    console.result(f"the images it made: {shown.picture}")
    missing = "none written; pip install 'dfcompress[report]', then dfcompress report " + shown.output
    console.result(f"report: {shown.report or missing}")
    console.result(f"{shown.seconds:.0f} s in all; everything is kept in {shown.output}")
