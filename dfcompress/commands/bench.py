"""`dfcompress bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _help, _options

if TYPE_CHECKING:
    from dfcompress.evaluation.timing import Bench
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier


_rounds = click.option(
    "--rounds", type=click.IntRange(1), default=7, show_default=True, help="Number of timed steps per row."
)
_student = click.option(
    "--student", default="half", show_default=True, metavar="NAME", help="Architecture of the student."
)


def _batch_size(*, smallest: int, usual: int) -> _help.Decorator:
    return click.option(
        "--batch-size",
        type=click.IntRange(smallest),
        default=usual,
        show_default=True,
        help="Number of images in a batch.",
    )


@click.group()
def bench() -> None:
    """Time steps of synthesis and training on this machine."""


@bench.command(cls=_help.Command, epilog=_options.example("dfcompress bench step resnet20.pt --batch-size 256"))
@_options.model
@_batch_size(smallest=1, usual=256)
@_rounds
@_options.compute
@_options.reporting
def step(model: Classifier, batch_size: int, rounds: int, compute: Compute, as_json: bool) -> None:
    """Time one step of synthesis against the published loop and against the plain network's passes."""
    from dfcompress.verbs.bench_step import bench_step

    _tell(bench_step(model, batch_size=batch_size, rounds=rounds, compute=compute), to="ours", as_json=as_json)


@bench.command(
    cls=_help.Command, epilog=_options.example("dfcompress bench train resnet44.pt --student cifar_resnet20")
)
@_options.model
@_student
@_batch_size(smallest=2, usual=128)
@_rounds
@_options.compute
@_options.reporting
def train(model: Classifier, student: str, batch_size: int, rounds: int, compute: Compute, as_json: bool) -> None:
    """Time one step of distillation against a plain PyTorch loop."""
    from dfcompress.verbs.bench_train import bench_train

    measured = bench_train(model, student=student, batch_size=batch_size, rounds=rounds, compute=compute)
    _tell(measured, to="plain", as_json=as_json)


@bench.command(cls=_help.Command, epilog=_options.example("dfcompress bench generator resnet20.pt --batch-size 128"))
@_options.model
@_student
@_batch_size(smallest=2, usual=256)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Number of timed rounds per row.")
@_options.compute
@_options.reporting
def generator(model: Classifier, student: str, batch_size: int, rounds: int, compute: Compute, as_json: bool) -> None:
    """Time one round of training a generator and a student against the plain loop."""
    from dfcompress.verbs.bench_generator import bench_generator

    measured = bench_generator(model, student=student, batch_size=batch_size, rounds=rounds, compute=compute)
    _tell(measured, to="ours", unit="one round", as_json=as_json)


def _tell(measured: Bench, *, to: str, as_json: bool, unit: str = "one step") -> None:
    if as_json:
        console.result_json(measured.to_json())
        return
    one = next(row["ms"] for row in measured.rows if row["name"] == to)
    columns = {"ms": "ms", "images_per_second": "images/s", "tflops": "TFLOP/s"}
    shown = [key for key in columns if key in measured.rows[0]]
    rows = [[row["name"], *(f"{row[key]:.1f}" for key in shown), f"{row['ms'] / one:.2f}"] for row in measured.rows]
    console.table([unit, *(columns[key] for key in shown), f"{to} = 1"], rows)
    if measured.ceilings:
        console.result("the device reaches {tflops} TFLOP/s, {gb_per_second} GB/s".format(**measured.ceilings))
