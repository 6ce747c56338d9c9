"""Export of a classifier as an ONNX file whose weights are integers of their true width.

For a quantized layer the file holds INT2, INT4 or INT8 integers, which a DequantizeLinear with one scale per output
channel converts. A layer with an asymmetric weight grid has UINT2, UINT4 or UINT8 integers, and one zero point per
output channel too. The layer's input passes QuantizeLinear and DequantizeLinear. The exporter sees both conversions as
custom operations with translations to ONNX; the integers are narrowed afterwards, because torch has no tensors of 2 and
4 bits.
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
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    TensorGrid,
    quantized_layers,
    tensor_grids,
)
from dfcompress.models.grids import InputGrid, per_channel
from dfcompress.run import write_atomically

INPUT, OUTPUT = "images", "logits"
# The fields of the card that the file's metadata holds. The architecture is left out, because its name may be a path.
TOLD = ("classes", "class_names", "input_size", "mean", "std")
TAKES = "images (N, C, H, W) in [0, 1]; the mean and the deviation of the card are taken off inside"
INTEGERS, ZERO_POINT = "integers", "zero_point"
# The widths of integers in ONNX; integers of other bits are stored in the next larger width.
CONTAINERS = (2, 4, 8)
LARGEST, NO_ONNX = 2**31, "Use the model without ONNX."  # Bytes of a protobuf message.
OPSETS = {2: 25, 4: 21, 8: 21}  # By width; opset 21 is the first with integers of 4 bits, opset 25 with 2 bits.


def write_onnx(classifier: Classifier, path: Path) -> None:
    """Write the ONNX file `path`, which maps images `(N, C, H, W)` in [0, 1] to logits `(N, classes)` for any N.

    `classifier` is in float, or quantized and frozen; BatchNorms are folded. The file's metadata holds the classes and
    their names, the input size, and the mean and standard deviation of the card. The opset is 21, or 25 if weights or
    inputs have 2 bits. Raises `DfcompressError` where the network cannot be exported, and where its tensors take more
    than `LARGEST` bytes.
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
    except Exception as error:  # The exporter wraps whatever the network's code raises.
        raise DfcompressError(f"{classifier.name} cannot be exported: {first_line(error)}.", NO_ONNX) from error
    assert program is not None
    _separate_zero_points(program.model)
    _narrow(program.model, widths)
    if min(inputs, default=8) < 8:
        _replace_clips(program.model)
    if tensor_grids(twin.network):
        _replace_means(program.model)
    _strip(program.model)
    tensors = [value.const_value for value in program.model.graph.initializers.values()]
    if (size := sum(tensor.nbytes for tensor in tensors if tensor is not None)) >= LARGEST:
        raise DfcompressError(f"{classifier.name} takes {size:,} bytes, and an ONNX file can hold 2 GiB.", NO_ONNX)
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
    """A frozen layer that computes by the custom operations that `_translations` translates."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias_integers: Tensor | None
    bias_scale_of_kernel: Tensor | None

    def quantized_input(self, activations: Tensor) -> Tensor:
        """The layer's input, quantized to its grid."""
        return _quantized(activations, self.input_grid)

    def quantized_weight(self) -> Tensor:
        """The weight that the integers represent."""
        weight: Tensor = _weight_of(self.integers, self.scale, self.zero_point)
        return weight

    def exported_bias(self) -> Tensor | None:
        """The bias; where an integer kernel adds it to its sums, it is computed from integers of 32 bits."""
        bias: Tensor | None = dict(self.named_parameters(recurse=False)).get("bias")
        if self.bias_integers is not None and self.bias_scale_of_kernel is not None:
            bias = _weight_of(self.bias_integers, self.bias_scale_of_kernel, None)
        return bias


class _ExportedGrid(TensorGrid):
    """The grid of a tensor, computed by the custom operation that `_translations` translates."""

    def forward(self, activations: Tensor) -> Tensor:
        """The tensor, quantized to its grid."""
        return _quantized(activations, self.input_grid)


def _quantized(activations: Tensor, grid: InputGrid | None) -> Tensor:
    if grid is None:
        return activations
    quantized: Tensor = _on_grid(activations, grid.scale, grid.zero_point, grid.signed, grid.bits)
    return quantized


class _ExportedConv2d(_Exported, QuantizedConv2d):
    """A quantized convolution that can be exported."""

    def forward(self, input: Tensor) -> Tensor:
        """The output of the convolution."""
        features: Tensor = self._conv_forward(
            self.quantized_input(input), self.quantized_weight(), self.exported_bias()
        )
        return features


class _ExportedLinear(_Exported, QuantizedLinear):
    """A quantized linear layer that can be exported."""

    def forward(self, input: Tensor) -> Tensor:
        """The output of the linear layer."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.exported_bias())


def _make_exportable(network: nn.Module) -> dict[str, int]:
    """Let the quantized layers compute by the custom operations; the bits that each of their integer tensors is stored
    in, by its name.
    """
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
        # Zero points of 0 are stated in the file, because onnxruntime 1.31 has no integer kernel for a linear layer
        # whose weights have none. With session.x64quantprecision=1 it adds one zero point for all channels by itself,
        # and then refuses it.
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
    """The integer width for an input. It is 8 even for 3 bits, because onnxruntime cannot clip a tensor that it then
    quantizes to 4 bits.
    """
    return bits if bits in CONTAINERS else CONTAINERS[-1]


def _translations() -> dict[Any, Any]:
    """The functions that translate the custom operations to ONNX."""
    import onnx
    from onnxscript import opset21

    op: Any = opset21  # Typed as Any, because its types do not include 2-bit integers.

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
    """Give every weight a zero-point tensor of its own: the exporter stores equal zero points once for several weights.

    Otherwise weights of different widths would share zero points of one width. And with `session.x64quantprecision=1`
    onnxruntime 1.31 converts each weight and its zero points to unsigned, and fails at zero points that it has already
    converted for another weight.
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
    """Store each integer tensor named in `widths` in its number of bits."""
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
    """Write every Clip (of ReLU6 or a clamp) as Max and Min.

    Onnxruntime 1.31 merges a Clip into a following QuantizeLinear, even past operations between them, and fails if that
    QuantizeLinear has 2 or 4 bits. Of 40 other operations that were tried, none fails with
    `session.disable_quant_qdq=1`.
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
    """Write each mean over rows and columns as GlobalAveragePool: integer kernels exist for it, not for ReduceMean."""
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
    """Remove the metadata by which the exporter records the source files and lines of the network."""
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
