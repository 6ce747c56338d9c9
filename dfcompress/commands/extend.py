"""`dfcompress extend`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress.commands import _help, _options, _summary
from dfcompress.training.class_incremental import DEFAULT, METHODS

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis
    from dfcompress.training.class_incremental import MethodName
    from dfcompress.verbs._gates import Gates


@click.command(cls=_help.Command, epilog=_options.example("dfcompress extend resnet20.pt --new-data birds -o extended"))
@_options.model_of_other_classes
@click.option(
    "--new-data",
    required=True,
    type=_options.PATH,
    help="Labelled images of the new classes: one folder per class, an .npz file, IDX files, or the batches of CIFAR.",
)
@click.option(
    "--class-names", type=_options.PATH, help="Text file with the name of one label of --new-data per line, in order."
)
@click.option(
    "--also-old", is_flag=True, help="Take images of a class that the model knows as more images of that class."
)
@click.option(
    "--old-images",
    type=_options.PATH,
    help="Synthetic set that stands for the old classes. Without it, images are synthesized first.",
)
@_help.under(
    "Training",
    click.option("--old-data", type=_options.PATH, help="Real images of the old classes, for --method oracle alone."),
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=DEFAULT,
    show_default=True,
    help="Method of class-incremental learning. oracle learns from real images of all classes, for comparison.",
)
@click.option(
    "--eval-data",
    multiple=True,
    type=_options.PATH,
    help="Real images on which accuracy is reported: one source of all classes, or one of the old and then one of the "
    "new classes.",
)
@_options.synthesis(images="2048, or 1000 for images of more than 64 pixels a side")
@_options.training(steps="4000 with abd, more for many new images, else 1000", lr=0.05, batch_size=128)
@_options.second_recipe
@_options.probe_images
@_options.gates
@_options.output
@_options.compute
@_options.reporting
def extend(
    model: Classifier,
    new_data: Path,
    class_names: Path | None,
    also_old: bool,
    old_images: Path | None,
    old_data: Path | None,
    method: MethodName,
    eval_data: tuple[Path, ...],
    synthesis: Synthesis,
    training: dict[str, Any],
    second_recipe: str | None,
    probe_images: int,
    gates: Gates,
    compute: Compute,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Teach the model new classes from labelled images. Images of its old classes are not needed."""
    from dfcompress.verbs.extend import extend

    gates.require_images(eval_data[0] if eval_data else None)
    plan = extend.plan(
        model,
        new_data=new_data,
        class_names=class_names,
        also_old=also_old,
        old_images=old_images,
        old_data=old_data,
        method=method,
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
        return
    result = plan.execute()
    _summary.compressed(result, as_json=as_json)
    gates.check(result)
