"""`dfcompress inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _help, _options, _summary
from dfcompress.errors import listed

if TYPE_CHECKING:
    from dfcompress.evaluation.normalisation import NormalisationCheck
    from dfcompress.models.classifier import Classifier
    from dfcompress.verbs.inspect import Inspection


@click.command(cls=_help.Command, epilog=_options.example("dfcompress inspect resnet20.pt"))
@_options.model
@click.option(
    "--write-card",
    is_flag=True,
    help="Write model.card.json beside the checkpoint. Commands read it from then on, with your corrections.",
)
@_options.reporting
def inspect(model: Classifier, write_card: bool, as_json: bool) -> None:
    """Show the properties of a checkpoint and the commands that can use it."""
    from dfcompress.verbs.inspect import inspect

    found = inspect(model, write_card=write_card)
    if as_json:
        console.result_json(found.to_json())
    else:
        _print(found)


def _print(found: Inspection) -> None:
    card, origin = found.card, found.card.origin
    widths = ", of other widths" if card.widths else ""
    names = listed(card.class_names or (), _summary.CLASSES_SHOWN)
    facts = [
        ("checkpoint", found.checkpoint, ""),
        ("architecture", found.architecture + widths, origin.get("architecture", "")),
        ("classes", str(found.classes), origin.get("classes", "")),
        ("answers with", found.answers, ""),
        ("class names", names or "none", origin.get("class_names", "")),
        ("input size", "x".join(map(str, card.input_size)), origin.get("input_size", "")),
        ("mean", ", ".join(f"{value:g}" for value in card.mean), origin.get("mean", "")),
        ("std", ", ".join(f"{value:g}" for value in card.std), origin.get("std", "")),
        ("parameters", f"{found.parameters:,}", ""),
        ("MACs", f"{found.macs:,}", ""),
        ("bytes an image", f"{found.image_bytes:,}", ""),
        ("bytes", f"{found.bytes:,}", ""),
        ("BatchNorm layers", str(found.batchnorm_layers), ""),
        ("dead channels", f"{found.dead_channels:,}", ""),
        ("record beside it", found.record or "none", ""),
    ]
    for name, value, known in facts:
        console.result(f"{name:<18}{value}{f'  ({known})' if known else ''}")
    if found.normalisation is not None:
        console.result(f"{'normalisation':<18}{_normalisation(found.normalisation)}")
    for ability in found.can:
        why = f": {ability.why}" if ability.why else ""
        console.result(f"{ability.verb.replace('_', ' '):<18}{'yes' if ability.possible else 'no'}{why}")
    if found.card_file:
        console.result(f"card written to {found.card_file}")


def _normalisation(check: NormalisationCheck) -> str:
    mean = ", ".join(f"{value:.2f}" for value in check.image_mean)
    implied = f"the first BatchNorm then expects images of mean {mean} and std {check.image_std:.2f}"
    if check.consistent:
        return f"consistent: {implied}"
    likely = ""
    if check.likely_mean and check.likely_std:
        options = f"--mean {_values(check.likely_mean)} --std {_values(check.likely_std)}"
        likely = f"; with {check.likely} ({options}) they would be ordinary images"
    if check.consistent is None:
        return f"cannot be told: {implied}, which is unusual but possible{likely}"
    return f"NOT consistent: {implied}{likely}. Set --mean and --std."


def _values(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
