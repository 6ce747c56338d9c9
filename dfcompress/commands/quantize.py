"""`dfcompress quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from dfcompress.commands import _options, _summary
from dfcompress.errors import BadInput
from dfcompress.quantization import Placement
from dfcompress.settings import assignments
from dfcompress.verbs import Finetuning, QuantizationMethod, Target

if TYPE_CHECKING:
    from dfcompress.device import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis
    from dfcompress.verbs._gates import Gates


@click.command(epilog=_options.example("dfcompress quantize resnet20.pt --bits 4w4a -o resnet20-4w4a"))
@_options.model
@click.option(
    "--bits",
    default="4w4a",
    show_default=True,
    help="Bits of weights, then of activations, for instance 4w4a; or auto.",
)
@click.option(
    "--first-last-bits",
    default="8",
    show_default=True,
    help="Bits of the first and the last layer; same: as all others.",
)
@click.option(
    "--layer-bits",
    multiple=True,
    metavar="PATTERN=BITS",
    help="Bits, or float, of the layers that match, for instance 'layer1.*=8w8a'.",
)
@click.option(
    "--size-ratio", type=float, help="With --bits auto: largest size of the file, as a share of the model in fp32."
)
@_options.data
@_options.eval_data
@_options.synthesis(images="2048; of more than 64 pixels a side 128")
@click.option(
    "--method",
    type=click.Choice(get_args(QuantizationMethod)),
    default="default",
    show_default=True,
    help="Default settings: ours, or those of Haroush et al. 2020 (paper); other options override them.",
)
@click.option(
    "--placement",
    type=click.Choice(get_args(Placement)),
    show_default="all-tensors where everything is 8w8a and nothing is fine-tuned",
    help="Which activations are quantized: all that int8 kernels read or write (faster), or inputs of layers alone.",
)
@_options.calibration
@click.option(
    "--finetune",
    type=click.Choice(get_args(Finetuning)),
    show_default="blocks+lsq; kd of paper; none of all-tensors",
    help="Fine-tuning: rounding by blocks, then weights and steps (lsq); one of the two; weights only (kd); none.",
)
@click.option(
    "--rounding-set",
    "rounding",
    multiple=True,
    metavar="NAME=VALUE",
    help="Override one setting of the rounding that blocks+lsq learns first; steps=0 leaves it out.",
)
@_options.training(
    steps="400; 1000 of blocks; 16000 of paper",
    lr="0.003; 0.01 of blocks, kd",
    batch_size="256; 32 of blocks; 512 of paper",
)
@_options.objectives
@_options.temperature("4", 4.0)
@click.option("--export", type=click.Choice(["onnx"]), help="Also write model.onnx and check it in onnxruntime.")
@_options.target
@_options.second_recipe
@_options.gates
@_options.output
@_options.compute
@_options.reporting
def quantize(
    model: Classifier,
    bits: str,
    first_last_bits: str,
    layer_bits: tuple[str, ...],
    size_ratio: float | None,
    data: Path | None,
    eval_data: Path | None,
    synthesis: Synthesis,
    method: QuantizationMethod,
    placement: Placement | None,
    calibration: dict[str, Any],
    finetune: Finetuning | None,
    rounding: tuple[str, ...],
    training: dict[str, Any],
    objectives: dict[str, float] | None,
    temperature: float,
    export: str | None,
    target: Target,
    second_recipe: str | None,
    gates: Gates,
    compute: Compute,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a few-bit model, calibrated and fine-tuned on images made from it."""
    import json

    from dfcompress.quantization.layer_report import REPORT
    from dfcompress.verbs.quantize import quantize

    gates.require_images(eval_data)
    if target != "onnxruntime" and not export:
        raise BadInput(f"--target {target} is of the file that --export writes.", "Add --export onnx.")
    plan = quantize.plan(
        model,
        bits=bits,
        first_last_bits=first_last_bits,
        layer_bits=assignments(layer_bits, "--layer-bits"),
        size_ratio=size_ratio,
        data=data,
        output=output,
        synthesis=synthesis,
        second_recipe=second_recipe,
        method=method,
        placement=placement,
        calibration=calibration,
        finetune=finetune,
        rounding=assignments(rounding, "--rounding-set"),
        training=training,
        objectives=objectives,
        temperature=temperature,
        export=target if export else None,
        compute=compute,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        _summary.plan(plan, as_json=as_json)
        return
    result = plan.execute()
    _summary.compressed(result, as_json=as_json)
    if not as_json:
        _summary.layers(json.loads((Path(result.output) / REPORT).read_text()))
    gates.check(result)
