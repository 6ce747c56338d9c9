"""`dfcompress quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from dfcompress.commands import _help, _options, _summary
from dfcompress.errors import BadInput
from dfcompress.quantization import Placement, WeightGridKind
from dfcompress.quantization.observers import range_rules
from dfcompress.settings import assignments
from dfcompress.verbs import Finetuning, QuantizationMethod, Target

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis
    from dfcompress.verbs._gates import Gates


def _calibration(
    calibrate: str | None,
    weight_ranges: str | None,
    weight_grid: str | None,
    calibration_steps: int | None,
    replacement: bool | None,
    signed: bool | None,
    correction: bool | None,
) -> dict[str, Any]:
    """The settings of calibration that were given, by the field names of `Calibration`."""
    named = {
        "inputs": calibrate,
        "weights": weight_ranges,
        "weight_grid": weight_grid,
        "steps": calibration_steps,
        "replacement": replacement,
        "signed": signed,
        "correction": correction,
    }
    return {name: value for name, value in named.items() if value is not None}


@click.command(
    cls=_help.Command, epilog=_options.example("dfcompress quantize resnet20.pt --bits 4w4a -o resnet20-4w4a")
)
@_options.model
@click.option(
    "--bits",
    default="4w4a",
    show_default=True,
    metavar="BITS",
    help="Bits of weights, then of activations: 4w4a for instance, 8w8a for int8, 7w8a for int8 on any processor. "
    "auto chooses bits for each layer.",
)
@_help.under(
    "Quantization",
    click.option(
        "--first-last-bits",
        show_default="8, or same with --bits 7w8a",
        metavar="BITS",
        help="Bits of the first and the last layer. same gives them the bits of all others.",
    ),
    click.option(
        "--layer-bits",
        multiple=True,
        metavar="PATTERN=BITS",
        help="Bits of the layers that match, for instance 'layer1.*=8w8a'. float leaves a layer alone.",
    ),
    click.option(
        "--size-ratio",
        type=float,
        metavar="SHARE",
        help="Largest size of the file that --bits auto may choose, as a share of the model in fp32.",
    ),
)
@_options.data
@_options.eval_data
@_options.synthesis(images="2048, or 512 for calibration alone, or 128 for images of more than 64 pixels a side")
@_help.under(
    "Quantization",
    click.option(
        "--method",
        type=click.Choice(get_args(QuantizationMethod)),
        default="default",
        show_default=True,
        help="Settings that hold where no other option says otherwise: ours, or those of Haroush et al. 2020 (paper).",
    ),
    click.option(
        "--placement",
        type=click.Choice(get_args(Placement)),
        show_default="all-tensors where everything is 8w8a or 7w8a and nothing is fine-tuned, else layer-inputs",
        help="Activations that are quantized: every tensor that int8 kernels read or write (faster), or the inputs of "
        "layers alone.",
    ),
)
@_options.group(
    "calibration",
    _calibration,
    _help.under(
        "Quantization",
        click.option(
            "--calibrate",
            type=click.Choice(range_rules()),
            show_default="mse, or minmax with --method paper",
            help="Rule that finds the range of activations.",
        ),
        click.option(
            "--weight-ranges",
            type=click.Choice(range_rules()),
            show_default="mse, or minmax with --method paper",
            help="Rule that finds the range of weights.",
        ),
        click.option(
            "--weight-grid",
            type=click.Choice(get_args(WeightGridKind)),
            show_default="auto, or asymmetric with --method paper",
            help="Grid of weights: with a zero point per output channel (asymmetric) or without one (symmetric). auto "
            "is asymmetric for 2 and 3 bits.",
        ),
        click.option(
            "--calibration-steps",
            type=click.IntRange(1),
            show_default="16, or fewer for images of more than 64 pixels a side, or 200 with --method paper",
            help="Number of calibration batches of 256 images.",
        ),
        click.option(
            "--replacement/--no-replacement",
            default=None,
            show_default="--no-replacement, or --replacement with --method paper",
            help="Draw the images of calibration with replacement, or show every image once before any comes again.",
        ),
        click.option(
            "--signed",
            is_flag=True,
            default=None,
            help="Use signed grids with zero point 0 for activations, as TensorRT requires.",
        ),
        click.option(
            "--correction/--no-correction",
            default=None,
            show_default="--correction, or --no-correction with --method paper",
            help="Correct the biases and the BatchNorm statistics that quantization shifts, or skip this step.",
        ),
    ),
)
@click.option(
    "--finetune",
    type=click.Choice(get_args(Finetuning)),
    show_default="blocks+lsq, or kd with --method paper, or none with --placement all-tensors",
    help="Fine-tuning after calibration: of the rounding block by block (blocks), of weights and grids together (lsq), "
    "of both in turn, of weights alone (kd), or none.",
)
@_help.under(
    "Quantization",
    click.option(
        "--rounding-set",
        "rounding",
        multiple=True,
        metavar="NAME=VALUE",
        help="Override one setting of the rounding that blocks+lsq learns first. steps=0 leaves this part out.",
    ),
)
@_options.training(
    steps="400, or 100 without kd for images of more than 64 pixels a side, or 1000 with --finetune blocks, or 16000 "
    "with --method paper, or 44000 with it for images of more than 64 pixels a side",
    lr="0.003, or 0.001 for images of more than 64 pixels a side, or 0.01 with --finetune blocks or kd",
    batch_size="256, or 32 without kd for images of more than 64 pixels a side, or 32 with --finetune blocks, or 512 "
    "with --method paper, or 256 with it for images of more than 64 pixels a side",
)
@_options.objectives
@_options.temperature("4", 4.0)
@_options.export
@_help.under("Output", _options.target)
@_options.second_recipe
@_options.gates
@_options.output
@_options.compute
@_options.reporting
def quantize(
    model: Classifier,
    bits: str,
    first_last_bits: str | None,
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
    """Quantize a model to few bits. It is calibrated and fine-tuned on images synthesized from the model."""
    import json

    from dfcompress.quantization.layer_report import REPORT
    from dfcompress.verbs.quantize import quantize

    gates.require_images(eval_data)
    if target != "onnxruntime" and not export:
        raise BadInput("--target applies to the file that --export writes.", "Add --export onnx.")
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
