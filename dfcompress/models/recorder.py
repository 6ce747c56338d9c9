"""One forward pass and what the losses asked for of it.

`HookRecorder` is the reference: hooks on the untouched network, plain autograd.
`FusedRecorder` is the fast one: a private copy whose BatchNorms record their own input with an analytic backward and
which may run in bf16; nothing in it stops `torch.compile(fullgraph=True)`.
Both make the same `Recording` of each image, and `traces` turns a recording into what losses are values of.

Statistics are known of what goes into a BatchNorm, and of what passes a `KnownStatistics`.
The output of any module can be recorded, by the module's name; `LOGITS` stands for the network's answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dfcompress import console
from dfcompress.errors import BadInput
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
from dfcompress.models.patches import PatchBlock
from dfcompress.models.plain_layers import after_normalising, plain_kind
from dfcompress.models.statistics import KnownStatistics, named_statistics_layers
from dfcompress.settings import unknown

LOGITS = "logits"


class LayerMoments(NamedTuple):
    """What went into one BatchNorm, image by image, with d = input − running mean: the mean of d and of d² over an
    image's positions, each `(N, C)` in fp32; the layer's running variance, and what that lacks to the layer's eps, 0
    where it is larger, each `(C,)`.

    Summing each image on its own first makes the result independent of the number of threads.
    """

    mean_error: Tensor
    square_error: Tensor
    running_var: Tensor
    lack: Tensor


class Recording(NamedTuple):
    """Logits `(N, classes)` in fp32, the moments of every layer with known statistics in the order of the forward pass,
    and by layer the outputs `(N, ...)`, the channel means `(N, C)` and the patch features `(N, patches, channels)` that
    were wanted, in fp32; `penultimate` `(N, ...)` where it was: what goes into the last weighted layer.
    """

    logits: Tensor
    layers: tuple[LayerMoments, ...]
    outputs: Mapping[str, Tensor]
    channel_means: Mapping[str, Tensor]
    patches: Mapping[str, Tensor]
    penultimate: Tensor | None = None


@dataclass(frozen=True)
class Rest:
    """The images of a batch that are not at hand, where a batch is computed in chunks.

    `share` is that of the images at hand in the batch's `images`, which counts every copy of an image; `means` holds by
    name, as constants, what the others add to a mean over the batch. `own` is filled with the means of the images at
    hand.
    """

    images: int
    share: float
    means: Mapping[str, Tensor]
    own: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor) -> Tensor:
        """The mean over the batch of what the images at hand have as `values` `(N, ...)`; over those alone where the
        others are not known yet.
        """
        own = values.mean(0)
        self.own[name] = own.detach()
        return self.share * own + self.means[name] if name in self.means else own


@dataclass(frozen=True)
class Moments:
    """Moments over all but the channel axis of what went into some layers, and the variances these expect, of all
    channels of one layer after those of another; each `(channels of all layers,)`.

    `mean_error` is E[x] − running mean; `var` is the biased variance; `lack` is what the running variance lacks to eps.
    `sizes` are the layers' own channels. The layers share every operation: of ResNet-34's 36 each on its own, the
    losses were 233 kernels of a few thousand numbers.
    """

    mean_error: Tensor
    var: Tensor
    running_var: Tensor
    lack: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerMoments],
        images: slice = slice(None),
        *,
        rest: Rest | None = None,
        name: str = "layers",
    ) -> Moments:
        """The moments over some images and the `rest` of their batch, which knows its own by `name`.

        var = E[d²] − E[d]² loses no digits, because d is around the running mean.
        """
        mean_errors = torch.cat([layer.mean_error[images] for layer in layers], 1)
        square_errors = torch.cat([layer.square_error[images] for layer in layers], 1)
        if rest:
            mean_error, square_error = rest.mean(f"{name}.d", mean_errors), rest.mean(f"{name}.d2", square_errors)
        else:
            mean_error, square_error = mean_errors.mean(0), square_errors.mean(0)
        return cls(
            mean_error,
            square_error - mean_error**2,
            torch.cat([layer.running_var for layer in layers]),
            torch.cat([layer.lack for layer in layers]),
            tuple(len(layer.running_var) for layer in layers),
        )

    def distances(self) -> Tensor:
        """‖μ̂ − μ‖₂ + ‖σ̂² − σ²‖₂ of every layer `(layers,)`, hats measured, norms over its channels (Yin 2020)."""
        of_means, of_variances = self._by_layer(self.mean_error), self._by_layer(self.var - self.running_var)
        distances: Tensor = torch.linalg.vector_norm(of_means, dim=1) + torch.linalg.vector_norm(of_variances, dim=1)
        return distances

    def squared_distances(self) -> Tensor:
        """‖μ̂ − μ‖₂² + ‖σ̂ − σ‖₂² of every layer `(layers,)`, hats measured, σ deviations (Chen 2023, L_bns).

        Variances are those that `divergences` compares: a root has no gradient at 0.
        """
        measured, expected = self._variances()
        of_deviations = measured.sqrt() - expected.sqrt()
        return self._by_layer(self.mean_error.square() + of_deviations.square()).sum(1)

    def divergences(self, eps: float = 1e-8) -> Tensor:
        """KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) of every layer `(layers,)`, mean over its channels, hats measured, `eps` added to σ̂²
        (Haroush 2020, eq. 3).

        Where σ² is below the layer's eps, which BatchNorm adds before it divides, both variances grow by what is
        lacking: a dead channel (σ² = 0) counts as KL(N(μ̂, σ̂² + eps) ‖ N(μ, eps)), and all others as in the paper.
        """
        measured, expected = self._variances(eps)
        ratio = (measured + self.mean_error**2) / expected
        of_channels = 0.5 * (expected.log() - measured.log()) - 0.5 * (1 - ratio)
        channels = self._by_layer(torch.ones_like(of_channels)).sum(1)
        return self._by_layer(of_channels).sum(1) / channels

    def _variances(self, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
        """Those measured and those expected, all above 0."""
        measured = self.var.clamp_min(0) + eps + self.lack  # E[d²] − E[d]² may round to just below 0.
        return measured, self.running_var + self.lack

    def _by_layer(self, values: Tensor) -> Tensor:
        """Values of the channels as `(layers, channels of the widest)`, a row a layer, narrower ones filled with 0."""
        widest = max(self.sizes)
        filler = values.new_zeros(widest)
        rows = [part for own in values.split(self.sizes) for part in (own, filler[len(own) :])]
        return torch.cat(rows).view(len(self.sizes), widest)


class Target(NamedTuple):
    """What the output of one layer shall be, `(N, units)`, and what their differences are multiplied by, `()`."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Trace:
    """What one batch showed: normalised `images` `(N, C, H, W)` as the teacher saw them, their `labels` `(N,)`,
    `logits` `(N, classes)`, the `moments` of all layers with known statistics in the order of the forward pass (None
    where no loss wants them), by layer the `outputs` `(N, ...)` and `channel_means` `(N, C)` that a loss wants, the
    `patches` `(N, patches, channels)` of all blocks that mix positions and the `targets` that an activation record
    sets, `student_logits` where the images compete with a student, the `layers` that the moments are made of, image by
    image, and `penultimate` `(N, ...)`, what goes into the last weighted layer, where a loss wants it.

    Where a batch is computed in chunks these are the images of one of them, `moments` are those of the whole batch, and
    `rest` stands for the others.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    moments: Moments | None = None
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    channel_means: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    student_logits: Tensor | None = None
    rest: Rest | None = None
    layers: Sequence[LayerMoments] = ()
    penultimate: Tensor | None = None

    def features(self) -> Tensor:
        """What goes into all layers with known statistics, as `(N, channels of all layers)`: the mean over an image's
        positions of every channel, less its running mean and divided by its running deviation.
        """
        scaled = [layer.mean_error * (layer.running_var + layer.lack).rsqrt() for layer in self.layers]
        return torch.cat(scaled, 1)

    def view(self, number: int, views: int) -> Trace:
        """The trace of one of the `views` that transforms show of every image, one whole copy after the other."""
        assert self.rest is None, "a batch in chunks is not looked at view by view"
        size = len(self.images) // views
        shown = slice(number * size, (number + 1) * size)

        def of_view(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[shown] for name, value in values.items()}

        return replace(
            self,
            images=self.images[shown],
            labels=self.labels[shown],
            logits=self.logits[shown],
            moments=Moments.of(self.layers, shown) if self.layers else None,
            outputs=of_view(self.outputs),
            channel_means=of_view(self.channel_means),
            patches=of_view(self.patches),
            targets={layer: Target(target.values[shown], target.scale) for layer, target in self.targets.items()},
            student_logits=None if self.student_logits is None else self.student_logits[shown],
            layers=[_of_images(layer, shown) for layer in self.layers],
            penultimate=None if self.penultimate is None else self.penultimate[shown],
        )

    def norm_over_batch(self, name: str, values: Tensor) -> Tensor:
        """The L2 norm of a value of each image, `values` `(N,)`, over all images of the batch."""
        norm: Tensor
        if self.rest:
            norm = (self.rest.mean(name, values.square()) * self.rest.images).sqrt()
        else:
            norm = torch.linalg.vector_norm(values)
        return norm


def traces(
    images: Tensor,
    labels: Tensor,
    recording: Recording,
    *,
    targets: Mapping[str, Target] | None = None,
    student_logits: Tensor | None = None,
    groups: int = 1,
    rest: Rest | None = None,
) -> list[Trace]:
    """The traces of `groups` equal batches that went through the network together, each with its own statistics; or
    of one, of which the `rest` is not at hand.

    `labels` and `targets` may be fewer than `images`, where transforms show each image several times.
    """
    copies = len(images) // len(labels)
    result = []
    for group in range(groups):
        shown = slice(group * len(images) // groups, (group + 1) * len(images) // groups)
        labelled = slice(group * len(labels) // groups, (group + 1) * len(labels) // groups)
        result.append(
            Trace(
                images=images[shown],
                labels=labels[labelled].repeat(copies),
                logits=recording.logits[shown],
                moments=Moments.of(recording.layers, shown, rest=rest) if recording.layers else None,
                outputs={layer: output[shown] for layer, output in recording.outputs.items()},
                channel_means={layer: means[shown] for layer, means in recording.channel_means.items()},
                patches={block: features[shown] for block, features in recording.patches.items()},
                targets={
                    layer: Target(target.values[labelled].repeat(copies, 1), target.scale)
                    for layer, target in (targets or {}).items()
                },
                student_logits=None if student_logits is None else student_logits[shown],
                rest=rest,
                layers=[_of_images(layer, shown) for layer in recording.layers],
                penultimate=None if recording.penultimate is None else recording.penultimate[shown],
            )
        )
    return result


def _of_images(layer: LayerMoments, images: slice) -> LayerMoments:
    return layer._replace(mean_error=layer.mean_error[images], square_error=layer.square_error[images])


def weighted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, in order of definition."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _ConvNd | nn.Linear)}


@torch.no_grad()
def outputs_of_one_image(classifier: Classifier) -> dict[str, Tensor]:
    """Tensors of the shapes that every weighted layer gives for one image, `(1, ...)`, in the order of the forward
    pass; the layer whose output is the network's answer goes by the name of `LOGITS`.

    Layers that are used several times are left out, with a notice: their outputs are not of one kind.
    """
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, output: Tensor) -> None:
        seen.setdefault(name, []).append(output)  # No copy: what counts is the shape, and the memory it lies in.

    with hooked_outputs(classifier.network, weighted_layers(classifier.network), note):
        logits = pass_once(classifier)
    for name in [name for name, outputs in seen.items() if len(outputs) > 1]:
        del seen[name]
        console.notice(f"Layer {name} is used several times and is left out.")
    hidden = {name: output for name, (output,) in seen.items() if output.data_ptr() != logits.data_ptr()}
    return {**hidden, LOGITS: logits}


@torch.no_grad()
def require_outputs(classifier: Classifier, layers: Iterable[str]) -> None:
    """Raise `BadInput` where a network has no layer of one of these names, or one whose output cannot be recorded: a
    layer must run once in a pass, and give one tensor with a value for every image.
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


