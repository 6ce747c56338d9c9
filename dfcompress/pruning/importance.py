"""The importance of each channel, which is the order in which the channels of a group are removed.

    ranking = rank("taylor", classifier, groups, images, seed=0)
    ranking["layer1.0.conv1"].scores          # (units,), larger is worth more

Scores of `taylor`, `bn-scale` and `magnitude` can be compared between groups. `fold` (Wang et al., ICLR 2025) merges
channels of similar weights; every other importance removes the channels with the lowest scores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.data.synthetic_set import as_float
from dfcompress.machine.memory import count_growth, images_at_once
from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier
from dfcompress.pruning import ImportanceName
from dfcompress.pruning.groups import ChannelGroup, Clusters, blocks_of, clusters_of
from dfcompress.randomness import generator

BATCH = 32  # Images for each gradient, as in section 4.1 of Molchanov et al. 2019.


@dataclass(frozen=True)
class Ranking:
    """The `scores` `(units,)` of a group's units, larger for more important units. For `fold` also the `tree` of each
    block, which states the order of merges in the form of scipy's `linkage` (None for a block of one unit); `tree` is
    None where channels are removed.
    """

    scores: Tensor
    tree: Mapping[int, Any] | None = None

    def clusters(self, group: ChannelGroup, kept: int) -> Clusters:
        """The clusters that leave `kept` units, the same number in every block."""
        blocks = int(group.blocks.max()) + 1
        each = kept // blocks
        if self.tree is None:
            keep = torch.zeros(group.units, dtype=torch.bool)
            for block in range(blocks):
                mine = (group.blocks == block).nonzero()[:, 0]
                keep[mine[self.scores[mine].argsort(descending=True, stable=True)[:each]]] = True
            return clusters_of(keep)
        return self._merged(group, each)

    def _merged(self, group: ChannelGroup, each: int) -> Clusters:
        from scipy.cluster.hierarchy import cut_tree

        assert self.tree is not None
        clusters = torch.full((group.units,), -1)
        for block, tree in self.tree.items():
            mine = (group.blocks == block).nonzero()[:, 0]
            merged = torch.zeros(1) if tree is None else torch.from_numpy(cut_tree(tree, n_clusters=each)[:, 0])
            clusters[mine] = block * each + merged.long()
        return _in_order_of_first(clusters)


def _in_order_of_first(clusters: Tensor) -> Clusters:
    """The same clusters `(units,)`, numbered in the order of their first units."""
    firsts = {int(number): unit for unit, number in reversed([*enumerate(clusters.tolist())])}
    order = {number: new for new, number in enumerate(sorted(firsts, key=firsts.__getitem__))}
    return torch.tensor([order[number] for number in clusters.tolist()])


def rank(
    name: ImportanceName,
    classifier: Classifier,
    groups: Sequence[ChannelGroup],
    images: Tensor | None = None,
    *,
    seed: int = 0,
) -> dict[str, Ranking]:
    """The ranking of every group, by its name, for the importance `name`; `images` are stored images `(N, C, H, W)`,
    which `taylor` alone needs.

    `taylor`: (weight x gradient)^2, summed over all parameters that compute a channel, BatchNorms included (Molchanov
    et al. 2019, equation 8), mean over batches; the loss is the cross-entropy against the classifier's own best class.
    `bn-scale`: the squared scale of the channel's BatchNorms (Liu et al. 2017); groups without BatchNorm are ranked by
    `magnitude`. `magnitude`: the sum of squares of the weights that compute the channel (Li et al. 2017). Scores of
    `bn-scale` and `magnitude` are divided by the group's mean. `fold`: the cost of merging, the squared distance
    between weights. `random`: uniform random numbers by `seed`.
    """
    network = classifier.network
    if name == "taylor":
        assert images is not None
        worth = _worth(classifier, images)
        return {group.name: Ranking(_taylor(group, network, worth)) for group in groups}
    if name == "random":
        return {
            group.name: Ranking(torch.rand(group.units, generator=generator("pruning", seed, number)))
            for number, group in enumerate(groups)
        }
    if name == "fold":
        return {group.name: _folding(group, network) for group in groups}
    scores = {group.name: _magnitude(group, network) for group in groups}
    if name == "bn-scale":
        scores |= {group.name: found for group in groups if (found := _scales(group, network)) is not None}
    return {group: Ranking(each / each.mean().clamp(min=torch.finfo().tiny)) for group, each in scores.items()}


@exact_fp32()
def _worth(classifier: Classifier, images: Tensor) -> dict[str, Tensor]:
    """(weight x gradient)^2 of every value of every parameter, mean over batches."""
    twin = copy.deepcopy(classifier).eval().requires_grad_(True)
    parameters = dict(twin.network.named_parameters())
    worth = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    def add_gradients(shown: Tensor, share: float) -> None:
        logits = twin(shown)
        (share * F.cross_entropy(logits, logits.argmax(1))).backward()

    few = torch.zeros(4, *twin.card.input_size, device=twin.mean.device)
    taken = count_growth(lambda count: add_gradients(few[:count], 0.0))
    twin.network.zero_grad()
    fit = images_at_once(BATCH, taken, target=twin.mean.device)
    batches = images.split(BATCH)
    for stored in batches:
        for some in stored.split(fit):
            add_gradients(as_float(some).to(twin.mean.device), len(some) / len(stored))
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    worth[name] += (parameter * parameter.grad).square() / len(batches)
                    parameter.grad = None
    return worth


def _taylor(group: ChannelGroup, network: nn.Module, worth: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(group.units)
    for name, side, places in group.members:
        if side != "in":
            layer = network.get_submodule(name)
            for key in ("weight", "bias"):
                if (values := worth.get(f"{name}.{key}")) is not None:
                    of_channels = _by_output(layer, values).sum(1) if values.dim() > 1 else values
                    total += of_channels.cpu()[places].sum(1)
    return total


def _by_output(layer: Any, values: Tensor) -> Tensor:
    """`values` of the shape of a layer's weight, as a matrix with a row for each output channel."""
    return torch.cat(blocks_of(layer, values)).flatten(1)


