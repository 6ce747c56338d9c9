"""`dfcompress quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress.commands import _options, _summary

if TYPE_CHECKING:
    from dfcompress.device import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis


@click.command(epilog=_options.example("dfcompress quantize resnet20.pt --bits 4w4a -o resnet20-4w4a"))
@_options.model
@click.option("--bits", default="4w4a", show_default=True, help="Bits of weights, then of activations.")
@click.option("--first-last-bits", type=int, default=8, show_default=True, help="Bits of the first and the last layer.")
@_options.data
@_options.eval_data
@_options.synthesis(images=1024)
@_options.training(steps=400, lr=0.01, batch_size=256)
@_options.temperature
@_options.output
@_options.compute
@_options.reporting
def quantize(
    model: Classifier,
    bits: str,
    first_last_bits: int,
    data: Path | None,
    eval_data: Path | None,
    synthesis: Synthesis,
    training: dict[str, Any],
    temperature: float,
    compute: Compute,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a few-bit model, calibrated and fine-tuned on images made from it; --train-steps 0 only calibrates."""
    import dataclasses

    from dfcompress.quantization.quantize import FINETUNING, quantize
    from dfcompress.settings import changed
    from dfcompress.synthesis.invert import plans

    settings = changed(FINETUNING, training, "setting of training called")
    if dry_run:
        made = [] if data else plans(model, synthesis, compute)
        _summary.plan(*made, as_json=as_json, training=dataclasses.asdict(settings))
        return
    result = quantize(
        model,
        bits=bits,
        first_last_bits=first_last_bits,
        data=data,
        output=output,
        synthesis=synthesis,
        training=settings,
        temperature=temperature,
        compute=compute,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
    )
    _summary.compressed(result, as_json=as_json)