@torch.no_grad()
def last_weighted_layer(classifier: Classifier) -> str:
    """The name of the weighted layer that runs last in a pass: the classifier of a usual network."""
    ran: list[str] = []
    layers = weighted_layers(classifier.network)
    with hooked_outputs(classifier.network, layers, lambda name, output: ran.append(name)):
        pass_once(classifier)
    return ran[-1]


def _require_layers(network: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names without that of the answer; raises `BadInput` with the nearest one where there is no such layer."""
    known = [name for name, _ in network.named_modules() if name]
    names = [name for name in layers if name != LOGITS]
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)
    return names


def channels_of(layer: nn.Module) -> int:
    """How many channels a weighted layer's output has."""
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))


def channel_axis(layer: nn.Module) -> int:
    """Where a layer's output has its channels: last behind a linear layer, else second."""
    return -1 if isinstance(layer, nn.Linear) else 1


def input_moments(layer: nn.Module, features: Tensor) -> LayerMoments:
    """The record of what goes into a layer with known statistics."""
    mean, var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    return moments_of(channels_first(layer, features), mean, var, eps_of(layer))


def channels_first(layer: nn.Module, features: Tensor) -> Tensor:
    """What goes into a layer with known statistics, as `(N, C, ...)`."""
    return features.movedim(layer.axis, 1) if isinstance(layer, KnownStatistics) else features


