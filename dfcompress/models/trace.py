"""The values that one forward pass records of each image, and the trace from which losses are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


class LayerMoments(NamedTuple):
    """Moments of the input of one layer with known statistics, per image.

    `mean_error` and `square_error`, each `(N, C)` in fp32, are the means of d and of d² over an image's positions,
    d = input − running mean. `running_var` `(C,)` is the layer's; `lack` `(C,)` is max(eps − `running_var`, 0).
    The mean is taken of each image first, so that the result does not depend on the number of threads.
    """

    mean_error: Tensor
    square_error: Tensor
    running_var: Tensor
    lack: Tensor


class Recording(NamedTuple):
    """The values that a recorder returns for one pass, all in fp32.

    `logits` is `(N, classes)`; `layers` has the moments of every layer with known statistics, in the order of the
    forward pass. `outputs` `(N, ...)`, `channel_means` `(N, C)` and `patches` `(N, patches, channels)` hold, by layer,
    the values that were requested. `penultimate` `(N, ...)` is the input of the last weighted layer, None if it was not
    requested.
    """

    logits: Tensor
    layers: tuple[LayerMoments, ...]
    outputs: Mapping[str, Tensor]
    channel_means: Mapping[str, Tensor]
    patches: Mapping[str, Tensor]
    penultimate: Tensor | None = None


@dataclass(frozen=True)
class Rest:
    """The other images of a batch, when the batch is computed in chunks.

    `images` is the number of images in the whole batch, every copy counted; `share` is the chunk's share of them.
    `means` holds by name, as constants, the other chunks' contribution to each mean over the batch. `own` is filled
    with the chunk's own means.
    """

    images: int
    share: float
    means: Mapping[str, Tensor]
    own: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor) -> Tensor:
        """The mean `(...)` over the batch of a quantity that the chunk's images have as `values` `(N, ...)`.

        It is the mean over the chunk alone while `means` has no entry `name`.
        """
        own = values.mean(0)
        self.own[name] = own.detach()
        return self.share * own + self.means[name] if name in self.means else own


@dataclass(frozen=True)
class Moments:
    """Measured moments of several layers' inputs and the layers' running variances, concatenated over the layers.

    Each tensor is `(channels of all layers,)`; moments are taken over all axes except the channels. `mean_error` is
    E[x] − running mean; `var` is the biased variance; `lack` is max(eps − running variance, 0). `sizes` are the numbers
    of channels of the layers. All layers share every operation: with one computation for each of ResNet-34's 36 layers,
    the losses took 233 kernels of a few thousand numbers.
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
        *,
        rest: Rest | None = None,
        name: str = "layers",
    ) -> Moments:
        """The moments over the images of `layers` and, if given, the `rest` of their batch, under the key `name`.

        var = E[d²] − E[d]² does not suffer from cancellation, because d is taken around the running mean.
        """
        mean_errors = torch.cat([layer.mean_error for layer in layers], 1)
        square_errors = torch.cat([layer.square_error for layer in layers], 1)
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
        """‖μ̂ − μ‖₂ + ‖σ̂² − σ²‖₂ of every layer `(layers,)`; hats are measured, norms over channels (Yin 2020)."""
        of_means, of_variances = self._by_layer(self.mean_error), self._by_layer(self.var - self.running_var)
        distances: Tensor = torch.linalg.vector_norm(of_means, dim=1) + torch.linalg.vector_norm(of_variances, dim=1)
        return distances

    def squared_distances(self) -> Tensor:
        """‖μ̂ − μ‖₂² + ‖σ̂ − σ‖₂² of every layer `(layers,)`; hats are measured (Chen 2023, L_bns).

        The variances are raised as in `divergences`, because a square root has no gradient at 0.
        """
        measured, expected = self._variances()
        of_deviations = measured.sqrt() - expected.sqrt()
        return self._by_layer(self.mean_error.square() + of_deviations.square()).sum(1)

    def divergences(self, eps: float = 1e-8) -> Tensor:
        """KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) of every layer `(layers,)`, mean over its channels; hats are measured, and `eps` is
        added to σ̂² (Haroush 2020, eq. 3).

        Where σ² is below the layer's eps, which BatchNorm adds before it divides, `lack` is added to both variances: a
        dead channel (σ² = 0) counts as KL(N(μ̂, σ̂² + eps) ‖ N(μ, eps)), and all others count as in the paper.
        """
        measured, expected = self._variances(eps)
        ratio = (measured + self.mean_error**2) / expected
        of_channels = 0.5 * (expected.log() - measured.log()) - 0.5 * (1 - ratio)
        channels = self._by_layer(torch.ones_like(of_channels)).sum(1)
        return self._by_layer(of_channels).sum(1) / channels

    def _variances(self, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
        """The measured and the expected variances, all above 0."""
        measured = self.var.clamp_min(0) + eps + self.lack  # E[d²] − E[d]² may be slightly negative by rounding.
        return measured, self.running_var + self.lack

    def _by_layer(self, values: Tensor) -> Tensor:
        """Channel values as `(layers, channels of the widest layer)`, one row per layer, padded with 0."""
        widest = max(self.sizes)
        filler = values.new_zeros(widest)
        rows = [part for own in values.split(self.sizes) for part in (own, filler[len(own) :])]
        return torch.cat(rows).view(len(self.sizes), widest)


class Target(NamedTuple):
    """Target `values` `(N, units)` of one layer's output, and the `scale` `()` that multiplies the differences."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Trace:
    """The values of one batch from which losses are computed.

    `images` `(N, C, H, W)` are normalised, as the teacher takes them; `labels` are `(N,)`, `logits` `(N, classes)`.
    `layers` holds the moments per image of all layers with known statistics, in the order of the forward pass;
    `moments` combines them over the batch. By layer, `outputs` are `(N, ...)`, `channel_means` `(N, C)`, `patches`
    `(N, patches, channels)` and `targets` those of an activation record. `student_logits` `(N, classes)` exist where
    the images compete with a student. `penultimate` `(N, ...)` is the input of the last weighted layer. Values that no
    loss needs are None or empty.
    If a batch is computed in chunks, a trace holds the images of one chunk, `moments` cover the whole batch, and `rest`
    describes the other images.
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
        """The normalised mean input `(N, channels of all layers)` of all layers with known statistics.

        Per channel: the mean over an image's positions, less the running mean, divided by the running deviation.
        """
        scaled = [layer.mean_error * (layer.running_var + layer.lack).rsqrt() for layer in self.layers]
        return torch.cat(scaled, 1)

    def part(self, number: int, parts: int) -> Trace:
        """The trace of part `number` of `parts` equal parts of the images, with moments of its own.

        A part is one of the batches that went through the network together, or one of the transformed copies of all
        images, which follow each other as whole copies.
        """
        assert parts == 1 or self.rest is None, "a batch in chunks is not divided further"
        size = len(self.images) // parts
        rows = slice(number * size, (number + 1) * size)

        def of_part(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[rows] for name, value in values.items()}

        layers = [
            layer._replace(mean_error=layer.mean_error[rows], square_error=layer.square_error[rows])
            for layer in self.layers
        ]
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            logits=self.logits[rows],
            moments=Moments.of(layers, rest=self.rest) if layers else None,
            outputs=of_part(self.outputs),
            channel_means=of_part(self.channel_means),
            patches=of_part(self.patches),
            targets={layer: Target(target.values[rows], target.scale) for layer, target in self.targets.items()},
            student_logits=None if self.student_logits is None else self.student_logits[rows],
            layers=layers,
            penultimate=None if self.penultimate is None else self.penultimate[rows],
        )

    def mean_over_batch(self, name: str, values: Tensor) -> Tensor:
        """The mean `(...)` of `values` `(N, ...)` over all images of the batch; `name` is the key of the mean in
        `rest`.
        """
        return self.rest.mean(name, values) if self.rest else values.mean(0)

    def norm_over_batch(self, name: str, values: Tensor) -> Tensor:
        """The L2 norm `()` of `values` `(N,)`, one per image, over the batch; `name` is its key in `rest`."""
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
    """The traces of `groups` equal batches that went through the network together, each with its own moments; or the
    trace of one chunk of a batch, whose other images are `rest`.

    `labels` and `targets` may be fewer than `images`, where transforms produce several copies of each image.
    """
    copies = len(images) // len(labels)

    def repeated(values: Tensor) -> Tensor:
        """Repeat the values of each image for every copy of the image, batch by batch."""
        by_batch = values.unflatten(0, (groups, -1))
        return torch.cat([by_batch] * copies, 1).flatten(0, 1)

    together = Trace(
        images=images,
        labels=repeated(labels),
        logits=recording.logits,
        outputs=recording.outputs,
        channel_means=recording.channel_means,
        patches=recording.patches,
        targets={layer: Target(repeated(target.values), target.scale) for layer, target in (targets or {}).items()},
        student_logits=student_logits,
        rest=rest,
        layers=recording.layers,
        penultimate=recording.penultimate,
    )
    return [together.part(group, groups) for group in range(groups)]
