"""Groups of channels that can only be removed together, and the removal.

    found = find_groups(classifier)
    found.groups[0].members           # who gives, normalises and takes the channels of the first group
    found.refused                     # {"layer": "why its channels cannot be pruned"}
    cut(classifier, found.groups, {"layer1.0.conv1": kept})

torch-pruning's dependency graph states which channels of which layers belong together. Every group is then tested: a
network whose consumers ignore some channels must give the same logits as a network without these channels. A group that
fails the test is not pruned.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dfcompress.errors import BadInput, first_line
from dfcompress.models.classifier import Classifier, evaluating, load_tensors
from dfcompress.models.resizing import has_widths, is_channelwise, resized, widths_of
from dfcompress.randomness import generator

Side = Literal["in", "out", "both"]
# Tolerance as a share of the largest logit, in double precision: a wrong channel changes logits by more than 1e-6 of
# it, another order of summation by less than 1e-12.
SAME = 1e-8


class Member(NamedTuple):
    """A layer that takes the channels of a group as input (`in`), gives them as output (`out`), or does both channel by
    channel (`both`, a BatchNorm or a depthwise convolution).

    `places` `(units, k)` holds the indices of the layer's channels for each unit of the group; k is more than 1 where a
    linear layer takes every pixel of a channel, for example.
    """

    layer: str
    side: Side
    places: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together. Each unit has its channels in every member, and is removed from all
    members or from none.

    `name` is the first layer that gives the channels. `blocks` `(units,)` is the number of the block of grouped
    convolutions that a unit belongs to; every block must keep the same number of units.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    blocks: Tensor

    @property
    def consumers(self) -> list[Member]:
        """The layers that take the channels of the group and give other channels."""
        return [member for member in self.members if member.side == "in"]

    @property
    def producers(self) -> list[Member]:
        """The layers whose weights compute the channels of the group."""
        return [member for member in self.members if member.side == "out"]


@dataclass(frozen=True)
class Found:
    """The groups that can be pruned, and for each other layer the reason why its channels cannot be: half a sentence,
    by the layer's name.
    """

    groups: list[ChannelGroup]
    refused: dict[str, str]


Clusters = Tensor
"""Int64 `(units,)`: the number of the new channel that each unit becomes part of, -1 for a unit that goes."""


def find_groups(classifier: Classifier) -> Found:
    """Find the groups of a classifier's network whose channels can be removed; the classifier does not change.

    Raises `BadInput` where torch-pruning is missing or cannot trace the network.
    """
    traced = _traced(classifier)
    groups, refused = [], dict(traced.refused)
    for group in traced.groups:
        if why := _why_not_whole(group, classifier.network):
            refused[group.name] = why
        else:
            groups.append(group)
    for group in _not_as_traced(classifier, groups):
        groups.remove(group)
        refused[group.name] = "the network depends on its channels in a way that the trace does not show"
    return Found(groups, refused)


def _traced(classifier: Classifier) -> Found:
    """The groups and refusals that follow from torch-pruning's dependency graph, untested."""
    try:
        import torch_pruning
    except ImportError:
        raise BadInput("prune needs torch-pruning.", "Install it with: pip install 'dfcompress[prune]'.") from None
    twin = copy.deepcopy(classifier).float()
    twin.requires_grad_(True)
    images = torch.zeros(1, *classifier.card.input_size, device=classifier.mean.device)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph = _graph_of(torch_pruning.DependencyGraph, twin, images)
    names = {module: name for name, module in twin.network.named_modules()}
    groups: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    seen: set[str] = set()
    for layer in list(graph.module2node):
        name = names.get(layer)
        if name is None or not isinstance(layer, _ConvNd | nn.Linear) or name in seen:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruner = graph.get_pruner_of_module(layer)
                units = range(pruner.get_out_channels(layer))
                items = graph.get_pruning_group(layer, pruner.prune_out_channels, units).items
        except Exception as error:  # On a user's network torch-pruning may raise anything.
            refused[name] = f"torch-pruning cannot follow its channels ({first_line(error)})"
            continue
        try:
            members = _members(graph, items, names, len(units))
        except _Unprunable as error:
            refused[name] = str(error)
        else:
            seen |= {member.layer for member in members if member.side != "in"}
            groups.append(ChannelGroup(name, len(units), members, _blocks(members, twin.network, len(units))))
    return Found(groups, refused)


class _Unprunable(Exception):
    """The reason why a group cannot be pruned, in half a sentence."""


