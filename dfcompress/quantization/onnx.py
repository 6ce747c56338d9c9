"""A classifier as an ONNX file whose weights are integers of their true width.

Of a quantized layer the file holds INT2, INT4 or INT8 integers behind a DequantizeLinear with one scale per output
channel; of an asymmetric one UINT2, UINT4 or UINT8, with one zero point per output channel too. Its input passes
QuantizeLinear and DequantizeLinear. The exporter sees both as operations of our own and is told what they become; only
the integers' width is narrowed afterwards, because torch has no tensors of 2 and 4 bits.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcompress.errors import DfcompressError, first_line
from dfcompress.models.bn_folding import fold_batchnorms
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import (
    InputGrid,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    TensorGrid,
    per_channel,
    quantized_layers,
    tensor_grids,
)
from dfcompress.run import write_atomically

INPUT, OUTPUT = "images", "logits"
# What the file says of itself, as entries of its metadata; an architecture's name may be a path, and stays out.
TOLD = ("classes", "class_names", "input_size", "mean", "std")
TAKES = "images (N, C, H, W) in [0, 1]; the mean and the deviation of the card are taken off inside"
INTEGERS, ZERO_POINT = "integers", "zero_point"
# ONNX has these widths; others are kept in the next one.
CONTAINERS = (2, 4, 8)
OPSETS = {2: 25, 4: 21, 8: 21}  # The first with integers of that width.


def write_onnx(classifier: Classifier, path: Path) -> None:
    """Write `path`: images `(N, C, H, W)` in [0, 1] → logits `(N, classes)`, for any N, BatchNorm folded.

    `classifier` is in float, or quantized and frozen; class names, size, mean and deviation are in the file's metadata.
    The opset is 21, or 25 where something has 2 bits.
    """
    import onnx_ir

    twin = copy.deepcopy(classifier).to("cpu").frozen()
    fold_batchnorms(twin)
    widths = _make_exportable(twin.network)
    inputs = [
        _input_container(layer.input_bits) for layer in quantized_layers(twin.network).values() if layer.input_grid
    ]
    opset = max(OPSETS[width] for width in (8, *widths.values(), *inputs))
    images = torch.zeros(2, *classifier.card.input_size)
    try:
        program = torch.onnx.export(
            twin,
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=_translations(),
            verbose=False,
        )
    except Exception as error:  # The exporter wraps whatever a network's own code raises.
        raise DfcompressError(
            f"{classifier.name} cannot be exported: {first_line(error)}.", "Use it without ONNX."
        ) from error
    assert program is not None
    _separate_zero_points(program.model)
    _narrow(program.model, widths)
    if min(inputs, default=8) < 8:
        _replace_clips(program.model)
    if tensor_grids(twin.network):
        _replace_means(program.model)
    _strip(program.model)
    card = classifier.card.to_json()
    program.model.metadata_props.update({name: json.dumps(card[name]) for name in TOLD} | {"input": TAKES})
    with write_atomically(path) as temporary:
        onnx_ir.save(program.model, temporary)


@torch.library.custom_op("dfcompress::weight_of", mutates_args=())
def _weight_of(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    multiples = integers if zero_point is None else integers.int() - per_channel(zero_point, integers)
    return multiples * per_channel(scale, integers)


@torch.library.custom_op("dfcompress::on_grid", mutates_args=())
def _on_grid(activations: Tensor, scale: float, zero_point: int, signed: bool, bits: int) -> Tensor:
    return InputGrid(bits=bits, scale=scale, zero_point=zero_point, signed=signed).quantized(activations)


@_weight_of.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return torch.empty(integers.shape, dtype=torch.float32)


@_on_grid.register_fake
def _(activations: Tensor, scale: float, zero_point: int, signed: bool, bits: int) -> Tensor:
    return torch.empty_like(activations)


class _Exported(QuantizedLayer):
    """A frozen layer that computes by the operations the exporter is told about."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias_integers: Tensor | None
    bias_scale_of_kernel: Tensor | None

    def quantized_input(self, activations: Tensor) -> Tensor:
        """The input on its grid."""
        return _quantized(activations, self.input_grid)

    def quantized_weight(self) -> Tensor:
        """What the integers stand for."""
        weight: Tensor = _weight_of(self.integers, self.scale, self.zero_point)
        return weight

    def exported_bias(self) -> Tensor | None:
        """The bias, as integers of 32 bits where the kernel adds it to their sums."""
        bias: Tensor | None = dict(self.named_parameters(recurse=False)).get("bias")
        if self.bias_integers is not None and self.bias_scale_of_kernel is not None:
            bias = _weight_of(self.bias_integers, self.bias_scale_of_kernel, None)
        return bias


