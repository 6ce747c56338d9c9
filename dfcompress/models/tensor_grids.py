"""Grids on every tensor that integer kernels read or write: "explicit quantization", as int8 hardware requires it.

    as_kernels_compute(classifier)
    untraced = quantize_tensors(classifier, ["conv1", "fc"])     # the network becomes its graph with `TensorGrid`s

`torch.fx` traces the network. A `TensorGrid`, named after the operation, is inserted after every operation whose result
a convolution, linear layer, addition, product, concatenation or average pool reads or writes. An activation function
that clips (ReLU, ReLU6) is part of the operation before it, as in the kernels. Operations that only move values (max
pools, views, slices, concatenations) share one grid with their inputs. The network's output stays in float.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfcompress.errors import BadInput, first_line
from dfcompress.models.bn_folding import fold_batchnorms
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import TENSOR_GRIDS, UNBOUNDED, TensorGrid
from dfcompress.models.static_padding import fix_padding

# Greatest difference between the outputs of network and graph, as a share of the largest logit.
CLOSE = 1e-4
# The operation of a node: the class of the module that it calls, the function, or the name of the method.
Operation = type[nn.Module] | Any
NOTHING: set[Operation] = {nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d}
CUTTING: set[Operation] = {
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, F.relu, F.relu_, F.relu6, F.hardtanh, torch.relu, torch.relu_),
    *(torch.clamp, torch.clamp_min, torch.clamp_max, "relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_max"),
}
JOINING: set[Operation] = {torch.cat, torch.concat, torch.concatenate, torch.stack}
MOVING: set[Operation] = {
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d, F.adaptive_max_pool2d, nn.ZeroPad2d),
    *(nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, F.channel_shuffle),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk),
    *(torch.split, torch.unbind, torch.narrow, torch.channel_shuffle, operator.getitem),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind"),
    # These change no value, but without `contiguous` a later `view` fails, and without a clone a later in-place layer
    # overwrites its input.
    *("narrow", "expand", "unflatten", "contiguous", torch.clone, "clone"),
}
OF_TWO: set[Operation] = {
    *(operator.add, operator.iadd, torch.add, "add", "add_", operator.mul, operator.imul, torch.mul, "mul", "mul_"),
}
IN_PLACE: set[Operation] = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
OF_ONE: set[Operation] = {
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"),
    *(nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", nn.LeakyReLU, F.leaky_relu),
}


def as_kernels_compute(classifier: Classifier) -> None:
    """Fix the layers' padding for images of the card's size, and fold BatchNorms into the layers, in place."""
    fix_padding(classifier)
    fold_batchnorms(classifier)


def quantize_tensors(classifier: Classifier, layers: Collection[str]) -> list[str]:
    """Replace the network by its FX graph, with a `TensorGrid` on each tensor that integer kernels read or write.

    Returns the names of the modules that cannot be traced; their insides stay as they are. `layers` are the names of
    the layers that are, or will be, quantized. Tensor names do not change; modules not used in evaluation are removed.
    Raises `BadInput` if the network as a whole cannot be traced, or if its graph gives other outputs.
    """
    network = classifier.network.eval()
    images = torch.randn(1, *classifier.card.input_size, generator=torch.Generator().manual_seed(0))
    images = images.to(classifier.mean.device)
    graph, untraced = _traced(network, layers)
    modules = dict(network.named_modules())
    _leave_out_nothings(graph, modules)
    _read_what_was_written(graph, modules)
    traced = fx.GraphModule(network, graph, type(network).__name__)
    _require_same(network, traced, images)
    tensors = _float_tensors(traced, images)
    # A list, because inserting changes the graph that `places` reads.
    for places in list(_Sharing(graph, modules, tensors, layers).places()):
        _insert(traced, places, layers)
    traced.recompile()
    classifier.network = traced.eval()
    return untraced


def _traced(network: nn.Module, layers: Collection[str]) -> tuple[fx.Graph, list[str]]:
    """The network's graph, and the names of the modules that are single nodes of it because they cannot be traced."""
    untraced: list[str] = []
    _, *others = inspect.signature(network.forward).parameters.values()  # The first parameter takes the images.
    usual = {each.name: each.default for each in others if isinstance(each.default, bool | int | float | str | None)}
    while True:
        tracer = _Tracer([*layers, *untraced])
        try:
            return _without(tracer.trace(network, concrete_args=usual or None), usual), untraced
        except Exception as error:  # Foreign code may raise anything when it is traced.
            if tracer.failed is None:
                raise BadInput(
                    f"torch.fx cannot trace a {type(network).__name__}: {first_line(error)}.",
                    "Use --placement layer-inputs.",
                ) from error
            untraced.append(tracer.failed)


