"""`inspect`: properties of a checkpoint, and the verbs that can use it.

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
from dfcompress.models.checkpoint import opened
from dfcompress.models.classifier import Classifier, bytes_a_pass, multiply_accumulates
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.patches import knows_patches_alone
from dfcompress.models.safe_reading import file_bytes
from dfcompress.models.saving import state_bytes, write_sidecar
from dfcompress.models.statistics import dead_channels, statistics_layers, why_no_statistics
from dfcompress.synthesis.spec import find_record
from dfcompress.verbs._verb import verb


@dataclass(frozen=True)
class Ability:
    """Whether a verb can use a model.

    `verb`: its name. `possible`: whether it can. `why`: the reason why it cannot, or a condition; may be empty.
    """

    verb: str
    possible: bool
    why: str = ""


@dataclass(frozen=True)
class Inspection:
    """Properties of a checkpoint.

    `checkpoint`: path or name. `architecture`: its name. `classes`: number of classes. `input_size`: channels, height
    and width in pixels. `parameters`: number of parameters. `macs`: multiply-accumulates for one image. `image_bytes`:
    memory for one image in a forward pass in fp32 without gradients. `batchnorm_layers`: number of BatchNorm layers
    with running statistics. `dead_channels`: number of their channels whose variance is negligible beside eps. `bytes`:
    size of the file of weights, or of the tensors without a file. `sha256`: hash of the weights. `card`: the model
    card. `answers`: which output of the network is used, for instance its logits, or the values before its softmax.
    `normalisation`: check of the card's mean and std against the first BatchNorm, None where no check is possible.
    `record`: kind of the activation record beside the checkpoint, or the reason why it cannot be used; None without a
    record. `can`: for each verb, whether it can use the model. `card_file`: the card file that was written, if any.
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
    """Report the properties of `checkpoint`, and which verbs can use it.

    `write_card`: write the model card beside the checkpoint as `<name>.card.json`. Later commands read this file, with
    your corrections.
    Raises `BadInput` where the checkpoint cannot be read, its architecture is unknown, or the network cannot process
    images of its input size.
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
    """Facts that decide which verbs can use a model.

    `not_exclusive`: the reason why its classes are not mutually exclusive, None where they are. `no_statistics`: the
    reason why no images can be synthesized from its BatchNorm statistics, None where they can. `patches`: whether
    images can be synthesized from its patches. `with_record`: whether an activation record is beside it. `quantized`:
    whether it is quantized. `channels`: channels of its images.
    """

    not_exclusive: str | None
    no_statistics: str | None
    patches: bool
    with_record: bool
    quantized: bool
    channels: int


# A need returns whether the verb can use the model, and a text of what is missing.
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
    """The need for images: synthesized from the model or its record, else given by the options `instead`.

    `optional`: the verb can use the model with these options. `by_patches`: the verb can also synthesize images from
    the similarity of patches.
    """

    def need(facts: _Facts) -> tuple[bool, str]:
        if facts.with_record or facts.no_statistics is None:
            return True, ""
        if by_patches and facts.patches:
            return True, "with images by patch similarity (--recipe psaq-vit), untested on trained weights"
        return optional, f"needs {instead}, as {facts.no_statistics}"

    return need


# Every verb that takes a model, except `inspect`; tests/verbs/test_inspect.py compares the table with the signatures.
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
    """For each verb, whether it can use a model; `with_record`: a usable activation record is beside the model."""
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
    """The ability by the first need that has a text."""
    possible, why = next((each for each in judged if each[1]), (True, ""))
    return Ability(verb, possible, why)
