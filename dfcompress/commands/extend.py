"""`dfcompress extend`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress.commands import _options, _summary
from dfcompress.training.class_incremental import DEFAULT, METHODS

if TYPE_CHECKING:
    from dfcompress.device import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis
    from dfcompress.training.class_incremental import MethodName
    from dfcompress.verbs._gates import Gates


@click.command(epilog=_options.example("dfcompress extend resnet20.pt --new-data birds -o extended"))
@_options.model_of_other_classes
@click.option(
    "--new-data",
    required=True,
    type=_options.PATH,
    help="Labelled images of the new classes: one folder a class, an .npz, or IDX files.",
)
@click.option(
    "--class-names", type=_options.PATH, help="Text file with the names of the labels of --new-data, one a line."
)
@click.option("--also-old", is_flag=True, help="Take images of known class names as more images of those classes.")
@click.option(
    "--old-images",
    type=_options.PATH,
    help="Synthetic set that stands for the old classes; without it, images are synthesized first.",
)
@click.option("--old-data", type=_options.PATH, help="Real images of the old classes, for --method oracle alone.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=DEFAULT,
    show_default=True,
    help="Method of class-incremental learning; oracle learns from real images of all classes, for comparison.",
)
@click.option(
    "--eval-data",
    multiple=True,
    type=_options.PATH,
    help="Real images to report accuracy on: one source of all classes, or one of the old and one of the new classes.",
)
@_options.synthesis(images="2048; of more than 64 pixels a side 1000")
@_options.training(steps=1000, lr=0.05, batch_size=128)
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
    """Let the model learn new classes from labelled images, without images of the classes that it knows."""
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
