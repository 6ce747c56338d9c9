"""`inspect`: what a checkpoint is, and what can be done with it.

dfcompress.inspect("resnet20.th")
dfcompress.inspect(dfcompress.load("net.pt", arch="net.py:make"), write_card=True)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfcompress.errors import BadInput
from dfcompress.evaluation.normalisation import NormalisationCheck, check_normalisation
from dfcompress.models.answers import answers_with, why_not_exclusive
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import opened, state_bytes, write_sidecar
from dfcompress.models.classifier import Classifier, multiply_accumulates
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.safe_reading import file_bytes
from dfcompress.models.statistics import dead_channels, statistics_layers, why_no_statistics
from dfcompress.synthesis.spec import find_record


@dataclass(frozen=True)
class Ability:
    """Whether a verb can serve a model, and why it cannot or what it needs."""

    verb: str
    possible: bool
    why: str = ""


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    `macs` are multiply-accumulates of one image; `bytes` and `sha256` are those of the weights' file (the tensors where
    there is none); `batchnorm_layers` counts those that keep running statistics, `dead_channels` their channels whose
    variance is lost in eps. `answers` says what is used of the network's answer: its logits, or those before its
    softmax. `normalisation` compares the card's mean and std with what the first BatchNorm expects, None where that
    cannot be told. `record` is the kind of the activation record beside the checkpoint, or why it cannot be used; None
    where there is none. `card_file` is the sidecar that was written.
    """

    checkpoint: str
    architecture: str
    classes: int
    input_size: tuple[int, int, int]
    parameters: int
    macs: int
    batchnorm_layers: int
    dead_channels: int
    bytes: int
    sha256: str
    card: ModelCard
    answers: str
    normalisation: NormalisationCheck | None
    record: str | None
    can: list[Ability]
    card_file: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return {**asdict(self), "card": self.card.to_json()}


def inspect(checkpoint: str | Path | Classifier, *, write_card: bool = False) -> Inspection:
    """Say what a checkpoint is and what can be done with it.

    With `write_card` its card is written beside it as `<name>.card.json`: there it can be corrected, and from there it
    is read from then on.
    Raises `BadInput` where the checkpoint cannot be read, its architecture is not known or it does not take its input.
    """
    classifier = opened(checkpoint)
    card, file = classifier.card, classifier.path
    try:
        record = find_record(classifier)
        kind = record.about.kind if record else None
    except BadInput as error:
        record, kind = None, f"unusable: {error.problem}"
    return Inspection(
        checkpoint=str(file or classifier.name),
        architecture=card.architecture,
        classes=card.classes,
        input_size=card.input_size,
        parameters=sum(parameter.numel() for parameter in classifier.network.parameters()),
        macs=multiply_accumulates(classifier),
        batchnorm_layers=len(statistics_layers(classifier.network)),
        dead_channels=dead_channels(classifier.network),
        bytes=file_bytes(file) if file else state_bytes(classifier.network),
        sha256=classifier.sha256,
        card=card,
        answers=answers_with(classifier.network),
        normalisation=check_normalisation(classifier),
        record=kind,
        can=abilities(classifier, with_record=record is not None),
        card_file=str(write_sidecar(classifier)) if write_card else None,
    )


def abilities(classifier: Classifier, *, with_record: bool = False) -> list[Ability]:
    """What each verb can do with a model, and with the record beside it if there is one."""
    exported = Ability("export", True)
    if unfit := why_not_exclusive(classifier):
        verbs = ("invert", "distill", "merge", "quantize", "evaluate")
        return [*(Ability(verb, False, unfit.why) for verb in verbs), exported]
    why = None if with_record else why_no_statistics(classifier.network)
    makes_images = why is None
    from_data = "" if makes_images else f"needs --data or --records, as {why}"
    packed = is_quantized(classifier.network)
    return [
        Ability("invert", makes_images, "" if why is None else f"needs --records, as {why}"),
        Ability("distill", True, from_data),
        Ability("merge", True, "" if why is None else f"needs --data, as {why}"),
        Ability("quantize", not packed, "it is quantized already" if packed else from_data),
        Ability("evaluate", True),
        exported,
    ]
