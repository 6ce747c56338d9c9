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
# The smallest number of channels that onnxruntime computes at once. Speed-up over the unpruned network (AVX-512):
# ResNet-44 at --latency 0.7 is 1.38 times faster with multiples of 8 channels, 1.08 times with any numbers of channels.
# EfficientNet-Lite0 at 80 % of its MACs, by taylor, is 1.4 times faster with multiples of 8, and takes twice the time
# with any numbers; so multiples are the default for images of more than 64 pixels a side.
BLOCK = 8
# A fifth of the learning rate and half of the steps of `distill`, whose student starts from random weights; no other
# values were measured. BatchNorms use the statistics of the batch. ResNet-20 at 40 % of its MACs, after 200 steps of 64
# images: agreement with the unpruned network on 1,000 training images 77.7 %, with frozen BatchNorms 71.8 %.
DISTILLATION = Training(
    steps=3000,
    lr=0.02,
    batch_size=128,
    weight_decay=5e-4,
    augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
)
# For images of more than 64 pixels a side, which cost a hundred times as much; not measured.
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
    """Remove channels of a model, and repair the remaining network on images synthesized from the model.

    - `checkpoint`: the model in float.
    - `flops`, `parameters`, `filters`, `latency`: share of this resource to keep, in (0, 1); give exactly one.
      `latency` is the time in onnxruntime, by the times of the layers, which this run measures.
    - `importance`: measure by which the least important channels are removed first (see `pruning.importance.rank`).
      `auto` tries magnitude, taylor and fold, and compares the predictions after refitting.
    - `uniform`: remove the same share of channels from every layer.
    - `round_to`: keep a multiple of this number of channels in each pruned layer. Default: 1; `BLOCK` for `latency` and
      for images of more than 64 pixels a side.
    - `rounds`: number of rounds of pruning and repair. Each round multiplies the share by the same factor, and has an
      equal part of the training steps.
    - `repair`: `refit` adapts the following layers (least squares) and the BatchNorm statistics, in seconds; `distill`
      refits, and then trains the network to match the unpruned network; `none` does neither.
    - `data`: a synthetic set, the folder of a run with synthetic sets, or real images. Without it, images are
      synthesized as `synthesis` says. Default with `distill`: half by `second_recipe` before pruning, half by
      `adaptive-deepinversion` during training; these compete with the pruned network.
    - `probe_images`: number of images (other seed and recipe, never trained on) for a report of the agreement.
    - `training`: changes of the settings of `distill` (`DISTILLATION`), or complete settings.
    - `objectives`: weights of the distillation losses by name, as in the verb `distill`. `temperature`: number above 0
      that divides the logits in these losses.
    - `export`: runtime for which `model.onnx` is written, checked, and timed against the unpruned network; None for no
      file.
    - `eval_data`: real images on which accuracy is reported; they influence nothing else.
    - `output`: folder (default: `<checkpoint>-prune`) of the model (`model.safetensors`, `config.json` with widths),
      `prune.json` (channels of every layer), `widths.png`, `metrics.jsonl`, `run.json` and the synthesized images.
      `resume`: continue an interrupted run there. `overwrite`: replace the contents of the folder.
    - `compute`: device, precision, compilation and seed.

    Raises `BadInput` where the network cannot be traced, the share cannot be reached, or the data or an option cannot
    be used, and `DfcompressError` where the work fails.
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
        require_packages()
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
        """The distiller, with objectives for the channels that the student has at this point."""
        terms = objectives_of(student, teacher, objectives, temperature=temperature, seed=compute.seed)
        return Distillation(teacher, terms)

    if tuning:
        taught()  # Objectives that are not valid are refused before any work.
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
    """The name of a round's step in the plan; steps of the last round have no number."""
    return part if last else f"{part} {number}"


def _usual_images(synthesis: Synthesis, teacher: Classifier, second_recipe: str | None, *, training: bool) -> Synthesis:
    """The synthesis with the defaults of `prune`: images that compete with the pruned network, where no recipe is named
    and the images of a second recipe serve to rank the channels.
    """
    synthesis = synthesis.counted(IMAGES if teacher.card.small else LARGE_IMAGES)
    chosen = synthesis.recipe or synthesis.preset or synthesis.classes or synthesis.labels != BALANCED
    if chosen or second_recipe is None or not training or why_no_statistics(teacher.network):
        return synthesis
    return replace(synthesis, recipe=RECIPE)
