"""`dfcompress merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress.commands import _help, _options, _summary
from dfcompress.training.multi_teacher import NAMES, MethodName

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis


@click.command(cls=_help.Command, epilog=_options.example("dfcompress merge t1.pt t2.pt --student resnet18 -o merged"))
@_options.models_of_other_classes
@_options.student
@_options.student_init
@click.option(
    "--method",
    type=click.Choice(NAMES),
    default="logit-matching",
    show_default=True,
    metavar="NAME",
    help="Method of merging: logit-matching (ours, also called all-logits) or shapira-sidi (Shapira and Sidi 2020, "
    "also called paper).",
)
@click.option("--class-map", type=_options.PATH, help="JSON file with one list of class names for each teacher.")
@click.option(
    "--data",
    multiple=True,
    type=_options.PATH,
    help="Images of one teacher. Give the option once for each teacher, in order.",
)
@click.option(
    "--eval-data",
    multiple=True,
    type=_options.PATH,
    help="Real images on which accuracy is reported: one source, or one for each teacher.",
)
@_options.synthesis(images="1024, or 4096 with --method shapira-sidi")
@_options.training(
    steps="12000, or 125 epochs with --method shapira-sidi",
    lr=0.05,
    batch_size="128, or 64 per model with --method shapira-sidi",
)
@_options.second_recipe
@_options.probe_images
@_options.output
@_options.compute
@_options.reporting
def merge(
    models: list[Classifier],
    student: str | None,
    student_init: str | None,
    method: MethodName,
    class_map: Path | None,
    data: tuple[Path, ...],
    eval_data: tuple[Path, ...],
    synthesis: Synthesis,
    training: dict[str, Any],
    second_recipe: str | None,
    probe_images: int,
    compute: Compute,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train one student for the classes of several models. It learns from images synthesized from each model."""
    from dfcompress.verbs.merge import merge

    plan = merge.plan(
        models,
        student=student,
        student_init=student_init,
        method=method,
        class_map=class_map,
        data=data,
        output=output,
        synthesis=synthesis,
        training=training,
        second_recipe=second_recipe,
        probe_images=probe_images,
        compute=compute,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        _summary.plan(plan, as_json=as_json)
    else:
        _summary.compressed(plan.execute(), as_json=as_json)