def _without(graph: fx.Graph, arguments: Collection[str]) -> fx.Graph:
    """The graph without the arguments that had their default values during tracing (`scale_1` for `scale`), and without
    the checks of these values, which are the only nodes that use them.
    """
    given = [node for node in graph.nodes if node.op == "placeholder"]
    doomed = [node for node in given if str(node.target).rpartition("_")[0] in arguments]
    for node in doomed:
        doomed += [user for user in node.users if user not in doomed]
    for node in reversed(doomed):
        graph.erase_node(node)
    return graph


@torch.no_grad()
def _require_same(network: nn.Module, traced: nn.Module, images: Tensor) -> None:
    """Raise `BadInput` if graph and network give different outputs, for instance because control flow uses values."""
    expected, found = network(images.clone()), traced(images.clone())
    # Both compute the same operations; a network with random weights may return NaN.
    if not torch.allclose(found, expected, rtol=0, atol=CLOSE * expected.abs().max().item(), equal_nan=True):
        raise BadInput(
            f"The graph that torch.fx makes of a {type(network).__name__} answers otherwise than that does.",
            "Use --placement layer-inputs.",
        )


class _Tracer(fx.Tracer):
    """A tracer that treats torch's own modules and the modules named `leaves` as single nodes.

    `failed` is the name of the innermost module in which tracing failed, or None.
    """

    def __init__(self, leaves: Collection[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _operation(node: fx.Node, modules: Mapping[str, nn.Module]) -> Operation:
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


def _leave_out_nothings(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Remove operations without effect in evaluation: they would separate a layer from its activation function."""
    for node in list(graph.nodes):
        if node.op.startswith("call") and _operation(node, modules) in NOTHING:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _read_what_was_written(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Let nodes after an in-place operation read its result instead of the tensor that it overwrote.

    A grid will be inserted between the two.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _is_in_place(node, modules):
            written = node.all_input_nodes[0]
            for reader in [user for user in written.users if order[user] > order[node]]:
                reader.replace_input_with(written, node)


def _is_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if not _is_call(node):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_") + "_" == name or node.target in IN_PLACE or bool(node.kwargs.get("inplace"))


def _float_tensors(traced: fx.GraphModule, images: Tensor) -> set[fx.Node]:
    """The nodes whose value is a floating-point tensor."""
    found: set[fx.Node] = set()

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                found.add(n)
            return value

    with torch.no_grad():
        Look(traced).run(images)
    return found


class _Sharing:
    """Which nodes of a graph get a grid, and which of them share one."""

    def __init__(
        self,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        tensors: Collection[fx.Node],
        layers: Collection[str],
    ) -> None:
        self.graph, self.modules, self.tensors, self.layers = graph, modules, tensors, layers
        self._first = {node: node for node in graph.nodes}
        runs: dict[str, fx.Node] = {}
        for node in graph.nodes:
            for taken in self._shared_with(node):
                self._join(node, taken)
            if self._is_layer(node):  # A layer that runs twice has one scale for its inputs.
                self._join(runs.setdefault(str(node.target), node.all_input_nodes[0]), node.all_input_nodes[0])

    def places(self) -> Iterator[dict[fx.Node, tuple[float, float] | None]]:
        """For each grid the nodes that share it, in the graph's order, with the bounds of their results.

        The bounds of a node that only moves values are None.
        """
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            groups.setdefault(self._root(node), []).append(node)
        for group in groups.values():
            readers = {user for node in group for user in node.users}
            if any(self._is_integer(node) for node in readers | set(group)) and not self._is_answer(group):
                made = [node for node in group if self._is_place(node)]
                places = {node: None if self._shared_with(node) else self._bounds(node) for node in made}
                if places:
                    yield places

    def _is_answer(self, group: list[fx.Node]) -> bool:
        """Whether no integer kernel follows these nodes, so that they lead to the network's output alone."""
        ahead = {user for node in group for user in node.users} - set(group)
        seen: set[fx.Node] = set()
        while ahead:
            node = ahead.pop()
            if self._is_integer(node):
                return False
            seen.add(node)
            ahead |= set(node.users) - seen
        return True

    def _is_place(self, node: fx.Node) -> bool:
        """Whether a node gets a grid: its value is a float tensor that no fused activation function alone reads."""
        return node in self.tensors and not any(self._is_cut_off(reader) for reader in node.users)

    def _is_cut_off(self, node: fx.Node) -> bool:
        """Whether a node is an activation function that is fused into the kernel of the operation before it."""
        if not _is_call(node) or self._operation(node) not in CUTTING:
            return False
        before = node.all_input_nodes[0]
        return len(before.users) == 1 and self._is_integer(before) and not self._shared_with(before)

    def _shared_with(self, node: fx.Node) -> list[fx.Node]:
        """The input nodes whose values this node only moves."""
        if not _is_call(node):
            return []
        if self._operation(node) in JOINING:
            return [each for each in node.all_input_nodes if each in self.tensors]
        moves = self._operation(node) in MOVING or _pads_with_zeros(node)
        return node.all_input_nodes[:1] if moves else []

    def _is_integer(self, node: fx.Node) -> bool:
        """Whether an integer kernel computes a node."""
        if not _is_call(node):
            return False
        operation = self._operation(node)
        if operation in CUTTING:
            return self._is_cut_off(node)
        taken = [each for each in node.all_input_nodes if each in self.tensors]
        two = operation in OF_TWO and len(taken) == 2 and node in self.tensors
        return self._is_layer(node) or two or operation in JOINING or (operation in OF_ONE and bool(taken))

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in self.layers

    def _operation(self, node: fx.Node) -> Operation:
        return _operation(node, self.modules)

    def _bounds(self, node: fx.Node) -> tuple[float, float]:
        """The bounds of a node's result: a fused activation function applied to −∞ and +∞, else `UNBOUNDED`."""
        others = [*node.args[1:], *node.kwargs.values()]
        if not self._is_cut_off(node) or any(isinstance(each, fx.Node) for each in others):
            return UNBOUNDED
        ends = torch.tensor(UNBOUNDED)
        if node.op == "call_module":
            cut = self.modules[str(node.target)](ends)
        else:
            function = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
            cut = function(ends, *node.args[1:], **node.kwargs)
        low, high = cut.tolist()
        return low, high

    def _root(self, node: fx.Node) -> fx.Node:
        first: fx.Node = self._first[node]
        if first is not node:
            first = self._first[node] = self._root(first)
        return first

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        self._first[self._root(other)] = self._root(one)


def _is_call(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function", "call_method")


def _pads_with_zeros(node: fx.Node) -> bool:
    if node.target is not F.pad:
        return False
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("mode", "constant") != "constant" or given.get("value") in (None, 0))


def _insert(
    traced: fx.GraphModule, places: Mapping[fx.Node, tuple[float, float] | None], layers: Collection[str]
) -> None:
    """Insert a `TensorGrid` after each of the nodes, which share one range."""
    group = next(iter(places)).name
    for node, bounds in places.items():
        feeds = [str(user.target) for user in node.users if user.op == "call_module" and user.target in layers]
        name = f"{TENSOR_GRIDS}.{node.name}"
        traced.add_submodule(name, TensorGrid(group=group, bounds=bounds, feeds=feeds))
        with traced.graph.inserting_after(node):
            quantized = traced.graph.call_module(name, (node,))
        node.replace_all_uses_with(quantized)
        quantized.replace_input_with(quantized, node)  # Only the grid itself still reads the node.