def _rows(name: str, network: nn.Module, places: Tensor) -> Tensor:
    """The weights of the layer `name` that compute each unit's channels, `(units, values)`."""
    layer: Any = network.get_submodule(name)
    rows: Tensor = _by_output(layer, layer.weight.detach()).cpu()[places].flatten(1)
    return rows


def _magnitude(group: ChannelGroup, network: nn.Module) -> Tensor:
    total = torch.zeros(group.units)
    for name, _, places in group.producers:
        squares = _rows(name, network, places).square().sum(1)
        total += squares / squares.mean().clamp(min=torch.finfo().tiny)
    return total


def _scales(group: ChannelGroup, network: nn.Module) -> Tensor | None:
    """The summed squared scales of the group's BatchNorms `(units,)`, or None without BatchNorm."""
    total, found = torch.zeros(group.units), False
    for name, _, places in group.members:
        layer = network.get_submodule(name)
        if isinstance(layer, _BatchNorm) and layer.affine:
            total += layer.weight.detach().cpu()[places].square().sum(1)
            found = True
    return total if found else None


def _folding(group: ChannelGroup, network: nn.Module) -> Ranking:
    """The ranking by hierarchical clustering of the channels' weights with the least variance (Ward); see `_described`.

    The i-th score of a block is the cost of its i-th merge, so scores belong to merges and not to single channels.
    """
    from scipy.cluster.hierarchy import linkage

    described = _described(group, network)
    scores, trees = torch.zeros(group.units), {}
    for block in range(int(group.blocks.max()) + 1):
        mine = (group.blocks == block).nonzero()[:, 0]
        trees[block] = tree = linkage(described[mine].double().numpy(), "ward") if len(mine) > 1 else None
        if tree is not None:
            # Ward's heights are sqrt(2) times the root of the growth in variance; only their order counts.
            scores[mine[:-1]] = torch.from_numpy(tree[:, 2]).float().square()
            scores[mine[-1]] = scores[mine[-2]]  # The last unit left has no merge.
    return Ranking(scores, trees)


def _described(group: ChannelGroup, network: nn.Module) -> Tensor:
    """The parameters that compute each channel, `(units, values)`. A single layer with a single BatchNorm gives the
    weights and the shift of both as one affine map. Else the parts are the weights of each layer and the scale and
    shift of each BatchNorm, every part divided by its root mean square.
    """
    parts = [_rows(name, network, places) for name, _, places in group.producers]
    norms = [(network.get_submodule(name), places) for name, side, places in group.members if side == "both"]
    affine = [
        (layer, places[:, 0])
        for layer, places in norms
        if isinstance(layer, _BatchNorm) and layer.affine and layer.running_var is not None
    ]
    if len(parts) == len(affine) == 1:
        norm, places = affine[0]
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().cpu()[places]
        shift = (norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()).detach().cpu()
        return torch.cat([parts[0] * scale[:, None], shift[places][:, None]], 1)
    parts += [torch.stack([norm.weight, norm.bias], 1).detach().cpu()[places] for norm, places in affine]
    return torch.cat([part / part.square().mean().sqrt().clamp(min=torch.finfo().tiny) for part in parts], 1)
