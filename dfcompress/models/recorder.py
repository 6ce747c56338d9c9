"""One forward pass that records the values which the losses need.

`HookRecorder` is the reference: hooks on the unchanged network, plain autograd.
`FusedRecorder` is the fast recorder: a private copy of the network, which may run in bf16 and whose BatchNorms compute
the moments of their own input with an analytic backward; it compiles with `torch.compile(fullgraph=True)`.
Both return the same `Recording`.

Moments are recorded of the inputs of layers with known statistics: BatchNorms and `KnownStatistics`.
The output of any module can be recorded by the module's name; `LOGITS` is the name of the network's output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress import console
from dfcompress.errors import BadInput, unknown
from dfcompress.models.batchnorms import EPS, eps_of
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.fake_quantizers import quantized_layers
from dfcompress.models.hooks import (
    Hook,
    hook_inputs,
    hook_outputs,
    hooked_inputs,
    hooked_outputs,
    keep_outputs,
    kept_outputs,
)
from dfcompress.models.layers import channel_axis, weighted_layers
from dfcompress.models.patches import PatchBlock
from dfcompress.models.plain_layers import after_normalising, plain_kind
from dfcompress.models.statistics import KnownStatistics, named_statistics_layers
from dfcompress.models.trace import LayerMoments, Recording

LOGITS = "logits"


@torch.no_grad()
def outputs_of_one_image(classifier: Classifier) -> dict[str, Tensor]:
    """The output `(1, ...)` of every weighted layer for one image, by layer name, in the order of the forward pass.

    Use only the shapes: in-place layers may have overwritten the values. The layer whose output is the network's output
    has the name `LOGITS`. Layers that run several times are left out, with a notice: their outputs are not of one kind.
    """
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, output: Tensor) -> None:
        seen.setdefault(name, []).append(output)  # No copy: only the shape and the memory address are used.

    with hooked_outputs(classifier.network, weighted_layers(classifier.network), note):
        logits = pass_once(classifier)
    for name in [name for name, outputs in seen.items() if len(outputs) > 1]:
        del seen[name]
        console.notice(f"Layer {name} is used several times and is left out.")
    hidden = {name: output for name, (output,) in seen.items() if output.data_ptr() != logits.data_ptr()}
    return {**hidden, LOGITS: logits}


@torch.no_grad()
def require_outputs(classifier: Classifier, layers: Iterable[str]) -> None:
    """Raise `BadInput` if the network lacks one of these layers, or if a layer's output cannot be recorded.

    A layer's output can be recorded if the layer runs once in a pass and returns one tensor `(N, ...)`.
    """
    names = _require_layers(classifier.network, layers)
    outputs: dict[str, list[object]] = {name: [] for name in names}
    with hooked_outputs(classifier.network, names, lambda name, output: outputs[name].append(output)):
        pass_once(classifier)
    for name, given in outputs.items():
        if not (len(given) == 1 and isinstance(given[0], Tensor) and given[0].dim() > 1 and len(given[0]) == 1):
            raise BadInput(
                f"The output of layer {name!r} cannot be recorded: it runs {len(given)} times in a pass of "
                f"{classifier.name}, or gives something else than one tensor (N, ...).",
                "Name another layer.",
            )


def _require_layers(network: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names without `LOGITS`; raises `BadInput` with the nearest name if there is no such layer."""
    known = [name for name, _ in network.named_modules() if name]
    names = [name for name in layers if name != LOGITS]
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)
    return names


def input_moments(layer: nn.Module, features: Tensor) -> LayerMoments:
    """The moments of the input `features` of a layer with known statistics."""
    mean, var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    return moments_of(channels_first(layer, features), mean, var, eps_of(layer))


def channels_first(layer: nn.Module, features: Tensor) -> Tensor:
    """The input of a layer with known statistics, with the channels moved to axis 1: `(N, C, ...)`."""
    return features.movedim(layer.axis, 1) if isinstance(layer, KnownStatistics) else features


def moments_of(features: Tensor, running_mean: Tensor, running_var: Tensor, eps: float = EPS) -> LayerMoments:
    """The moments of `features` `(N, C, ...)` around `running_mean`, by plain autograd; statistics are `(C,)`."""
    return LayerMoments(*_errors(features, running_mean), running_var, _lack(running_var, eps))


