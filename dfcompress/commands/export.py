"""`dfcompress export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _help, _options, _summary
from dfcompress.verbs import Target

if TYPE_CHECKING:
    from dfcompress.models.classifier import Classifier


@click.command(cls=_help.Command, epilog=_options.example("dfcompress export resnet20-4w4a -o resnet20.onnx"))
@_options.model
@click.option(
    "-o", "--output", type=_options.PATH, help="ONNX file to write. By default model.onnx in the folder, or NAME.onnx."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@_options.target
@click.option(
    "--data",
    type=_options.PATH,
    help="Images on which the file and the model are compared. By default the images that the model was made with.",
)
@_options.reporting
def export(
    model: Classifier, output: Path | None, overwrite: bool, target: Target, data: Path | None, as_json: bool
) -> None:
    """Write a model as ONNX and check it in onnxruntime. Quantized weights are stored as integers of their width."""
    from dfcompress.verbs.export import export

    result = export(model, output=output, target=target, data=data, overwrite=overwrite)
    if as_json:
        console.result_json(result.to_json())
    else:
        _summary.exported(result)
