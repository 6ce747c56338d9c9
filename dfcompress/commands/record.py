"""`dfcompress record`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress import console
from dfcompress.commands import _help, _options, _summary
from dfcompress.synthesis.records import KINDS

if TYPE_CHECKING:
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.records.accumulator import RecordSettings
    from dfcompress.verbs.record import Recorded


def _settings(**values: Any) -> RecordSettings:
    from dfcompress.synthesis.records.accumulator import RecordSettings

    return RecordSettings(**values)


@click.command(cls=_help.Command, epilog=_options.example("dfcompress record model.pt --data train --kind all-layers"))
@_options.model
@click.option("--data", type=_options.PATH, required=True, help="Images that the model was trained on.")
@_options.group(
    "settings",
    _settings,
    click.option(
        "--kind",
        type=click.Choice(KINDS),
        default="all-layers",
        show_default=True,
        help="Kind of activation record.",
    ),
    click.option(
        "--layers", multiple=True, metavar="PATTERN", help="Record only the layers that match, for instance 'conv*'."
    ),
    _help.under(
        "Recording",
        _options.renamed(
            "--pooled",
            "--class-independent",
            "class_independent",
            is_flag=True,
            help="Keep one set of statistics for all classes together. Gaussian kinds alone have this option.",
        ),
        click.option(
            "--covariance",
            default="auto",
            show_default=True,
            metavar="FORM",
            help="Form of the covariance of Gaussian kinds: auto, full, block:N or diagonal.",
        ),
        click.option(
            "--temperature",
            type=float,
            default=8.0,
            show_default=True,
            help="Temperature by which the recorded logits are divided.",
        ),
        click.option(
            "--per-class",
            type=click.IntRange(1),
            default=100,
            show_default=True,
            help="Number of activations of each class that spectral kinds store.",
        ),
        _options.renamed(
            "--keep",
            "--coefficients",
            "coefficients",
            type=float,
            default=0.1,
            show_default=True,
            help="Share of an activation's coefficients that spectral kinds store.",
        ),
        click.option(
            "--min-images",
            type=click.IntRange(2),
            default=20,
            show_default=True,
            help="Refuse a class with fewer images than this.",
        ),
    ),
)
@click.option(
    "-o", "--output", type=_options.PATH, help="File to write. By default MODEL.records.safetensors beside the model."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--dry-run", is_flag=True, help="Print what would be recorded and its size, and write nothing.")
@_options.device
@_help.under(
    "Machine",
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Seed that chooses the activations to store.",
    ),
)
@_options.reporting
def record(
    model: Classifier,
    data: Path,
    settings: RecordSettings,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Record statistics of activations on the training images, which a model's owner releases with the model."""
    from dfcompress.verbs.record import record

    made = record(
        model,
        data=data,
        settings=settings,
        output=output,
        device=device,
        seed=seed,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if as_json:
        console.result_json(made.to_json())
    else:
        _print(made, dry_run=dry_run)


def _print(made: Recorded, *, dry_run: bool) -> None:
    what = "would be" if dry_run else "is"
    console.result(f"{made.output} {what} a record of kind {made.kind}, from {made.images:,} images")
    share = made.bytes / made.data_bytes
    console.result(f"{made.bytes:,} bytes, {share:.1%} of the {made.data_bytes:,} bytes of images")
    console.result("layers: " + ", ".join(f"{layer} ({units:,})" for layer, units in made.units.items()))
    _summary.classes(made.classes)
    if made.details:
        console.result(", ".join(f"{name} {value}" for name, value in made.details.items()))
    console.result(f"{made.memory_bytes / 2**20:,.0f} MiB to sum up, {made.seconds:.0f} s")