def moments_of(features: Tensor, running_mean: Tensor, running_var: Tensor, eps: float = EPS) -> LayerMoments:
    """The record of `features` `(N, C, ...)`, by plain autograd."""
    return LayerMoments(*_errors(features, running_mean), running_var, _lack(running_var, eps))


def _errors(features: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    error = features.float() - _per_channel(running_mean, features)
    return _mean_of_image(error), _mean_of_image(error * error)


def _lack(running_var: Tensor, eps: float) -> Tensor:
    return (eps - running_var).clamp_min(0)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _by_image(layer: LayerMoments, images: int) -> LayerMoments:
    """The record image by image where a layer saw several rows of each, such as its tokens or windows, one image after
    the other.
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
    """What both recorders do with one forward pass: `_layers`, `_outputs`, `_means` and `_patches` fill while the
    network runs.
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
        self._layers.clear()  # A pass that failed may have left some.
        logits = self.network(images).float()
        self._outputs[LOGITS] = logits
        # In one memory layout, so that a loss reads the units of a convolution's output in the order of their names.
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
        """Keep the channel means; they are taken at once, so the output itself is not copied."""
        features = output.movedim(channel_axis(self._averaged[name]), 1).to(torch.float32, copy=True)
        self._means[name] = _mean_of_image(features)

    def _keep_patches(self, name: str, output: Tensor) -> None:
        """Keep the patch features, of a copy where they are a view of it."""
        self._patches[name] = self._blocks[name].features(output.to(torch.float32, copy=True))

    def _keep_penultimate(self, name: str, features: Tensor) -> None:
        self._penultimate.append(features.to(torch.float32, copy=True))

    def _recording(self, layers: Mapping[str, nn.Module]) -> Hook:
        """The hook that records what goes into these layers. The sums are taken at once, so they need no copy."""
        return lambda name, features: self._layers.append(input_moments(layers[name], features))


class HookRecorder(_Recorder):
    """Records through forward hooks, which are there while a pass runs; the network itself is not changed. What goes
    into the layer named `last` is recorded as `penultimate`.

    Raises `BadInput` where there is no layer whose output or channel means are wanted.
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
        """One forward pass of normalised images `(N, C, H, W)`."""
        with (
            hooked_inputs(self.network, self._with_statistics, self._recording(self._with_statistics)),
            kept_outputs(self.network, self._hidden, self._keep, dtype=torch.float32),
            hooked_outputs(self.network, self._averaged, self._average),
            hooked_outputs(self.network, self._blocks, self._keep_patches),
            hooked_inputs(self.network, self._last, self._keep_penultimate),
        ):
            return self._pass(images)


class FusedRecorder(_Recorder):
    """Records inside a private copy of the network, made to be compiled.

    The copy is channels_last; its convolutions and linear layers, and whatever else `torch.autocast` runs so, run in
    `precision`; images, BatchNorm arithmetic, records and logits stay fp32.
    With `dropout` its dropout layers multiply by the filters that each pass is given.
    Raises `BadInput` where there is no layer whose output or channel means are wanted.
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
                module.to(precision)  # Once, instead of in every pass.
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
        """Compute from now on with the weights, statistics and input grids of a network of the same architecture, put
        where compiled code and captured steps read them.
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
        """One forward pass of normalised images `(N, C, H, W)`; `filters` multiply what passes the dropout layers."""
        self._filters[:] = filters
        with torch.autocast(images.device.type, self._precision, enabled=self._precision != torch.float32):
            return self._pass(images)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


class _RecordingBatchNorm(_BatchNorm):
    """A BatchNorm in evaluation mode that appends the record of its input to `seen`, and hands what it has normalised
    to the module `after`; arithmetic in fp32.
    """

    seen: list[LayerMoments] | None
    after: nn.Module
    scale: Tensor
    shift: Tensor
    lack: Tensor

    def prepare(self, seen: list[LayerMoments] | None, after: nn.Module) -> None:
        """Where to record, what comes behind, and room for the folded constants."""
        assert self.running_var is not None
        self.seen, self.after = seen, after
        for name in ("scale", "shift", "lack"):
            self.register_buffer(name, torch.empty_like(self.running_var), persistent=False)
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Fold statistics and affine parameters into one multiplication and one addition a channel, in place."""
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

    def forward(self, input: Tensor) -> Tensor:  # torch's name, by which a network may hand it over.
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
    return scaled.to(features.dtype)


class _NormaliseAndRecord(torch.autograd.Function):
    """BatchNorm and its record in one pass each way.

    With n positions an image, the gradient to the input is scale·g + (g_mean + 2 g_square·d)/n: one affine map of the
    input for every image and channel, which a compiler fuses with its neighbours; autograd's own backward of mean and
    square reads and writes the features several times.
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
