"""`dfcompress evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _options, _summary

if TYPE_CHECKING:
    from dfcompress.models.classifier import Classifier


@click.command(epilog=_options.example("dfcompress evaluate resnet20.pt student --data cifar10-test.npz"))
@_options.models
@click.option(
    "--data", type=_options.PATH, required=True, help="Images: ImageFolder, .npz, IDX files or a synthetic set."
)
@click.option(
    "--fail-under", type=float, help="Exit with code 3 if a top-1 accuracy is below this share or percentage."
)
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@_options.device
@_options.reporting
def evaluate(
    models: list[Classifier], data: Path, fail_under: float | None, batch_size: int, device: str, as_json: bool
) -> None:
    """Count right answers on real images, and how often each checkpoint agrees with the first."""
    from dfcompress.verbs.evaluate import evaluate

    measured = evaluate(models, data=data, device=device, batch_size=batch_size, fail_under=fail_under)
    if as_json:
        console.result_json(measured.to_json())
    else:
        _summary.evaluation(measured)
    measured.check_gate()
