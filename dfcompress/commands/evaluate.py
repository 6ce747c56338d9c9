"""`dfcompress evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _help, _options, _summary

if TYPE_CHECKING:
    from dfcompress.models.classifier import Classifier


@click.command(
    cls=_help.Command, epilog=_options.example("dfcompress evaluate resnet20.pt student --data cifar10-test.npz")
)
@_options.models
@click.option(
    "--data",
    type=_options.PATH,
    required=True,
    help="Labelled images: one folder per class, an .npz file, IDX files, the batches of CIFAR, or a synthetic set.",
)
@click.option(
    "--fail-under",
    type=float,
    metavar="SHARE",
    help="Exit with code 3 if the top-1 accuracy of a checkpoint is below this share or percentage.",
)
@_help.under(
    "Machine",
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Number of images that go through a network at once.",
    ),
)
@_options.device
@_options.reporting
def evaluate(
    models: list[Classifier], data: Path, fail_under: float | None, batch_size: int, device: str, as_json: bool
) -> None:
    """Measure accuracy on real images, and agreement with the first checkpoint."""
    from dfcompress.verbs.evaluate import evaluate

    measured = evaluate(models, data=data, device=device, batch_size=batch_size, fail_under=fail_under)
    if as_json:
        console.result_json(measured.to_json())
    else:
        _summary.evaluation(measured)
    measured.check_gate()