def _graph_of(make: Any, twin: Classifier, images: Tensor) -> Any:
    """The dependency graph, with auxiliary heads if the network can be traced in training mode.

    Raises `BadInput` where the network cannot be traced in evaluation mode either.
    """
    failed = ""
    for training in (True, False):
        try:
            return make().build_dependency(
                twin.network,
                example_inputs=twin.normalise(images),
                forward_fn=_in_training if training else _answered,
                output_transform=_tensors_of,
                unwrapped_parameters=[],
                customized_pruners={},
                ignored_layers=[],
                ignored_params=[],
                verbose=False,
            )
        except Exception as error:  # The network's own code or torch-pruning may raise anything.
            where = traceback.extract_tb(error.__traceback__)[-1]
            failed = f"{first_line(error)} (in {where.name} of {Path(where.filename).name})"
    raise BadInput(
        f"{twin.card.architecture} cannot be traced: {failed}.",
        "torch-pruning follows a network by its gradients, and stops there; no option of ours helps.",
    )


def _answered(network: nn.Module, images: Tensor) -> Any:
    return network(images)


def _in_training(network: nn.Module, images: Tensor) -> Any:
    """The network's output with its containers in training mode, so that auxiliary heads run, and its layers in
    evaluation mode.
    """
    for module in network.modules():
        module.training = any(True for _ in module.children()) and not is_channelwise(module)
    try:
        return network(images)
    finally:
        network.eval()


