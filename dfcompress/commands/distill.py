"""`dfcompress distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfcompress.commands import _help, _options, _summary
from dfcompress.errors import BadInput

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis

UNITS = {"s": 1, "m": 60, "h": 3600}


def _seconds(budget: str | None) -> float | None:
    """Convert `90s`, `30m` or `2h` to seconds; raises `BadInput` for other forms."""
    if budget is None:
        return None
    try:
        return float(budget[:-1]) * UNITS[budget[-1:]]
    except (ValueError, KeyError):
        raise BadInput(f"--budget {budget!r} is not understood.", "Write it like 90s, 30m or 2h.") from None


@click.command(
    cls=_help.Command, epilog=_options.example("dfcompress distill resnet44.pt --student cifar_resnet20 -o student")
)
@_options.model
@_options.student
@_options.student_init
@_options.data
@_options.eval_data
@_options.synthesis(images="2048, or 1000 for images of more than 64 pixels a side, or 12800 from a generator")
@_options.training(steps=6000, lr=0.1, batch_size=128)
@_options.objectives
@_options.temperature("4, or the temperature that the recipe states")
@_options.second_recipe
@_options.probe_images
@_options.group(
    "budget",
    _seconds,
    click.option(
        "--budget",
        metavar="TIME",
        help="Time for the whole run on this machine, for instance 30m. It decides the number of images and of "
        "training steps.",
    ),
)
@_options.output
@_options.compute
@_options.reporting
def distill(
    model: Classifier,
    student: str | None,
    student_init: str | None,
    data: Path | None,
    eval_data: Path | None,
    synthesis: Synthesis,
    training: dict[str, Any],
    objectives: dict[str, float] | None,
    temperature: float | None,
    second_recipe: str | None,
    probe_images: int,
    budget: float | None,
    compute: Compute,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a smaller student on images synthesized from the model."""
    from dfcompress.verbs.distill import distill

    plan = distill.plan(
        model,
        student=student,
        student_init=student_init,
        data=data,
        output=output,
        synthesis=synthesis,
        training=training,
        objectives=objectives,
        temperature=temperature,
        second_recipe=second_recipe,
        probe_images=probe_images,
        budget=budget,
        compute=compute,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        _summary.plan(plan, as_json=as_json)
    else:
        _summary.compressed(plan.execute(), as_json=as_json)
