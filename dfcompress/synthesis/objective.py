"""What a recipe minimises, as two functions that can be compiled: the recorder of the teacher's forward pass, and the
losses of what it recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dfcompress.machine.device import PRECISIONS
from dfcompress.machine.execution import Execution
from dfcompress.models.classifier import Classifier
from dfcompress.models.layers import last_weighted_layer
from dfcompress.models.patches import patch_blocks
from dfcompress.models.recorder import FusedRecorder
from dfcompress.models.trace import Recording, Rest, Target, traces
from dfcompress.synthesis.losses import ChannelMeans, LayerOutput, ModuleState, Want
from dfcompress.synthesis.recipe import Recipe
from dfcompress.synthesis.records.targets import TargetSampler


def recorder_of(
    recipe: Recipe, teacher: Classifier, sampler: TargetSampler | None, execution: Execution
) -> FusedRecorder:
    """The recorder of everything that the recipe's losses want, and of the layers for which the record sets targets."""
    outputs = list(sampler.layers) if sampler else []
    wanted = {want.layer for want in recipe.wants if isinstance(want, LayerOutput)}
    return FusedRecorder(
        teacher.network,
        moments=Want.MOMENTS in recipe.wants,
        outputs=outputs + sorted(wanted.difference(outputs)),
        channel_means=sorted(want.layer for want in recipe.wants if isinstance(want, ChannelMeans)),
        patches=patch_blocks(teacher) if Want.PATCHES in recipe.wants else (),
        last=last_weighted_layer(teacher) if Want.PENULTIMATE in recipe.wants else None,
        dropout=sampler is not None and sampler.fixes_dropout,
        precision=PRECISIONS[execution.precision],
    )


def losses_of(recipe: Recipe) -> Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Return a function `(seen, labels, recording, …) → (loss, values, means)`.

    `loss` `()` is the weighted sum, `values` `(batches, losses)` are unweighted. Each batch has its own statistics and,
    in `modules`, its own tensors of the losses' modules. In chunked mode, `others` are the other chunks' contributions
    to the batch means and `images` is the batch size; in `loss`, a mean over images then counts by the chunk's share
    and a loss of the whole batch in full, and `means` are this chunk's own means. Otherwise `means` is empty.
    """
    losses = list(recipe.losses)

    def values_and_sum(
        seen: Tensor,
        labels: Tensor,
        recording: Recording,
        targets: Mapping[str, Target] | None = None,
        student_logits: Tensor | None = None,
        modules: Sequence[Mapping[str, ModuleState]] | None = None,
        others: Mapping[str, Tensor] | None = None,
        images: int = 0,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        modules = modules or [{loss.name: loss.module_state(seen.device) for loss in losses}]
        copies = len(seen) // len(labels)
        rest = None if others is None else Rest(images * copies, len(labels) / images, others)
        batches = traces(
            seen, labels, recording, targets=targets, student_logits=student_logits, groups=len(modules), rest=rest
        )
        values = [
            [loss.value_with(states[loss.name], trace) for loss in losses]
            for trace, states in zip(batches, modules, strict=True)
        ]
        # A mean over a chunk's images counts by the chunk's share; a loss of the whole batch counts in full.
        weights = [loss.weight * (rest.share if rest and not loss.of_batch else 1.0) for loss in losses]
        weighted = [weight * value for row in values for weight, value in zip(weights, row, strict=True)]
        detached = torch.stack([torch.stack(row) for row in values]).detach()
        return torch.stack(weighted).sum(), detached, rest.own if rest else {}

    return values_and_sum
