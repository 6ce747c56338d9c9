"""The least-squares refit of a pruned network, which takes seconds: layer by layer, from the first to the last, the
pruned network is fitted to the unpruned network on images.

A layer that lost inputs gets the weights that best reproduce its former outputs from its present inputs, by least
squares: W' = W·E[x·x'ᵀ]·E[x'·x'ᵀ]⁻¹, where x is its input in the unpruned network and x' its input in the pruned
network (as He et al. 2017, section 3.1; all taps of a kernel share one matrix, and the ridge pulls W' towards the
present weights). A BatchNorm gets statistics with which every channel behind it has its former mean and variance. So it
takes over only the change between both networks, and the images need not have the statistics of the training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.data.synthetic_set import as_float
from dfcompress.machine.process import exact_fp32
from dfcompress.models.channel_statistics import channel_moments, images_for_statistics, renormalise
from dfcompress.models.classifier import Classifier, count_runs, evaluating
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.resizing import widths_of
from dfcompress.pruning.groups import ChannelGroup, Clusters, averaged, weight_blocks
from dfcompress.randomness import generator

ROWS = 8192  # The most positions of a layer's input that the layer is fitted on: four for each of 2,048 channels.
# The ridge as a share of the mean second moment. Agreement with the unpruned network on 500 training images, ResNet-20
# at 0.63 of its operations, with ridges 0.1, 0.01, 0.001 and 0.0001: by taylor 74.8, 73.4, 73.2 and 73.2 %; by bn-scale
# 81.8, 81.8, 81.6 and 81.6 %.
RIDGE = 1e-3
STILL = 1e-12  # The least mean second moment for the ridge, for inputs that are all zero.


def images_to_repair_on(images: Tensor) -> Tensor:
    """A subset of the stored `images`, evenly spaced, that suffices for statistics."""
    return images[:: -(-len(images) // images_for_statistics(images[0].shape, len(images)))]


class _Seen(NamedTuple):
    """The input of a layer in the unpruned network: `rows` of it, or the `moments` (mean, variance) of each channel."""

    rows: Tensor | None = None
    moments: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def refit(
    pruned: Classifier,
    classifier: Classifier,
    groups: Sequence[ChannelGroup],
    clusters: Mapping[str, Clusters],
    images: Tensor,
) -> None:
    """Refit the weights and the BatchNorm statistics of the network `pruned` in place. It was cut from `classifier` by
    `groups` and `clusters`; `images` are stored images.

    One pass of each network suffices, because the input of every layer of the pruned network is already repaired when
    the layer runs. Layers that run several times, depthwise layers, layers with more than `ROWS` channels, and layers
    that take the channels of different groups as different numbers of pixels keep their weights.
    """
    lengths: dict[str, set[int]] = {}
    for group in groups:
        if group.name in clusters:
            for member in group.consumers:
                layer = classifier.network.get_submodule(member.layer)
                lengths.setdefault(member.layer, set()).add(_pixels(layer, member.places))
    runs = count_runs(classifier, [name for name, _ in classifier.network.named_modules() if name])
    widths = widths_of(classifier.network)
    consumers = {
        name: length
        for name, (length, *others) in lengths.items()
        if not others and runs[name] == 1 and widths[name][0] <= ROWS * length
    }
    norms = [
        name
        for name, layer in pruned.network.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and runs[name] == 1
    ]
    seen: dict[str, _Seen] = {}

    def rows_of(name: str, features: Tensor) -> Tensor:
        rows = _rows(classifier.network.get_submodule(name), features, consumers[name])
        random = generator("refit", [*consumers].index(name))
        return rows[torch.randperm(len(rows), generator=random)[:ROWS].to(rows.device)]

    def note(name: str, features: Tensor) -> None:
        if name in consumers:
            seen[name] = _Seen(rows=rows_of(name, features))
        else:
            seen[name] = _Seen(moments=channel_moments(classifier.network.get_submodule(name), features))

    def mend(name: str, features: Tensor) -> None:
        layer: Any = pruned.network.get_submodule(name)
        before = seen.pop(name)
        if before.moments is not None:
            expected = [averaged(name, each, "both", groups, clusters) for each in before.moments]
            renormalise(layer, features, *expected)
        elif before.rows is not None:
            old = classifier.network.get_submodule(name)
            weight = averaged(name, torch.cat(weight_blocks(old)), "out", groups, clusters)
            _fit(layer, weight, before.rows, rows_of(name, features), consumers[name])

    shown = as_float(images).to(classifier.mean.device)
    for each, hook in ((classifier, note), (pruned, mend)):
        with evaluating(each), exact_fp32(), hooked_inputs(each.network, [*norms, *consumers], hook):
            each(shown)


def _pixels(layer: nn.Module, places: Tensor) -> int:
    """The number of pixels of each channel that a linear layer takes, if the pixels of a channel are adjacent in its
    input; else 1.
    """
    count = places.shape[1]
    beside = not (places[:, 0] % count).any() and torch.equal(places, places[:, :1] + torch.arange(count))
    return count if isinstance(layer, nn.Linear) and beside else 1


def _rows(layer: nn.Module, features: Tensor, length: int) -> Tensor:
    """A layer's input as a matrix `(rows, channels)` with a row for each position. For a linear layer that takes
    `length` pixels of each channel, every pixel is a position.
    """
    if isinstance(layer, nn.Linear):
        rows: Tensor = features.flatten(0, -2).unflatten(-1, (-1, length)).movedim(-1, 1).flatten(0, 1)
        return rows
    return features.movedim(1, -1).flatten(0, -2)


def _fit(layer: Any, weight: Tensor, before: Tensor, after: Tensor, length: int) -> None:
    """Give a layer the weights that best reproduce from `after` `(rows, channels now)` the outputs that `weight`
    `(outputs, former channels of a group, ...)` computes from `before` `(rows, former channels)`. A grouped convolution
    is fitted group by group.
    """
    blocks = weight_blocks(layer)
    parts = zip(
        blocks, *(each.chunk(len(blocks), axis) for each, axis in ((weight, 0), (before, 1), (after, 1))), strict=True
    )
    shifts = []
    for current, old_weight, saw, sees in parts:
        x_mean, y_mean = saw.double().mean(0), sees.double().mean(0)
        centred = layer.bias is not None
        x, y = saw.double() - centred * x_mean, sees.double() - centred * y_mean
        joint, across = y.T @ y / len(y), x.T @ y / len(y)
        now, old = (each.double().unflatten(1, (-1, length)).flatten(2) for each in (current, old_weight))
        missing = torch.einsum("oct,cd->dot", old, across) - torch.einsum("oct,cd->dot", now, joint)
        ridge = RIDGE * joint.diagonal().mean().clamp(min=STILL)
        joint.diagonal().add_(ridge)
        fitted = now + torch.linalg.solve(joint, missing.flatten(1)).unflatten(1, missing.shape[1:]).transpose(0, 1)
        current.copy_(fitted.reshape(current.shape))
        shifts.append(old.sum(2) @ x_mean - fitted.sum(2) @ y_mean)
    if layer.bias is not None:
        layer.bias += torch.cat(shifts).to(layer.bias.dtype)
