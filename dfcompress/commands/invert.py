"""`dfcompress invert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _help, _options, _summary

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis
    from dfcompress.verbs.invert import Inversion


@click.command(cls=_help.Command, epilog=_options.example("dfcompress invert resnet20.pt --images 2048 -o images"))
@_options.model
@_options.synthesis(images="1024, or 128 for images of more than 64 pixels a side")
@_help.under(
    "Images",
    click.option(
        "--student",
        metavar="NAME",
        help="Architecture of the student that adaptive images compete with. By default the model's own.",
    ),
)
@click.option(
    "--verify",
    type=_options.PATH,
    multiple=True,
    help="Another checkpoint, which classifies the finished images as a check.",
)
@_options.output
@_options.compute
@_options.reporting
def invert(
    model: Classifier,
    synthesis: Synthesis,
    compute: Compute,
    student: str | None,
    verify: tuple[Path, ...],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Synthesize images from a checkpoint alone."""
    from dfcompress.verbs.invert import invert

    plan = invert.plan(
        model,
        output=output,
        synthesis=synthesis,
        compute=compute,
        student=student,
        verify=verify,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        _summary.plan(plan, as_json=as_json)
    else:
        _print(plan.execute(), as_json=as_json)


def _print(made: Inversion, *, as_json: bool) -> None:
    if as_json:
        console.result_json(made.to_json())
        return
    console.result(f"{made.images} images in {made.seconds:.0f} s: {made.output} (picture: {made.output}/preview.png)")
    if made.teacher_top1 is not None:
        console.result(f"the teacher classifies {made.teacher_top1:.1%} as intended")
    if made.bn_divergence is not None:
        console.result(f"BatchNorm divergence (J_KL over the set): {made.bn_divergence:.4f}")
    if min(made.classes) < max(made.classes) / 2:
        _summary.classes(made.classes)
    for warning in made.warnings:
        console.result(f"warning: {warning}")
    for other in made.verify:
        divergence = "" if other.bn_divergence is None else f", J_KL {other.bn_divergence:.4f}"
        console.result(f"{other.checkpoint} classifies {other.top1:.1%} as intended{divergence}")