class _ExportedGrid(TensorGrid):
    """A tensor put on its grid by the operation the exporter is told about."""

    def forward(self, activations: Tensor) -> Tensor:
        """The tensor on its grid."""
        return _quantized(activations, self.input_grid)


def _quantized(activations: Tensor, grid: InputGrid | None) -> Tensor:
    if grid is None:
        return activations
    quantized: Tensor = _on_grid(activations, grid.scale, grid.zero_point, grid.signed, grid.bits)
    return quantized


class _ExportedConv2d(_Exported, QuantizedConv2d):
    """A convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """Features of `input`."""
        features: Tensor = self._conv_forward(
            self.quantized_input(input), self.quantized_weight(), self.exported_bias()
        )
        return features


class _ExportedLinear(_Exported, QuantizedLinear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Features of `input`."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.exported_bias())


def _make_exportable(network: nn.Module) -> dict[str, int]:
    """Let the quantized layers compute by our operations; widths of their tensors of integers, by name."""
    widths: dict[str, int] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = quantized_layers(network)
    fed = {name for tensor in tensor_grids(network).values() for name in tensor.feeds}
    for tensor in tensor_grids(network).values():
        tensor.__class__ = _ExportedGrid
    for path, layer in layers.items():
        integers, grid = layer.integer_weight()
        layer.register_buffer(INTEGERS, integers)
        layer.register_buffer("scale", grid.scale)
        # Onnxruntime 1.31 has no kernel for a linear layer whose weights do not state that their zero points are 0, and
        # with session.x64quantprecision=1 states one for all channels by itself, and then refuses it.
        states_zero = bool(fed) or not grid.symmetric
        layer.register_buffer(ZERO_POINT, grid.zero_point.to(integers.dtype) if states_zero else None)
        in_integers = path in fed and layer.bias is not None
        layer.register_buffer("bias_integers", layer.integer_bias().int() if in_integers else None)
        layer.register_buffer("bias_scale_of_kernel", layer.bias_scale().float() if in_integers else None)
        layer.input_grid = None if path in fed else layer.input_grid
        layer.__class__ = _ExportedConv2d if isinstance(layer, QuantizedConv2d) else _ExportedLinear
        for tensor_name in [INTEGERS, ZERO_POINT] if states_zero else [INTEGERS]:
            # The exporter names a layer that is registered several times by any of its names.
            widths |= {f"network.{name}.{tensor_name}": _container(grid.bits) for name in names[layer]}
    return widths


def _container(bits: int) -> int:
    return next(width for width in CONTAINERS if width >= bits)


def _input_container(bits: int) -> int:
    """Onnxruntime cannot clip what it then quantizes to 4 bits."""
    return bits if bits in CONTAINERS else CONTAINERS[-1]


def _translations() -> dict[Any, Any]:
    """What our operations become."""
    import onnx
    from onnxscript import opset21

    op: Any = opset21  # Its types know nothing of 2-bit integers.

    def weight_of(integers: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(integers, scale, *([] if zero_point is None else [zero_point]), axis=0)

    def on_grid(activations: Any, scale: float, zero_point: int, signed: bool, bits: int) -> Any:
        width = _input_container(bits)
        kind = getattr(onnx.TensorProto, f"{'INT' if signed else 'UINT'}{width}")
        if width > bits:  # The container has more values than the grid.
            low, high = InputGrid(bits=bits, scale=scale, zero_point=zero_point, signed=signed).ends()
            activations = op.Clip(activations, op.Constant(value_float=low), op.Constant(value_float=high))
        step = op.Constant(value_float=scale)
        zero = op.Constant(value=onnx.helper.make_tensor("zero_point", kind, [], [zero_point]))
        return op.DequantizeLinear(op.QuantizeLinear(activations, step, zero), step, zero)

    operations = torch.ops.dfcompress
    return {operations.weight_of.default: weight_of, operations.on_grid.default: on_grid}


def _separate_zero_points(model: Any) -> None:
    """Give every weight zero points of its own, which the exporter stores once where they are equal.

    Weights of several widths would share zero points of one width. And with `session.x64quantprecision=1` onnxruntime
    1.31 makes weights and their zero points unsigned, one pair after the other, and fails at zero points seen before.
    """
    import onnx_ir

    known = model.graph.initializers
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "DequantizeLinear" and len(node.inputs) > 2]
    stored = {node: node.inputs[2] for node in nodes if node.inputs[0].name in known}
    for shared in set(stored.values()):
        known.pop(shared.name)
    for node, shared in stored.items():
        name = node.inputs[0].name.removesuffix(INTEGERS) + ZERO_POINT
        if name not in known:
            own = onnx_ir.Value(name=name, type=shared.type, shape=shared.shape, const_value=shared.const_value)
            known.add(own)
        node.replace_input_with(2, known[name])


def _narrow(model: Any, widths: dict[str, int]) -> None:
    """Store integers in as many bits as they need."""
    import ml_dtypes
    import onnx_ir

    signed = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
    unsigned = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
    for name in widths.keys() & model.graph.initializers.keys():
        stored, width = model.graph.initializers[name], widths[name]
        integers = stored.const_value.numpy()
        kinds = unsigned if integers.dtype == np.uint8 else signed
        stored.const_value = onnx_ir.tensor(integers.astype(kinds[width]), name=name)
        stored.dtype = stored.const_value.dtype


def _replace_clips(model: Any) -> None:
    """Write every Clip (ReLU6, a clamp) as Max and Min.

    Onnxruntime 1.31 merges a Clip into the QuantizeLinear behind it, also past operations between them, and fails where
    that has 2 or 4 bits; of 40 other operations tried none fails with `session.disable_quant_qdq=1`.
    """
    import onnx_ir

    for node in [each for each in model.graph if each.op_type == "Clip" and not each.domain]:
        bounded = node.inputs[0]
        for operation, bound in zip(("Max", "Min"), node.inputs[1:], strict=False):
            if bound is not None:
                limit = onnx_ir.node(operation, [bounded, bound])
                model.graph.insert_before(node, limit)
                (bounded,) = limit.outputs
                bounded.dtype, bounded.shape = node.outputs[0].dtype, node.outputs[0].shape
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], bounded, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _replace_means(model: Any) -> None:
    """Write a mean over rows and columns as GlobalAveragePool: of the two, kernels for integers know this one."""
    import onnx_ir

    for node in [each for each in model.graph if each.op_type == "ReduceMean" and not each.domain]:
        axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        keeps = node.attributes.get_int("keepdims", 1)
        rank = node.inputs[0].shape and len(node.inputs[0].shape)
        if axes is None or rank != 4 or {int(each) % rank for each in axes.numpy()} != {2, 3}:
            continue
        pooled = onnx_ir.node("GlobalAveragePool", [node.inputs[0]])
        nodes = [pooled] if keeps else [pooled, onnx_ir.node("Flatten", pooled.outputs)]
        model.graph.insert_before(node, nodes)
        (result,) = nodes[-1].outputs
        result.dtype, result.shape = node.outputs[0].dtype, node.outputs[0].shape
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _strip(model: Any) -> None:
    """Leave out what the exporter says of where and from which lines it came."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