def _tensors_of(answer: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    values = list(answer.values()) if isinstance(answer, Mapping) else answer
    return [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.grad_fn is not None]


def _members(graph: Any, items: Iterable[Any], names: Mapping[nn.Module, str], units: int) -> tuple[Member, ...]:
    """The members of a group; raises `_Unprunable` where the channels of something in the group cannot be removed."""
    places: dict[tuple[str, Side], list[set[int]]] = {}
    for item in items:
        module = item.dep.target.module
        if type(module).__name__ == "_OutputOp":
            raise _Unprunable("the network answers with its channels")
        if isinstance(module, nn.Parameter):
            raise _Unprunable("its channels meet a parameter that belongs to no layer")
        if module not in names:
            continue
        name = names[module]
        if not has_widths(module):
            # A PReLU with one slope for all channels takes any number of channels.
            own = any(each.numel() > 1 for each in module.parameters(recurse=False))
            if own or isinstance(module, nn.MultiheadAttention):
                raise _Unprunable(f"its channels pass {name}, a {type(module).__name__}")
            continue
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        if is_channelwise(module):
            side = "both"
        of_units = places.setdefault((name, side), [set() for _ in range(units)])
        for unit, place in zip(item.root_idxs, item.idxs, strict=True):
            if unit is None or not 0 <= unit < units:
                raise _Unprunable("torch-pruning loses sight of its channels")
            of_units[unit].add(int(place))
    return tuple(Member(name, side, _table(of_units, name)) for (name, side), of_units in places.items())


def _table(of_units: Sequence[set[int]], name: str) -> Tensor:
    lengths = {len(each) for each in of_units}
    if len(lengths) > 1 or lengths == {0}:
        raise _Unprunable(f"{name} treats some of its channels otherwise")
    return torch.tensor([sorted(each) for each in of_units])


def _blocks(members: Iterable[Member], network: nn.Module, units: int) -> Tensor:
    """The block number of each unit `(units,)`: units in the same blocks of all grouped convolutions have the same
    number.
    """
    blocks = torch.zeros(units, dtype=torch.long)
    for name, side, places in members:
        layer = network.get_submodule(name)
        groups = getattr(layer, "groups", 1)
        if side != "both" and isinstance(layer, _ConvNd) and groups > 1:
            channels = layer.in_channels if side == "in" else layer.out_channels
            blocks = blocks * groups + places[:, 0] // (channels // groups)
    numbers: Tensor = torch.unique(blocks, return_inverse=True)[1]
    return numbers


def _why_not_whole(group: ChannelGroup, network: nn.Module) -> str | None:
    """The reason why the channels of a traced group cannot be removed, or None if there is no reason."""
    if group.units == 1:
        return "it has one channel"
    sizes = group.blocks.bincount()
    if len(sizes) * 2 > group.units or len(set(sizes.tolist())) > 1:
        several = (each.layer for each in group.members if getattr(network.get_submodule(each.layer), "groups", 1) > 1)
        return f"the groups of {next(several)} have uneven or single channels of it"
    if not group.consumers:
        return "the network answers with its channels"
    for name, side, places in group.members:
        layer = network.get_submodule(name)
        c_in, c_out = widths_of(network)[name]
        channels = c_in if side == "in" else c_out
        if int(places.max()) >= channels or len(places.unique()) != places.numel():
            return f"{name} uses its channels more than once"
        groups = getattr(layer, "groups", 1)
        if side != "both" and groups > 1 and len((places // (channels // groups)).unique()) < groups:
            return f"{name} takes them into some of its {groups} groups alone"
    return None


def _not_as_traced(classifier: Classifier, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups that fail the test: without a random half of their units, the network's logits differ from the logits
    of a network whose consumers ignore these units.
    """
    twin = copy.deepcopy(classifier).double().frozen()
    clusters = {group.name: _random_half(group, number) for number, group in enumerate(groups)}
    shape = (2, *classifier.card.input_size)
    images = torch.rand(shape, generator=generator("groups"), dtype=torch.float64).to(classifier.mean.device)

    def equal(some: Sequence[ChannelGroup]) -> bool:
        masked = copy.deepcopy(twin)
        try:
            for group in some:
                _mask(masked.network, group, clusters[group.name] < 0)
            with torch.no_grad(), evaluating(masked):
                expected = masked(images)
                cut(masked, some, clusters)
                answer = masked(images)
        except Exception:  # The forward pass is the user's code, and layers such as GroupNorm depend on channel counts.
            return False
        return bool((answer - expected).abs().max() <= SAME * expected.abs().max())

    def unequal(some: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        if not some or equal(some):
            return []
        half = len(some) // 2
        return list(some) if len(some) == 1 else [*unequal(some[:half]), *unequal(some[half:])]

    return unequal(groups)


def _random_half(group: ChannelGroup, number: int) -> Clusters:
    """Clusters that keep about half of the units of every block, chosen at random."""
    order = torch.rand(group.units, generator=generator("groups", number))
    keep = torch.zeros(group.units, dtype=torch.bool)
    for block in range(int(group.blocks.max()) + 1):
        mine = (group.blocks == block).nonzero()[:, 0]
        keep[mine[order[mine].argsort()[: (len(mine) + 1) // 2]]] = True
    return clusters_of(keep)


def clusters_of(keep: Tensor) -> Clusters:
    """The clusters in which each unit of the mask `keep` `(units,)` is one channel, and all other units are removed."""
    return torch.where(keep, keep.long().cumsum(0) - 1, -1)


@torch.no_grad()
def _mask(network: nn.Module, group: ChannelGroup, gone: Tensor) -> None:
    """Set the weights of all consumers to 0 for the units marked in `gone` `(units,)`."""
    for name, _, places in group.consumers:
        layer: Any = network.get_submodule(name)
        taken = places[gone].flatten()
        groups = getattr(layer, "groups", 1)
        for block, weight in enumerate(weight_blocks(layer)):
            size = weight.shape[1]
            mine = taken[(taken >= block * size) & (taken < (block + 1) * size)] if groups > 1 else taken
            weight[:, mine - block * size] = 0


def weight_blocks(layer: Any) -> list[Tensor]:
    """A layer's weight as one matrix `(outputs, inputs, ...)` for each of the layer's groups; all share its memory."""
    return blocks_of(layer, layer.weight)


def blocks_of(layer: Any, values: Tensor) -> list[Tensor]:
    """`values` of the shape of a layer's weight, divided as its `weight_blocks`."""
    blocks = values.chunk(getattr(layer, "groups", 1), 0)
    return [block.transpose(0, 1) for block in blocks] if getattr(layer, "transposed", False) else list(blocks)


@torch.no_grad()
def cut(classifier: Classifier, groups: Sequence[ChannelGroup], clusters: Mapping[str, Clusters]) -> None:
    """Remove channels in place: the units of every group that `clusters` names are merged into the clusters.

    A layer that gives the channels of a cluster then gives their mean, and the weights of a layer that takes them are
    summed. A unit of cluster -1 is removed. The new widths are written to the classifier's card.
    """
    network = classifier.network
    before = widths_of(network)
    layers: dict[str, dict[Side, list[tuple[Tensor, Clusters]]]] = {}
    for group in groups:
        if group.name in clusters:
            for name, side, places in group.members:
                layers.setdefault(name, {}).setdefault(side, []).append((places, clusters[group.name]))
    state: dict[str, Tensor] = {}
    widths: dict[str, tuple[int, int]] = {}
    for name, sides in layers.items():
        tensors, widths[name] = _smaller(network.get_submodule(name), before[name], sides)
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
    kept = {name: value for name, value in network.state_dict().items() if name not in state}
    wanted_grad = {name: each.requires_grad for name, each in network.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        resized(network, widths)
    load_tensors(network, kept | state)
    for name, each in network.named_parameters():
        each.requires_grad_(wanted_grad[name])
    known = dict(classifier.card.widths or {})
    changed = {name: each for name, each in widths.items() if each != before[name]}
    classifier.card = replace(classifier.card, widths=known | changed or None)


def _smaller(
    layer: nn.Module,
    before: tuple[int, int],
    sides: Mapping[Side, Sequence[tuple[Tensor, Clusters]]],
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The tensors of one layer with fewer channels, and the layer's new widths (channels in, channels out)."""
    c_in, c_out = before
    tensors = dict(layer.state_dict())
    if "both" in sides:
        target, new = _targets(sides["both"], c_out)
        per_channel = {key: value for key, value in tensors.items() if value.dim() and len(value) == c_out}
        return tensors | {key: _averaged(value, target, new) for key, value in per_channel.items()}, (new, new)
    from_in, new_in = _targets(sides.get("in", ()), c_in)
    from_out, new_out = _targets(sides.get("out", ()), c_out)
    blocks = weight_blocks(layer)
    taken = []
    for block, weight in enumerate(blocks):
        size = weight.shape[1]
        local = from_in[block * size : (block + 1) * size]
        local = torch.where(local >= 0, local - block * (new_in // len(blocks)), -1)
        taken.append(_summed(weight, local, new_in // len(blocks)))
    given = []
    size = c_out // len(blocks)
    for block, weight in enumerate(taken):
        local = from_out[block * size : (block + 1) * size]
        local = torch.where(local >= 0, local - block * (new_out // len(blocks)), -1)
        given.append(_averaged(weight, local, new_out // len(blocks)))
    if getattr(layer, "transposed", False):
        given = [weight.transpose(0, 1) for weight in given]
    tensors["weight"] = torch.cat(given).contiguous()
    if "bias" in tensors:
        tensors["bias"] = _averaged(tensors["bias"], from_out, new_out)
    return tensors, (new_in, new_out)


def averaged(
    name: str, values: Tensor, side: Side, groups: Sequence[ChannelGroup], clusters: Mapping[str, Clusters]
) -> Tensor:
    """`values` `(channels, ...)` of one side of the layer `name`, cut as `cut` cuts its channels: removed channels are
    left out, and the values of channels that became one are averaged.
    """
    parts = [
        (member.places, clusters[group.name])
        for group in groups
        if group.name in clusters
        for member in group.members
        if (member.layer, member.side) == (name, side)
    ]
    return _averaged(values, *_targets(parts, len(values)))


def _targets(parts: Iterable[tuple[Tensor, Clusters]], channels: int) -> tuple[Tensor, int]:
    """The new index of every channel of a layer `(channels,)`, -1 where the channel is removed, and the new number of
    channels. A cluster takes the place of its first channel.
    """
    leader = torch.arange(channels)
    for places, clusters in parts:
        firsts = _first_units(clusters)
        for column in places.T:
            leader[column] = torch.where(clusters >= 0, column[firsts[clusters.clamp(min=0)]], -1)
    stays = leader == torch.arange(channels)
    number = stays.long().cumsum(0) - 1
    return torch.where(leader >= 0, number[leader.clamp(min=0)], -1), int(stays.sum())


def _first_units(clusters: Clusters) -> Tensor:
    """The first unit of each cluster, in the order of the clusters' numbers."""
    return torch.stack([(clusters == each).nonzero()[0, 0] for each in range(int(clusters.max()) + 1)])


def _summed(weight: Tensor, target: Tensor, new: int) -> Tensor:
    """A weight `(outputs, inputs, ...)` whose inputs of the same target are summed: `(outputs, new, ...)`."""
    return _sums(weight.movedim(1, 0), target, new).movedim(0, 1)


def _averaged(values: Tensor, target: Tensor, new: int) -> Tensor:
    """`values` `(channels, ...)` averaged over the channels of the same target: `(new, ...)`."""
    sums = _sums(values, target, new)
    counts = target[target >= 0].bincount(minlength=new).to(sums.device, sums.dtype)
    return sums / counts.reshape(-1, *[1] * (values.dim() - 1))


def _sums(values: Tensor, target: Tensor, new: int) -> Tensor:
    """The sums `(new, ...)` of the `values` `(channels, ...)` of the same target; -1 is left out. They are computed on
    the CPU: a GPU would add up in any order.
    """
    (stays,) = (target >= 0).nonzero(as_tuple=True)
    sums = torch.zeros(new, *values.shape[1:], dtype=values.dtype)
    return sums.index_add_(0, target[stays], values.cpu()[stays]).to(values.device)
