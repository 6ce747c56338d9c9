"""The latency of layers of other widths in onnxruntime, from a table that is measured one layer at a time.

    times = layer_times(classifier)
    times["layer1.0.conv1"](16, 9)          # milliseconds of 64 images on one thread, 16 channels in and 9 out

Each distinct layer is timed alone, with random weights, at a few widths; between these widths, times are interpolated.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.resizing import is_channelwise, widths_of

Time = Callable[[float, float], float]
FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
IMAGES, PIXELS = 64, 2**18  # Images that a time is stated for, and the most positions of a timed batch.
ROUNDS, RUNS = 5, 2
OPSET, IR_VERSION = 17, 9  # Old enough for every onnxruntime that is supported.


class _Kind(NamedTuple):
    """All properties that the time of a layer depends on besides its widths. A linear layer counts as a convolution
    with kernel 1. `pads` holds the padding before every axis, then the padding behind every axis, as in ONNX. `size` is
    the size of the input along every axis.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channelwise: bool
    size: tuple[int, ...]


def layer_times(classifier: Classifier) -> dict[str, Time]:
    """For every convolution and linear layer the milliseconds of 64 images, summed over its runs in a pass, as a
    function of its channels in and out. Transposed convolutions, other layers and operations between layers are not
    timed and count nothing.
    """
    widths = widths_of(classifier.network)
    kinds = _kinds(classifier)
    wanted = {(kind, *widths[name]) for name, runs in kinds.items() for kind in runs}
    tables = {key: _table(*key) for key in sorted(wanted)}
    return {name: _together([tables[kind, *widths[name]] for kind in runs]) for name, runs in kinds.items()}


def _together(runs: Sequence[Time]) -> Time:
    return lambda c_in, c_out: sum(run(c_in, c_out) for run in runs)


def _kinds(classifier: Classifier) -> dict[str, list[_Kind]]:
    """The kinds of the runs of every layer in a pass, by the layer's name."""
    kinds: dict[str, list[_Kind]] = {}
    layers: dict[str, Any] = {
        name: layer
        for name, layer in classifier.network.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and not layer.transposed)
    }

    def note(name: str, features: Tensor) -> None:
        layer = layers[name]
        runs = kinds.setdefault(name, [])
        if isinstance(layer, nn.Linear):
            runs.append(_Kind((1,), (1,), (0, 0), (1,), 1, False, (features[..., 0].numel(),)))
            return
        ends = layer._reversed_padding_repeated_twice  # The last axis first, each axis as before, behind.
        pads = (*ends[-2::-2], *ends[::-2])
        sizes = (layer.kernel_size, layer.stride, pads, layer.dilation)
        groups = 1 if is_channelwise(layer) else layer.groups
        runs.append(_Kind(*sizes, groups, is_channelwise(layer), tuple(features.shape[2:])))

    with hooked_inputs(classifier.network, layers, note):
        pass_once(classifier)
    return kinds


def _table(kind: _Kind, c_in: int, c_out: int) -> Time:
    """Measure a layer's milliseconds at a few widths up to `c_in` and `c_out`; the result interpolates linearly."""
    ins, outs = _points(c_in, kind.groups), [1] if kind.channelwise else _points(c_out, kind.groups)
    sessions = [[_session(kind, i, i if kind.channelwise else o) for o in outs] for i in ins]
    times = np.full((len(ins), len(outs)), np.inf)
    for _ in range(ROUNDS):  # All sessions in each round, so that a busy machine slows all of them.
        for row, of_row in enumerate(sessions):
            for column, run in enumerate(of_row):
                times[row, column] = min(times[row, column], run())
    # More channels take no less time, so a measured decrease is noise and is removed.
    times = np.maximum.accumulate(np.maximum.accumulate(times, 0), 1)

    def interpolated(new_in: float, new_out: float) -> float:
        of_outs = [float(np.interp(new_in, ins, column)) for column in times.T]
        return of_outs[0] if kind.channelwise else float(np.interp(new_out, outs, of_outs))

    return interpolated


def _points(channels: int, groups: int) -> list[int]:
    """The numbers of channels that are timed: `FRACTIONS` of `channels`, rounded to multiples of `groups`."""
    each = channels // groups
    return sorted({groups * max(1, round(fraction * each)) for fraction in FRACTIONS})


def _session(kind: _Kind, c_in: int, c_out: int) -> Callable[[], float]:
    """A function that measures the milliseconds of `IMAGES` images in one convolution of these widths."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    batch = max(1, min(IMAGES, PIXELS // max(1, int(np.prod(kind.size)))))
    groups = c_in if kind.channelwise else kind.groups
    random = np.random.default_rng(0)
    weight = random.standard_normal((c_out, c_in // groups, *kind.kernel)).astype(np.float32)
    images: NDArray[np.float32] = random.standard_normal((batch, c_in, *kind.size)).astype(np.float32)
    node = helper.make_node(
        "Conv",
        ["images", "weight"],
        ["features"],
        strides=kind.stride,
        pads=kind.pads,
        dilations=kind.dilation,
        group=groups,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, images.shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    file = io.BytesIO()
    onnx.save(model, file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"images": images})

    def milliseconds() -> float:
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            session.run(None, {"images": images})
            seconds.append(time.perf_counter() - started)
        return 1e3 * min(seconds) * IMAGES / batch

    return milliseconds
