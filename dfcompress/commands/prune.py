"""`dfcompress prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from dfcompress.commands import _help, _options, _summary
from dfcompress.pruning import ImportanceName
from dfcompress.verbs import Repair

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis
    from dfcompress.verbs._gates import Gates


@click.command(cls=_help.Command, epilog=_options.example("dfcompress prune resnet44.pt --flops 0.5 -o resnet44-half"))
@_options.model
@click.option("--flops", type=float, metavar="SHARE", help="Share of the multiply-accumulates to keep.")
@_help.under(
    "Pruning",
    click.option("--parameters", type=float, metavar="SHARE", help="Share of the parameters to keep."),
    click.option("--filters", type=float, metavar="SHARE", help="Share of the outputs of convolutions to keep."),
    click.option(
        "--latency",
        type=float,
        metavar="SHARE",
        help="Share of the time in onnxruntime to keep, by the measured times of the network's layers.",
    ),
    click.option(
        "--importance",
        type=click.Choice(get_args(ImportanceName)),
        default="auto",
        show_default=True,
        help="Measure by which the least important channels are removed first. fold merges similar channels. auto "
        "tries magnitude, taylor and fold, and takes another than magnitude where the answers change clearly less "
        "after refitting.",
    ),
    click.option("--uniform", is_flag=True, help="Remove the same share of channels from every layer."),
    click.option(
        "--round-to",
        type=click.IntRange(1),
        show_default="1, or 8 with --latency and for images of more than 64 pixels a side",
        help="Keep a multiple of this number of channels in every layer that loses some.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of rounds of pruning and repair. All rounds share the training steps.",
    ),
)
@click.option(
    "--repair",
    type=click.Choice(get_args(Repair)),
    default="distill",
    show_default=True,
    help="Repair after pruning: refit weights and BatchNorm statistics in seconds and then distill, refit alone, or "
    "none.",
)
@_options.data
@_options.eval_data
@_options.synthesis(images="2048, or 1000 for images of more than 64 pixels a side")
@_options.second_recipe
@_options.probe_images
@_options.training(
    steps="3000, or 1000 for images of more than 64 pixels a side",
    lr="0.02, or 0.01 for images of more than 64 pixels a side",
    batch_size="128, or 32 for images of more than 64 pixels a side",
)
@_options.objectives
@_options.temperature("4.0", 4.0)
@_options.export
@_options.gates
@_options.output
@_options.compute
@_options.reporting
def prune(
    model: Classifier,
    flops: float | None,
    parameters: float | None,
    filters: float | None,
    latency: float | None,
    importance: ImportanceName,
    uniform: bool,
    round_to: int | None,
    rounds: int,
    repair: Repair,
    data: Path | None,
    eval_data: Path | None,
    synthesis: Synthesis,
    second_recipe: str | None,
    probe_images: int,
    training: dict[str, Any],
    objectives: dict[str, float] | None,
    temperature: float,
    export: str | None,
    gates: Gates,
    compute: Compute,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove channels from a model. The smaller network is repaired on images synthesized from the model."""
    import json

    from dfcompress.verbs._prune_step import REPORT
    from dfcompress.verbs.prune import prune

    gates.require_images(eval_data)
    plan = prune.plan(
        model,
        flops=flops,
        parameters=parameters,
        filters=filters,
        latency=latency,
        importance=importance,
        uniform=uniform,
        round_to=round_to,
        rounds=rounds,
        repair=repair,
        data=data,
        output=output,
        synthesis=synthesis,
        second_recipe=second_recipe,
        probe_images=probe_images,
        training=training,
        objectives=objectives,
        temperature=temperature,
        export="onnxruntime" if export else None,
        compute=compute,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        _summary.plan(plan, as_json=as_json)
        return
    result = plan.execute()
    _summary.compressed(result, as_json=as_json, slow=_summary.SLOW_PRUNED)
    if not as_json:
        _summary.widths(json.loads((Path(result.output) / REPORT).read_text()))
    gates.check(result)
