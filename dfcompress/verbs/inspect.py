"""`inspect`: what a checkpoint is, and what can be done with it.

dfcompress.inspect("resnet20.th")
dfcompress.inspect(dfcompress.load("net.pt", arch="net.py:make"), write_card=True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfcompress.errors import BadInput
from dfcompress.evaluation.normalisation import NormalisationCheck, check_normalisation
from dfcompress.models.answers import answers_with, why_not_exclusive
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import opened, state_bytes, write_sidecar
from dfcompress.models.classifier import Classifier, bytes_a_pass, multiply_accumulates
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.patches import knows_patches_alone
from dfcompress.models.safe_reading import file_bytes
from dfcompress.models.statistics import dead_channels, statistics_layers, why_no_statistics
from dfcompress.synthesis.spec import find_record
from dfcompress.verbs._verb import verb


@dataclass(frozen=True)
class Ability:
    """Whether a verb can serve a model, and why it cannot or what it needs."""

    verb: str
    possible: bool
    why: str = ""


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    `macs` are multiply-accumulates of one image, `image_bytes` what an image takes of the memory on its way through the
    network in fp32, without gradients; `bytes` and `sha256` are those of the weights' file (the tensors where
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
    image_bytes: int
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


@verb
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
        image_bytes=round(bytes_a_pass(classifier).each),
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


@dataclass(frozen=True)
class _Facts:
    """What decides which verbs can serve a model: why its classes are not exclusive, why no images can be made from its
    own statistics (None where nothing stands in the way), whether they can be made from its patches, whether a record
    is beside it, whether it is quantized, and the channels of its images.
    """

    not_exclusive: str | None
    no_statistics: str | None
    patches: bool
    with_record: bool
    quantized: bool
    channels: int


# A need answers with whether the verb can serve the model, and with what is missing.
_Need = Callable[[_Facts], tuple[bool, str]]


def _classes(facts: _Facts) -> tuple[bool, str]:
    return facts.not_exclusive is None, facts.not_exclusive or ""


def _float_weights(facts: _Facts) -> tuple[bool, str]:
    return not facts.quantized, "it is quantized already" if facts.quantized else ""


def _statistics(facts: _Facts) -> tuple[bool, str]:
    return facts.no_statistics is None, facts.no_statistics or ""


def _pictures(facts: _Facts) -> tuple[bool, str]:
    fits = facts.channels in (1, 3)
    return fits, "" if fits else f"its images have {facts.channels} channels, and PNG files 1 or 3"


def _images(instead: str, *, optional: bool, by_patches: bool = True) -> _Need:
    """Images that can be made from the model and its record, or else what comes by the options `instead`; where these
    are `optional`, the verb has others to do without images of its own. With `by_patches` the verb falls back on what
    patches tell.
    """

    def need(facts: _Facts) -> tuple[bool, str]:
        if facts.with_record or facts.no_statistics is None:
            return True, ""
        if by_patches and facts.patches:
            return True, "with images by patch similarity (--recipe psaq-vit), untested on trained weights"
        return optional, f"needs {instead}, as {facts.no_statistics}"

    return need


# Every verb that takes a model, but `inspect` itself; tests/verbs/test_inspect.py compares with their signatures.
NEEDS: Mapping[str, Sequence[_Need]] = {
    "invert": [_classes, _images("--records", optional=False)],
    "distill": [_classes, _images("--data or --records", optional=True)],
    "merge": [_classes, _images("--data", optional=True, by_patches=False)],
    "quantize": [_classes, _float_weights, _images("--data or --records", optional=True)],
    "prune": [_classes, _float_weights, _images("--data or --records", optional=True)],
    "extend": [_classes, _float_weights, _images("--old-images or --records", optional=True)],
    "record": [_classes],
    "evaluate": [_classes],
    "compare": [_classes],
    "export": [],
    "bench_step": [_classes, _statistics],
    "bench_train": [_classes, _pictures],
    "bench_generator": [_classes, _statistics],
}


def abilities(classifier: Classifier, *, with_record: bool = False) -> list[Ability]:
    """What each verb can do with a model, and with the record beside it if there is one."""
    unfit = why_not_exclusive(classifier)
    facts = _Facts(
        not_exclusive=unfit.why if unfit else None,
        no_statistics=why_no_statistics(classifier.network),
        patches=knows_patches_alone(classifier),
        with_record=with_record,
        quantized=is_quantized(classifier.network),
        channels=classifier.card.input_size[0],
    )
    return [_ability(verb, [need(facts) for need in needs]) for verb, needs in NEEDS.items()]


def _ability(verb: str, judged: Sequence[tuple[bool, str]]) -> Ability:
    """The first need with something to say decides."""
    possible, why = next((each for each in judged if each[1]), (True, ""))
    return Ability(verb, possible, why)
