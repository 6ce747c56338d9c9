"""What one forward pass recorded of each image, and the trace of it that losses are values of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


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
        *,
        rest: Rest | None = None,
        name: str = "layers",
    ) -> Moments:
        """The moments over the images at hand and the `rest` of their batch, which knows its own by `name`.

        var = E[d²] − E[d]² loses no digits, because d is around the running mean.
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

    def part(self, number: int, parts: int) -> Trace:
        """The trace of one of several equal parts of the images, with moments of its own: of one of the batches that
        went through the network together, or of one of the views that transforms show of every image, one whole copy
        after the other.
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
        """The mean of a value of each image, `values` `(N, ...)`, over all images of the batch, which knows it by
        `name`.
        """
        return self.rest.mean(name, values) if self.rest else values.mean(0)

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

    def repeated(values: Tensor) -> Tensor:
        """Values of each image once for every copy of it, batch by batch."""
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
