"""`dfcompress bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _options

if TYPE_CHECKING:
    from dfcompress.device import Compute
    from dfcompress.models.classifier import Classifier


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command(epilog=_options.example("dfcompress bench step resnet20.pt --batch-size 256"))
@_options.model
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Timed steps of each row.")
@_options.compute
@_options.reporting
def step(model: Classifier, batch_size: int, rounds: int, compute: Compute, as_json: bool) -> None:
    """Time one synthesis step against the published loop and the floor."""
    from dfcompress.evaluation.bench import bench_step

    measured = bench_step(model, batch_size=batch_size, rounds=rounds, compute=compute)
    if as_json:
        console.result_json(measured.to_json())
        return
    ours = measured.rows[-1]["ms"]
    columns = {"ms": "ms", "images_per_second": "images/s", "tflops": "TFLOP/s"}
    shown = [key for key in columns if key in measured.rows[0]]
    rows = [[row["name"], *(f"{row[key]:.1f}" for key in shown), f"{row['ms'] / ours:.2f}"] for row in measured.rows]
    console.table(["one step", *(columns[key] for key in shown), "ours = 1"], rows)
    if measured.ceilings:
        console.result("the device reaches {tflops} TFLOP/s, {gb_per_second} GB/s".format(**measured.ceilings))
