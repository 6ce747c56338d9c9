"""`dfcompress merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress.commands import _options, _summary
from dfcompress.training.multi_teacher import NAMES

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
    type=click.Choice(NAMES),
    default="logit-matching",
    show_default=True,
    help="Merging method: logit-matching (ours; alias all-logits) or shapira-sidi (their paper of 2020; alias paper).",
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
@_options.synthesis(images="1024; of shapira-sidi 4096")
@_options.training(steps="12000; of shapira-sidi 125 epochs", lr=0.05, batch_size="128; of shapira-sidi 64 a model")
@_options.mix
@_options.unseen
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
    mix: str,
    unseen: int,
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
    from dfcompress.training.multi_teacher import merging_method
    from dfcompress.verbs.invert import plans
    from dfcompress.verbs.merge import begin_merged, image_supplies, merge, usual_images

    if student_init == "none":
        student_init = None
    if dry_run:
        merging = merging_method(method)
        (pupil, *_), _ = begin_merged(
            models,
            student,
            student_init,
            method=merging,
            class_map=class_map,
            seed=compute.seed,
        )
        own, mix = usual_images(merging, synthesis, mix)
        architecture = pupil.card.architecture
        supplies = image_supplies(models, data, own, compute, mix=mix, unseen=unseen, student=architecture)
        counts = list(map(len, supplies))
        usual = with_defaults(merging.training(min(counts), len(models)), training)
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
        mix=mix,
        unseen=unseen,
        compute=compute,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
    )
    _summary.compressed(result, as_json=as_json)
