"""`prune`: a checkpoint in, the same network with fewer channels out.

dfcompress.prune("resnet44.pt", flops=0.5)
dfcompress.prune("resnet44.pt", filters=0.8, uniform=True, importance="magnitude")
dfcompress.prune("resnet50.pt", flops=0.6, round_to=8, rounds=3, export="onnxruntime")
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dfcompress.data.pool import Augmentation
from dfcompress.device import Compute, resolve_device, threads, threads_for
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, load_tensors, work_of
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.resizing import resized, widths_of
from dfcompress.models.statistics import why_no_statistics
from dfcompress.pruning import ImportanceName, Resource
from dfcompress.pruning.budget import UNITS, Costs, Pruned, Pruning, choose, require_reachable
from dfcompress.pruning.groups import ChannelGroup, Found, cut, find_groups
from dfcompress.pruning.importance import BATCH, rank
from dfcompress.pruning.picture import draw_widths
from dfcompress.pruning.repair import images_to_repair_on, refit
from dfcompress.run import STATE, Run, save_state, write_json
from dfcompress.settings import AUTO, with_defaults
from dfcompress.synthesis.labels import BALANCED
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.transfer_set import TransferSet, TransferSetSource
from dfcompress.training.distiller import Distillation
from dfcompress.training.settings import Training
from dfcompress.verbs import Repair, Target
from dfcompress.verbs._compression import Compression, Train
from dfcompress.verbs._finish import Compressed, evaluator
from dfcompress.verbs._plan import Outcome, Plan, Step, planned
from dfcompress.verbs.distill import IMAGES, LARGE_IMAGES, PROBE_IMAGES, objectives_of
from dfcompress.verbs.evaluate import placed
from dfcompress.verbs.export import require_packages

REPORT, PICTURE = "prune.json", "widths.png"
RECIPE = "adaptive-deepinversion"
# ResNet-20 at 0.4 of its operations, by 512 made images: refitted it answers 500 training images as before by magnitude
# 38 %, bn-scale 35, taylor 32, random 31, fold 17; after 200 steps of 64 images 1,000 of them by magnitude 77.7, taylor
# 70.1 (one seed). After 500 steps of 128 images 1,000 training images are right, at 0.63 by magnitude 950 and taylor
# 924, at 0.29 by 710 and 725.
IMPORTANCE: ImportanceName = "magnitude"
# Channels that onnxruntime computes at once, at the least: ResNet-44 at --latency 0.7 is 1.38 times faster in multiples
# of 8, 1.08 times in any numbers (AVX-512).
BLOCK = 8
RANKED_BY = 512  # Images that importance is taken from, at most: 16 gradients of 32.
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
    `pruning.importance.rank`); with `uniform` every layer loses the same share, and with `round_to` keeps a multiple of
    that many channels (`BLOCK` for `latency`). In several `rounds` the share falls in equal ratios, each with its part
    of the training.
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
    asked = _asked(flops, parameters, filters, latency, importance=importance, uniform=uniform, round_to=round_to)
    _check(repair, rounds, training, objectives)
    teacher = as_classifier(checkpoint)
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
        "unseen": probe_images,
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
        complete=partial(_report, teacher, student, found),
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
        round_to = BLOCK if resource == "latency" else 1
    return Pruning(resource=resource, share=share, importance=importance, uniform=uniform, round_to=round_to)


def _check(repair: Repair, rounds: int, training: object, objectives: object) -> None:
    if repair not in get_args(Repair):
        raise BadInput(f"There is no --repair {repair!r}.", f"Known: {', '.join(get_args(Repair))}.")
    if rounds < 1:
        raise BadInput(f"{rounds} rounds prune nothing.", "Use 1 or more.")
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


@dataclass(frozen=True)
class Prune:
    """Take channels of the student away, and refit what is left unless `repair` is none. `groups` and `costs` are the
    teacher's.
    """

    student: Classifier
    teacher: Classifier
    groups: Sequence[ChannelGroup]
    costs: Costs
    settings: Pruning
    repair: Repair
    number: int
    compute: Compute

    def predicted(self) -> None:
        """Nothing is known of it before."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Pruned:
        """Do it by the one set, or take what an interrupted run had left."""
        path = run.folder / f"pruned-{self.number}{STATE}"
        if world().is_main and not path.exists():
            started = time.perf_counter()
            target = resolve_device(self.compute.device)
            with threads(threads_for(BATCH * work_of(self.teacher))), placed(self.student, target):
                pruned = self._pruned(sets[0].train)
            pruned = replace(pruned, seconds=round(time.perf_counter() - started, 2))
            widths = {name: list(each) for name, each in (self.student.card.widths or {}).items()}
            state = {"widths": widths, "student": self.student.network.state_dict(), "pruned": asdict(pruned)}
            save_state(path, state)
            world().barrier()
            return pruned
        world().barrier()  # One process prunes for all: with --latency each would measure times of its own.
        return self._restored(torch.load(path, weights_only=True))

    def _pruned(self, images: Tensor) -> Pruned:
        asked, before = self.settings, copy.deepcopy(self.student)
        groups, costs = self.groups, self.costs
        if self.number > 1:
            groups = find_groups(before).groups
            costs = Costs.of(before, groups, asked.resource)
        ranked_by = images[:: -(-len(images) // RANKED_BY)]
        ranking = rank(asked.importance, before, groups, ranked_by, seed=self.compute.seed)
        kept = choose(costs, groups, ranking, asked, whole=self.costs.whole)
        smaller = [group for group in groups if kept[group.name] < group.units]
        clusters = {group.name: ranking[group.name].clusters(group, kept[group.name]) for group in smaller}
        cut(self.student, groups, clusters)
        if self.repair != "none":
            refit(self.student, before, groups, clusters, images_to_repair_on(images))
        rows = [
            {
                "group": group.name,
                "layers": [member.layer for member in group.members],
                "before": group.units,
                "after": kept[group.name],
                "importance": [float(f"{score:.3g}") for score in ranking[group.name].scores.tolist()],
            }
            for group in groups
        ]
        left = costs.kept(groups, kept)
        return Pruned(before=self.costs.whole, after=left, unit=UNITS[asked.resource], groups=rows, seconds=0.0)

    def _restored(self, state: Mapping[str, Any]) -> Pruned:
        widths = {name: (c_in, c_out) for name, (c_in, c_out) in state["widths"].items()}
        resized(self.student.network, widths)
        load_tensors(self.student.network, state["student"])
        self.student.card = replace(self.student.card, widths=widths or None)
        self.student.frozen()
        return Pruned(**state["pruned"])


def _report(teacher: Classifier, student: Classifier, found: Found, run: Run, outcomes: Mapping[str, Outcome]) -> None:
    """Write what was done to every layer, as JSON and as a picture."""
    if not world().is_main:
        return
    before, after = widths_of(teacher.network), widths_of(student.network)
    rounds = [outcome for outcome in outcomes.values() if isinstance(outcome, Pruned)]
    importance = {
        layer: sum(row["importance"]) / len(row["importance"]) for row in rounds[0].groups for layer in row["layers"]
    }
    layers: list[dict[str, Any]] = [
        {
            "layer": name,
            "in": [before[name][0], after[name][0]],
            "out": [before[name][1], after[name][1]],
            "importance": importance.get(name),
        }
        for name in before
    ]
    refused = {name: f"{name} keeps its channels: {why}." for name, why in found.refused.items()}
    rounds_json = [asdict(each) for each in rounds]
    write_json(run.folder / REPORT, {"layers": layers, "refused": refused, "rounds": rounds_json})
    draw_widths(run.folder / PICTURE, {name: (before[name][1], after[name][1]) for name in before})
