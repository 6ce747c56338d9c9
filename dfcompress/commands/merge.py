"""`dfcompress merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress.commands import _options, _summary

if TYPE_CHECKING:
    from dfcompress.device import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis


@click.command(epilog=_options.example("dfcompress merge t1.pt t2.pt --student resnet18 -o merged"))
@_options.models_of_other_classes
@_options.student
@_options.student_init
@click.option(
    "--method",
    type=click.Choice(["all-logits", "paper"]),
    default="all-logits",
    show_default=True,
    help="Merging method: all-logits (ours) or paper (Shapira and Sidi 2020).",
)
@click.option("--class-map", type=_options.PATH, help="JSON file with a list of class names for each teacher.")
@click.option(
    "--data",
    multiple=True,
    type=_options.PATH,
    help="Images of one teacher; repeat the option for each teacher, in order.",
)
@click.option(
    "--eval-data",
    multiple=True,
    type=_options.PATH,
    help="Real images to report accuracy on: one source, or one per teacher.",
)
@_options.synthesis(images="1024; of paper 4096")
@_options.training(steps="12000; of paper 125 epochs", lr=0.05, batch_size="128; of paper 64 a model")
@_options.second_recipe
@_options.probe_images
@_options.output
@_options.compute
@_options.reporting
def merge(
    models: list[Classifier],
    student: str | None,
    student_init: str | None,
    method: str,
    class_map: Path | None,
    data: tuple[Path, ...],
    eval_data: tuple[Path, ...],
    synthesis: Synthesis,
    training: dict[str, Any],
    second_recipe: str,
    probe_images: int,
    compute: Compute,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train one student that knows the classes of several models, on images made from each."""
    import dataclasses

    from dfcompress.settings import with_defaults
    from dfcompress.training.loop import require_trainable
    from dfcompress.verbs.invert import plans
    from dfcompress.verbs.merge import begin_merged, image_supplies, merge, usual_images, usual_training

    if student_init == "none":
        student_init = None
    if dry_run:
        (pupil, *_), _ = begin_merged(
            models,
            student,
            student_init,
            method=method,  # type: ignore[arg-type]
            class_map=class_map,
            seed=compute.seed,
        )
        own, second_recipe = usual_images(method, synthesis, second_recipe)  # type: ignore[arg-type]
        architecture = pupil.card.architecture
        supplies = image_supplies(
            models, data, own, compute, mix=second_recipe, unseen=probe_images, student=architecture
        )
        counts = list(map(len, supplies))
        usual = with_defaults(usual_training(method, min(counts), len(models)), training)  # type: ignore[arg-type]
        require_trainable(pupil, usual, compute, counts)
        _summary.plan(*plans(*supplies), as_json=as_json, training=dataclasses.asdict(usual))
        return
    result = merge(
        models,
        student=student,
        student_init=student_init,
        method=method,  # type: ignore[arg-type]
        class_map=class_map,
        data=data,
        output=output,
        synthesis=synthesis,
        training=training,
        mix=second_recipe,
        unseen=probe_images,
        compute=compute,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
    )
    _summary.compressed(result, as_json=as_json)
