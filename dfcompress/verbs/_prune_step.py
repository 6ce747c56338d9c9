"""The pruning step of `prune`: remove channels of the student, refit the remaining layers, report every layer."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.distributed import world
from dfcompress.machine.device import resolve_device
from dfcompress.machine.execution import Compute
from dfcompress.machine.process import exact_fp32, threads, threads_for
from dfcompress.models.classifier import Classifier, evaluating, load_tensors, work_of
from dfcompress.models.resizing import resized, widths_of
from dfcompress.pruning import ImportanceName
from dfcompress.pruning.budget import UNITS, Costs, Pruned, Pruning, choose
from dfcompress.pruning.groups import ChannelGroup, Found, cut, find_groups
from dfcompress.pruning.importance import BATCH, rank
from dfcompress.pruning.picture import draw_widths
from dfcompress.pruning.repair import images_to_repair_on, refit
from dfcompress.run import STATE, Run, save_state, write_json
from dfcompress.synthesis.transfer_set import TransferSet, in_batches
from dfcompress.verbs import Repair
from dfcompress.verbs._plan import Outcome
from dfcompress.verbs.evaluate import placed

REPORT, PICTURE = "prune.json", "widths.png"
RANKED_BY = 512  # Maximum number of images that rank the channels: 16 gradients of 32 images.
# The importances that `auto` tries. It takes magnitude, unless another one changes the predictions clearly less after
# refitting: fold does on VGG-11-BN, taylor on EfficientNet-Lite0 at 80 % of its MACs (docs/results/prune.md).
# Agreement with the unpruned ResNet-20 at 40 % of its MACs, ranked on 512 synthetic images. Before training, on 500
# training images: magnitude 38 %, bn-scale 35 %, taylor 32 %, random 31 %, fold 17 %. After 200 steps of 64 images, on
# 1,000 training images, one seed: magnitude 77.7 %, taylor 70.1 %.
# Correct of 1,000 training images, after 500 steps of 128 images. At 63 % of the MACs: magnitude 950, taylor 924. At
# 29 %: magnitude 710, taylor 725, fold 630; before training, these three changed the predictions by about the same KL
# divergence (3.2, 2.8 and 3.2 nats).
AUTO: tuple[ImportanceName, ...] = ("magnitude", "taylor", "fold")
CLEARLY = 0.75


class _Attempt(NamedTuple):
    """A pruned student, and the report of what was removed."""

    student: Classifier
    pruned: Pruned


@dataclass(frozen=True)
class Prune:
    """Remove channels of `student`, and refit the remaining layers unless `repair` is `none`.

    `groups`, `costs`: channel groups and costs of the unpruned `teacher`. `settings`: budget and importance of this
    round. `number`: the round, counted from 1. `compute`: device and seed.
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
        """None: there is no estimate for this step."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Pruned:
        """Prune with the images of the one set, or restore the pruned student that an interrupted run saved."""
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
        world().barrier()  # One process prunes for all: with --latency each process would measure different times.
        return self._restored(torch.load(path, weights_only=True, map_location="cpu"))

    def _pruned(self, images: Tensor) -> Pruned:
        groups, costs = self.groups, self.costs
        if self.number > 1:
            groups = find_groups(self.student).groups
            costs = Costs.of(self.student, groups, self.settings.resource)
        asked = self.settings.importance
        seen = images[:: -(-len(images) // RANKED_BY)]
        names = AUTO if asked == "auto" else (asked,)
        tried = [self._attempt(groups, costs, name, seen, images_to_repair_on(images)) for name in names]
        best = tried[0] if len(tried) == 1 else _best(self.student, tried, seen)
        self.student.network, self.student.card = best.student.network, best.student.card
        return best.pruned

    def _attempt(
        self,
        groups: Sequence[ChannelGroup],
        costs: Costs,
        importance: ImportanceName,
        ranked_by: Tensor,
        refitted_on: Tensor,
    ) -> _Attempt:
        asked = replace(self.settings, importance=importance)
        before, student = self.student, copy.deepcopy(self.student)
        ranking = rank(importance, before, groups, ranked_by, seed=self.compute.seed)
        kept = choose(costs, groups, ranking, asked, whole=self.costs.whole)
        smaller = [group for group in groups if kept[group.name] < group.units]
        clusters = {group.name: ranking[group.name].clusters(group, kept[group.name]) for group in smaller}
        cut(student, groups, clusters)
        if self.repair != "none":
            refit(student, before, groups, clusters, refitted_on)
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
        pruned = Pruned(
            before=self.costs.whole,
            after=costs.kept(groups, kept),
            unit=UNITS[asked.resource],
            groups=rows,
            importance=importance,
            seconds=0.0,
        )
        return _Attempt(student, pruned)

    def _restored(self, state: Mapping[str, Any]) -> Pruned:
        widths = {name: (c_in, c_out) for name, (c_in, c_out) in state["widths"].items()}
        resized(self.student.network, widths)
        load_tensors(self.student.network, state["student"])
        self.student.card = replace(self.student.card, widths=widths or None)
        self.student.frozen()
        return Pruned(**state["pruned"])


def _best(before: Classifier, tried: Sequence[_Attempt], images: Tensor) -> _Attempt:
    """The attempt with the smallest KL divergence on stored images if it is clearly smaller than that of the first
    attempt (below `CLEARLY` times it), else the first.
    """
    divergences = [_divergence(before, each.student, images) for each in tried]
    least = min(divergences)
    best = tried[divergences.index(least) if least < CLEARLY * divergences[0] else 0]
    found = ", ".join(f"{each:.3g} by {name}" for each, name in zip(divergences, AUTO, strict=True))
    console.notice(f"Channels go by {best.pruned.importance}: KL divergence of the answers {found}.")
    return best


@torch.no_grad()
@exact_fp32()
def _divergence(before: Classifier, student: Classifier, images: Tensor) -> float:
    """Mean KL divergence, in nats, KL(before ‖ student) of the predictions for stored images."""
    total = 0.0
    with evaluating(before), evaluating(student):
        for some, _ in in_batches(images.to(before.mean.device), BATCH):
            expected, found = before(some).log_softmax(1), student(some).log_softmax(1)
            total += F.kl_div(found, expected, log_target=True, reduction="sum").item()
    return total / len(images)


def write_report(
    teacher: Classifier, student: Classifier, found: Found, run: Run, outcomes: Mapping[str, Outcome]
) -> None:
    """Write the channels of every layer before and after pruning, as JSON and as a picture."""
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
