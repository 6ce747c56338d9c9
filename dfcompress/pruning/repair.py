"""What pruning breaks and seconds mend: the layer that follows takes what a channel gave from those that stay, and
BatchNorms normalise by what they see now.

The weights of a consumer are W' = W·P, with P = C·M·(Mᵀ·C·M)⁻¹ the least-squares prediction of all channels from the
new ones: C are the second moments of the channels on made images, M says which new channel is the mean of which old
ones (as He et al. 2017 refit weights, section 3.1, but of all layers at once, on the unpruned network's features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.data.synthetic_set import as_float
from dfcompress.device import exact_fp32
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.hooks import hooked_inputs
from dfcompress.pruning.groups import ChannelGroup, Clusters, Member, averaged

PIXELS = 2**20  # Of all images that are seen at once, but never fewer than 64: as `bias_correction` takes.
FEWEST = 64
RIDGE = 1e-4  # Of the mean second moment: channels that are always 0 have none.


def images_to_repair_on(images: Tensor) -> Tensor:
    """Some of the stored images, evenly spread: enough for stable statistics, few enough to be seen at once."""
    wanted = max(FEWEST, PIXELS // images[0, 0].numel())
    return images[:: -(-len(images) // wanted)]


@torch.no_grad()
def absorption(
    classifier: Classifier, groups: Sequence[ChannelGroup], clusters: Mapping[str, Clusters], images: Tensor
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """What `cut` takes as `absorbed`: for every consumer of a pruned group the matrix P `(units, clusters)` and the
    mean that P leaves `(units,)`, on stored images. Grouped convolutions absorb nothing.

    A layer with a bias is fitted about the means, and its bias takes what is left on average; of one without, the
    means are part of what is fitted.
    """
    network = classifier.network
    pruned = [group for group in groups if group.name in clusters and int(clusters[group.name].max()) + 1 < group.units]
    consumers = {
        (group.name, member.layer): (member, clusters[group.name])
        for group in pruned
        for member in group.consumers
        if getattr(network.get_submodule(member.layer), "groups", 1) == 1
    }
    by_layer: dict[str, list[tuple[str, Member]]] = {}
    for (group_name, layer), (member, _) in consumers.items():
        by_layer.setdefault(layer, []).append((group_name, member))
    sums: dict[tuple[str, str], list[Tensor]] = {}

    def note(layer: str, features: Tensor) -> None:
        for group_name, member in by_layer[layer]:
            rows = _of_units(network.get_submodule(layer), features, member)
            found = [rows.T @ rows, rows.sum(0), rows.new_tensor(len(rows))]
            before = sums.get((group_name, layer))
            sums[group_name, layer] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]

    with evaluating(classifier), exact_fp32(), hooked_inputs(network, by_layer, note):
        for some in images.split(FEWEST):
            classifier(as_float(some).to(classifier.mean.device))
    absorbed = {}
    for key, (product, total, count) in sums.items():
        _, of_group = consumers[key]
        biased = getattr(network.get_submodule(key[1]), "bias", None) is not None
        absorbed[key] = _prediction(product.double() / count, total.double() / count, of_group, centred=biased)
    return absorbed


def _of_units(layer: nn.Module, features: Tensor, member: Member) -> Tensor:
    """A layer's input, one row for each place and channel of a unit: `(places, units)`."""
    by_channel = features.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
    places = member.places.to(features.device)
    return by_channel[:, places].movedim(-1, 1).flatten(0, 1)


def _prediction(moments: Tensor, means: Tensor, clusters: Clusters, *, centred: bool) -> tuple[Tensor, Tensor]:
    """P and what it leaves on average."""
    if centred:
        moments = moments - means[:, None] * means
    counts = clusters[clusters >= 0].bincount()
    merging = torch.zeros(len(clusters), len(counts), dtype=moments.dtype)
    stays = (clusters >= 0).nonzero()[:, 0]
    merging[stays, clusters[stays]] = 1.0 / counts[clusters[stays]].to(moments.dtype)
    merging = merging.to(moments.device)
    joint = merging.T @ moments @ merging
    ridge = RIDGE * moments.diagonal().mean().clamp(min=torch.finfo(moments.dtype).tiny)
    ridges = ridge * torch.eye(len(joint), dtype=joint.dtype, device=joint.device)
    # Where the fit says nothing (channels that are always 0) the sums of `cut` stand.
    usual = (merging > 0).to(moments.dtype)
    mixed = usual + torch.linalg.solve(joint + ridges, (moments @ merging - usual @ joint).T).T
    left = means - mixed @ (merging.T @ means) if centred else torch.zeros_like(means)
    return mixed, left


@torch.no_grad()
def renormalise(
    pruned: Classifier,
    classifier: Classifier,
    groups: Sequence[ChannelGroup],
    clusters: Mapping[str, Clusters],
    images: Tensor,
) -> None:
    """Give the pruned network's BatchNorms the statistics with which each channel behind them has the mean and the
    variance that it has in the unpruned `classifier`, on stored images.

    One pass: what a layer sees is mended already. The images need not have the training data's statistics, because a
    BatchNorm takes over the change between both networks alone (as `quantization/bias_correction.py` does).
    """
    norms = {
        name: layer
        for name, layer in pruned.network.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    expected: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, features: Tensor) -> None:
        expected[name] = _moments(features)

    def mend(name: str, features: Tensor) -> None:
        layer, (was_mean, was_variance) = norms[name], expected[name]
        mean, variance = _moments(features)
        was_mean, was_variance = (averaged(name, each, groups, clusters) for each in (was_mean, was_variance))
        assert layer.running_mean is not None
        assert layer.running_var is not None
        growth = torch.where(was_variance > 1e-12, variance / was_variance.clamp(min=1e-12), torch.ones_like(variance))
        deviation = layer.running_var + layer.eps
        layer.running_var.copy_((deviation * growth - layer.eps).clamp(min=0))
        layer.running_mean.copy_(mean - (was_mean - layer.running_mean) * growth.sqrt())

    shown = as_float(images).to(classifier.mean.device)
    for each, hook in ((classifier, note), (pruned, mend)):
        with evaluating(each), exact_fp32(), hooked_inputs(each.network, norms, hook):
            each(shown)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel."""
    axes = [axis for axis in range(features.dim()) if axis != 1]
    variance, mean = torch.var_mean(features, axes, correction=0)
    return mean, variance
