"""`prune`: a checkpoint in, the same network with fewer channels out.

dfcompress.prune("resnet44.pt", flops=0.5)
dfcompress.prune("resnet44.pt", filters=0.8, uniform=True, importance="magnitude")
dfcompress.prune("resnet50.pt", flops=0.6, round_to=8, rounds=3, export="onnxruntime")
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfcompress.data.pool import Augmentation
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.statistics import why_no_statistics
from dfcompress.pruning import ImportanceName, Resource
from dfcompress.pruning.budget import Costs, Pruning, require_reachable
from dfcompress.pruning.groups import find_groups
from dfcompress.settings import AUTO, with_defaults
from dfcompress.synthesis.labels import BALANCED
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.transfer_set import TransferSetSource
from dfcompress.training.distiller import Distillation
from dfcompress.training.settings import Training
from dfcompress.verbs import Repair, Target
from dfcompress.verbs._compression import Compression, Train
from dfcompress.verbs._finish import Compressed, evaluator
from dfcompress.verbs._plan import Plan, Step, planned
from dfcompress.verbs._prune_step import Prune, write_report
from dfcompress.verbs.distill import IMAGES, LARGE_IMAGES, PROBE_IMAGES, objectives_of
from dfcompress.verbs.export import require_packages

RECIPE = "adaptive-deepinversion"
IMPORTANCE: ImportanceName = "auto"
# Channels that onnxruntime computes at once, at the least: ResNet-44 at --latency 0.7 is 1.38 times faster in multiples
# of 8, 1.08 times in any numbers (AVX-512). EfficientNet-Lite0 at 0.8 of its operations, by taylor, is 1.4 times faster
# in multiples of 8 and takes twice the time in any numbers, so above 64 pixels multiples are usual.
BLOCK = 8
# A fifth of the rate and half of the steps of `distill`, whose student begins from nothing: not measured otherwise.
# BatchNorms take the batches' statistics: with frozen ones ResNet-20 at 0.4 of its operations answers 71.8 % of 1,000
# training images as before after 200 steps of 64 images, in place of 77.7 %.
DISTILLATION = Training(
    steps=3000,
    lr=0.02,
    batch_size=128,
    weight_decay=5e-4,
    augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
)
# Above 64 pixels, where an image costs a hundred times as much; not measured.
LARGE_DISTILLATION = replace(DISTILLATION, steps=1000, lr=0.01, batch_size=32)


@planned
def prune(
    checkpoint: str | Path | Classifier,
    *,
    flops: float | None = None,
    parameters: float | None = None,
    filters: float | None = None,
    latency: float | None = None,
    importance: ImportanceName = IMPORTANCE,
    uniform: bool = False,
    round_to: int | None = None,
    rounds: int = 1,
    repair: Repair = "distill",
    data: str | Path | None = None,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    second_recipe: str | None = AUTO,
    probe_images: int = PROBE_IMAGES,
    training: Training | Mapping[str, Any] | None = None,
    objectives: Mapping[str, float] | None = None,
    temperature: float = 4.0,
    export: Target | None = None,
    compute: Compute = Compute(),
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Plan[Compressed]:
    """Take channels away and repair the rest on images made from the model alone.

    One of `flops`, `parameters`, `filters` and `latency` (in onnxruntime, by a table of layers that is measured in
    this run) is the share of it that stays, in (0, 1). `importance` says which channels go first (see
    `pruning.importance.rank`), `auto` takes one of three by the answers after refitting; with `uniform` every layer
    loses the same share, and with `round_to` keeps a multiple of that many channels (`BLOCK` for `latency`, and for
    images of more than 64 pixels a side). In several `rounds` the share falls in equal ratios, each with its part of
    the training.
    `repair`: `none`; `refit` lets the layers that follow, and BatchNorms, make up for what is gone, in seconds;
    `distill` then trains the network to answer as the unpruned one does, on half of the images that were there before,
    and half that compete with it meanwhile (`adaptive-deepinversion`). `training` changes or replaces its settings
    (`DISTILLATION`); `objectives` are those of `distill`.
    `export` also writes `model.onnx` for that runtime and times it beside the unpruned network. The folder `output`
    (default: `<checkpoint>-prune`) holds the model (`model.safetensors`, `config.json` with the widths), `prune.json`
    (channels of every layer), `widths.png`, `metrics.jsonl`, `run.json` and the images that were made. `eval_data` are
    real images that only report.
    Raises `BadInput` where the network cannot be traced, or the share not be reached.
    """
    _check(repair, training, objectives)
    teacher = as_classifier(checkpoint)
    asked = _asked(
        flops,
        parameters,
        filters,
        latency,
        importance=importance,
        uniform=uniform,
        round_to=round_to,
        small=teacher.card.small,
    )
    if is_quantized(teacher.network):
        raise BadInput(f"{teacher.name} is quantized.", "Prune the model that it was made from, then quantize.")
    if export or latency:
        require_packages(export or "onnxruntime")
    found = find_groups(teacher)
    costs = Costs.of(teacher, found.groups, asked.resource)
    require_reachable(costs, found.groups, asked)
    student = Classifier(copy.deepcopy(teacher.network), teacher.card).frozen()
    tuning = None
    if repair == "distill":
        usual = DISTILLATION if teacher.card.small else LARGE_DISTILLATION
        tuning = with_defaults(usual.suiting(teacher.card.input_size), training)
        tuning = tuning if tuning.steps else None
    source = TransferSetSource(
        teacher,
        data,
        _usual_images(synthesis, teacher, second_recipe, training=tuning is not None),
        compute,
        second_recipe=second_recipe,
        probe_images=probe_images,
        student=student,
    )
    live = source if source.live else None
    if live and (tuning is None or len(source.specs) < 2):
        raise BadInput(
            "Images that compete with the pruned network are made after pruning, and there are none to prune by.",
            "Use another --recipe, for instance deepinversion" + (", or --second-recipe bns." if tuning else "."),
        )

    def taught() -> Distillation:
        """By objectives for the channels that the student has by now."""
        terms = objectives_of(student, teacher, objectives, temperature=temperature, seed=compute.seed)
        return Distillation(teacher, terms)

    if tuning:
        taught()  # So that objectives that cannot be are refused before any work.
    steps: dict[str, Step | None] = {}
    for number in range(1, rounds + 1):
        last = number == rounds
        part = replace(asked, share=asked.share ** (number / rounds))
        steps[_named("pruning", number, last)] = Prune(
            student, teacher, found.groups, costs, part, repair, number, compute
        )
        steps[_named("training", number, last)] = (
            Train(
                student,
                taught,
                replace(tuning, steps=-(-tuning.steps // rounds)),
                compute,
                repair=True,
                live=live if last else None,
                place="" if last else f"round-{number}",
            )
            if tuning
            else None
        )
    options = {
        "teacher": teacher.identity(),
        "repair": repair,
        "rounds": rounds,
        "objectives": dict(objectives) if objectives else None,
        "temperature": temperature,
        "export": export,
        "data": data,
        "probe_images": probe_images,
        "synthesis": source.origin(),
    }
    return Compression(
        verb="prune",
        student=student,
        teachers=[teacher],
        outputs=[torch.arange(teacher.card.classes)],
        sources={"": source},
        measure=evaluator(eval_data, teacher, compute.device),
        compute=compute,
        complete=partial(write_report, teacher, student, found),
        export=export,
        beside=teacher,
    ).plan(steps, options, [data, eval_data], output, resume=resume, overwrite=overwrite)


def _asked(
    flops: float | None,
    parameters: float | None,
    filters: float | None,
    latency: float | None,
    *,
    importance: ImportanceName,
    uniform: bool,
    round_to: int | None,
    small: bool,
) -> Pruning:
    shares: dict[Resource, float | None] = {
        "flops": flops,
        "parameters": parameters,
        "filters": filters,
        "latency": latency,
    }
    given = {resource: share for resource, share in shares.items() if share is not None}
    if len(given) != 1:
        found = " and ".join(f"--{each}" for each in given) or "none"
        raise BadInput(f"Give one budget that says how much stays, not {found}.", "Use for instance --flops 0.5.")
    ((resource, share),) = given.items()
    if round_to is None:
        round_to = BLOCK if resource == "latency" or not small else 1
    return Pruning(resource=resource, share=share, importance=importance, uniform=uniform, round_to=round_to)


def _check(repair: Repair, training: object, objectives: object) -> None:
    if repair != "distill" and (training or objectives):
        raise BadInput(f"--repair {repair} trains nothing.", "Leave settings and objectives of training out.")


def _named(part: str, number: int, last: bool) -> str:
    """The name of a part of a round in the plan; the last round's have no number."""
    return part if last else f"{part} {number}"


def _usual_images(synthesis: Synthesis, teacher: Classifier, second_recipe: str | None, *, training: bool) -> Synthesis:
    """Images that compete with the pruned network, unless a recipe is named, where others can stand beside them to
    prune by.
    """
    synthesis = synthesis.counted(IMAGES if teacher.card.small else LARGE_IMAGES)
    chosen = synthesis.recipe or synthesis.preset or synthesis.classes or synthesis.labels != BALANCED
    if chosen or second_recipe is None or not training or why_no_statistics(teacher.network):
        return synthesis
    return replace(synthesis, recipe=RECIPE)