def _errors(features: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    error = features.float() - _per_channel(running_mean, features)
    return _mean_of_image(error), _mean_of_image(error * error)


def _lack(running_var: Tensor, eps: float) -> Tensor:
    return (eps - running_var).clamp_min(0)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _by_image(layer: LayerMoments, images: int) -> LayerMoments:
    """The moments of each image, where a layer took several rows of every image, such as its tokens or windows.

    The rows of one image lie beside each other. Raises `BadInput` if the number of rows is not a multiple of `images`.
    """
    if len(layer.mean_error) == images:
        return layer
    if len(layer.mean_error) % images:
        raise BadInput(
            f"A BatchNorm of {len(layer.running_var)} channels sees {len(layer.mean_error)} rows of {images} images.",
            "Use a recipe without BatchNorm statistics, for instance deepdream.",
        )
    of_rows = (each.unflatten(0, (images, -1)) for each in (layer.mean_error, layer.square_error))
    mean_error, square_error = (each.mean(1) for each in of_rows)
    return layer._replace(mean_error=mean_error, square_error=square_error)


def _mean_of_image(features: Tensor) -> Tensor:
    return features.mean(tuple(range(2, features.dim()))) if features.dim() > 2 else features


class _Recorder:
    """The common part of both recorders.

    `_layers`, `_outputs`, `_means`, `_patches` and `_penultimate` are filled during a pass and emptied after it.
    """

    def __init__(
        self,
        network: nn.Module,
        outputs: Sequence[str],
        channel_means: Sequence[str],
        patches: Sequence[PatchBlock],
        last: str | None,
    ) -> None:
        self.network, self._recorded = network, outputs
        self._hidden = _require_layers(network, outputs)
        self._averaged = {name: network.get_submodule(name) for name in _require_layers(network, channel_means)}
        self._blocks = {block.name: block for block in patches}
        self._layers: list[LayerMoments] = []
        self._outputs: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._patches: dict[str, Tensor] = {}
        self._last = [last] if last else []
        self._penultimate: list[Tensor] = []

    def _pass(self, images: Tensor) -> Recording:
        self._layers.clear()  # A pass that failed may have left entries.
        logits = self.network(images).float()
        self._outputs[LOGITS] = logits
        # Contiguous, so that a loss that flattens a convolution's output reads its units in (C, H, W) order.
        outputs = {name: self._outputs[name].contiguous() for name in self._recorded}
        penultimate = self._penultimate[-1] if self._penultimate else None
        layers = tuple(_by_image(layer, len(images)) for layer in self._layers)
        recording = Recording(logits, layers, outputs, dict(self._means), dict(self._patches), penultimate)
        for recorded in (self._layers, self._outputs, self._means, self._patches, self._penultimate):
            recorded.clear()
        return recording

    def _keep(self, name: str, output: Tensor) -> None:
        self._outputs[name] = output

    def _average(self, name: str, output: Tensor) -> None:
        """Keep the channel means `(N, C)` of an output, computed on a copy in fp32."""
        features = output.movedim(channel_axis(self._averaged[name]), 1).to(torch.float32, copy=True)
        self._means[name] = _mean_of_image(features)

    def _keep_patches(self, name: str, output: Tensor) -> None:
        """Keep the patch features of an output, computed on a copy: they may be a view of it."""
        self._patches[name] = self._blocks[name].features(output.to(torch.float32, copy=True))

    def _keep_penultimate(self, name: str, features: Tensor) -> None:
        self._penultimate.append(features.to(torch.float32, copy=True))

    def _recording(self, layers: Mapping[str, nn.Module]) -> Hook:
        """The hook that records the moments of these layers' inputs; it computes them at once and so needs no copy."""
        return lambda name, features: self._layers.append(input_moments(layers[name], features))


class HookRecorder(_Recorder):
    """Records through hooks that exist only while a pass runs; the network itself is not changed.

    `moments` enables the moments of all layers with known statistics. `outputs` and `channel_means` name the layers
    whose output or channel means are recorded, `patches` the blocks whose patch features are. The input of the layer
    named `last` is recorded as `penultimate`. Raises `BadInput` if a layer of `outputs` or `channel_means` is missing.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        moments: bool = False,
        outputs: Sequence[str] = (),
        channel_means: Sequence[str] = (),
        patches: Sequence[PatchBlock] = (),
        last: str | None = None,
    ) -> None:
        super().__init__(network, outputs, channel_means, patches, last)
        self._with_statistics = named_statistics_layers(network) if moments else {}

    def __call__(self, images: Tensor) -> Recording:
        """Run the network on normalised images `(N, C, H, W)` and return the `Recording` of the pass."""
        with (
            hooked_inputs(self.network, self._with_statistics, self._recording(self._with_statistics)),
            kept_outputs(self.network, self._hidden, self._keep, dtype=torch.float32),
            hooked_outputs(self.network, self._averaged, self._average),
            hooked_outputs(self.network, self._blocks, self._keep_patches),
            hooked_inputs(self.network, self._last, self._keep_penultimate),
        ):
            return self._pass(images)


class FusedRecorder(_Recorder):
    """Records inside a private copy of the network that can be compiled.

    The copy is channels_last. Convolutions, linear layers and other operations that `torch.autocast` lowers run in
    `precision`; images, BatchNorm arithmetic, moments and logits stay in fp32.
    With `dropout`, every dropout layer multiplies its output by the filter that the pass receives for it. The other
    arguments are those of `HookRecorder`.
    Raises `BadInput` if a layer of `outputs` or `channel_means` is missing.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        moments: bool = False,
        outputs: Sequence[str] = (),
        channel_means: Sequence[str] = (),
        patches: Sequence[PatchBlock] = (),
        last: str | None = None,
        dropout: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(copy.deepcopy(network).eval().requires_grad_(False), outputs, channel_means, patches, last)
        self._filters: list[Tensor] = []
        self._precision = precision
        with_statistics = named_statistics_layers(self.network) if moments else {}
        for name, module in [*self.network.named_modules()]:
            after = after_normalising(module)
            if after is not None:
                module.__class__ = _RecordingBatchNorm
                _RecordingBatchNorm.prepare(module, self._layers if name in with_statistics else None, after)
                with_statistics.pop(name, None)
            elif precision != torch.float32 and plain_kind(module):
                module.to(precision)  # Converted once, not in every pass.
        hook_inputs(self.network, with_statistics, self._recording(with_statistics))
        dropouts = [name for name, module in self.network.named_modules() if dropout and isinstance(module, DROPOUTS)]
        hook_outputs(self.network, dropouts, lambda _, output: output * self._filters.pop(0))
        keep_outputs(self.network, self._hidden, self._keep, dtype=torch.float32)
        hook_outputs(self.network, self._averaged, self._average)
        hook_outputs(self.network, self._blocks, self._keep_patches)
        hook_inputs(self.network, self._last, self._keep_penultimate)
        self.network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def take_weights(self, network: nn.Module) -> None:
        """Copy weights, statistics and input grids from a network of the same architecture.

        Tensors are overwritten in place, so that compiled code and captured graphs use the new values.
        """
        tensors = dict(_tensors(self.network))
        for name, tensor in _tensors(network):
            tensors[name].copy_(tensor)
        for name, layer in quantized_layers(network).items():
            self.network.get_submodule(name).input_grid = layer.input_grid  # type: ignore[assignment]
        for module in self.network.modules():
            if isinstance(module, _RecordingBatchNorm):
                module.fold()

    def __call__(self, images: Tensor, filters: Sequence[Tensor] = ()) -> Recording:
        """Run the copy on normalised images `(N, C, H, W)` and return the `Recording` of the pass.

        `filters`, one per dropout layer in the order of the pass, multiply the outputs of the dropout layers.
        """
        self._filters[:] = filters
        with torch.autocast(images.device.type, self._precision, enabled=self._precision != torch.float32):
            return self._pass(images)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


class _RecordingBatchNorm(_BatchNorm):
    """A BatchNorm in evaluation mode that appends the moments of its input to `seen` (None: it records nothing) and
    applies the module `after` to its normalised input; arithmetic in fp32.
    """

    seen: list[LayerMoments] | None
    after: nn.Module
    scale: Tensor
    shift: Tensor
    lack: Tensor

    def prepare(self, seen: list[LayerMoments] | None, after: nn.Module) -> None:
        """Set `seen` and `after`, and register buffers `(C,)` for the folded constants."""
        assert self.running_var is not None
        self.seen, self.after = seen, after
        for name in ("scale", "shift", "lack"):
            self.register_buffer(name, torch.empty_like(self.running_var), persistent=False)
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Fold statistics and affine parameters into one factor and one offset per channel, in place."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = (self.running_var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.affine:
            shift = shift + self.bias
        self.scale.copy_(scale)
        self.shift.copy_(shift)
        self.lack.copy_(_lack(self.running_var, self.eps))

    def forward(self, input: Tensor) -> Tensor:  # torch's name: a network may pass it by keyword.
        if self.seen is None:
            features: Tensor = self.after(_normalised(input, self.scale, self.shift))
            return features
        assert self.running_mean is not None
        assert self.running_var is not None
        normalised, mean_error, square_error = _NormaliseAndRecord.apply(
            input, self.running_mean, self.scale, self.shift
        )
        self.seen.append(LayerMoments(mean_error, square_error, self.running_var, self.lack))
        features = self.after(normalised)
        return features


def _normalised(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    scaled = features.float() * _per_channel(scale, features) + _per_channel(shift, features)
    # Compiled by torch 2.11, an autograd function loses the gradient of an output that `to` returns unchanged.
    return scaled if features.dtype == scaled.dtype else scaled.to(features.dtype)


class _NormaliseAndRecord(torch.autograd.Function):
    """BatchNorm and the moments of its input in one pass over the features, forward and backward.

    With n positions per image, the gradient of the input is scale·g + (g_mean + 2 g_square·d)/n, d = input − running
    mean: one affine map of the input per image and channel, which a compiler fuses with its neighbours. Autograd's own
    backward of mean and square reads and writes the features several times.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, features: Tensor, running_mean: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(features, running_mean, scale)
        return _normalised(features, scale, shift), *_errors(features, running_mean)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        features, running_mean, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient, of_mean, of_square = gradients
        positions = features[0, 0].numel()
        slope = of_square * (2 / positions)
        offset = of_mean * (1 / positions) - slope * running_mean
        recorded = features.float() * _per_image(slope, features) + _per_image(offset, features)
        total = gradient.float() * _per_channel(scale, features) + recorded
        return total.to(features.dtype), None, None, None


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (like.dim() - 2))


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
