"""What synthesis minimises: one function per loss, reduced exactly as in its paper.

    losses = [class_cross_entropy(), 10.0 * bn_distance(), 2.5e-5 * total_variation()]
    quiet = Loss("quiet", lambda trace: trace.outputs["layer4"].abs().mean(), wants=(LayerOutput("layer4"),))

A loss is a scalar function of a `Trace`; a weighted loss keeps its name in the log. `wants` lists what the trace must
contain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.func import functional_call
from torch.nn import functional as F

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import moments_of
from dfcompress.models.trace import LayerMoments, Moments, Trace

# A module's tensors by name, held outside of the module.
ModuleState = dict[str, Tensor]


class Want(Enum):
    """What a loss may want besides images and logits: `MOMENTS`, the moments of the layers with known statistics;
    `TARGETS`, the targets of an activation record and the outputs of its layers; `PATCHES`, the patch features of all
    blocks that mix positions; `LABELS`; `STUDENT`, the logits of a student; `BATCH`, means or norms over all images of
    the batch (`Trace.mean_over_batch` and `norm_over_batch`); `PENULTIMATE`, the input of the last weighted layer.

    A loss that wants moments or the batch has a value of the whole batch, which counts once and not by a chunk's share.
    If no loss of a recipe wants labels, the recipe steers its images towards no class.
    """

    MOMENTS = "moments"
    TARGETS = "targets"
    PATCHES = "patches"
    LABELS = "labels"
    STUDENT = "student"
    BATCH = "batch"
    PENULTIMATE = "penultimate"


@dataclass(frozen=True)
class LayerOutput:
    """Wants `trace.outputs[layer]`, the output `(N, ...)` of the module named `layer`."""

    layer: str


@dataclass(frozen=True)
class ChannelMeans:
    """Wants `trace.channel_means[layer]`, the layer's output averaged over each image's positions, `(N, C)`."""

    layer: str


@runtime_checkable
class SizedByTeacher(Protocol):
    """A loss's module that has no tensors yet, because their shapes depend on the teacher."""

    def sized_for(self, teacher: Classifier) -> nn.Module:
        """A new module that fits the features recorded from `teacher`; identical in every process."""


@dataclass(frozen=True)
class Loss:
    """A named, weighted scalar of a `Trace`, and what the trace must contain (`wants`).

    `value` is a function of the trace, or a module whose `forward` is one. The loss then owns the module's parameters
    (a head) and buffers (a memory bank, changed in place): every batch begins with a copy of them, the parameters are
    optimised together with the images, at the phase's learning rate, and all of them are saved with the batch.

    Where a student learns between batches, the module persists from batch to batch. If it `learns_with_student`, its
    parameters are not optimised with the images: `module(trace, module_loss=True)` is minimised with respect to them,
    on every batch that the student learns from.

    Where a batch is computed in chunks, the value of a loss that wants `Want.MOMENTS` or `Want.BATCH` is treated as a
    value of the whole batch and counts once; every other value is treated as a mean over the chunk's images and counts
    by the chunk's share. A loss that needs the `whole_batch` at once is never computed in chunks.
    """

    name: str
    value: Callable[[Trace], Tensor]
    weight: float = 1.0
    wants: Sequence[Want | LayerOutput | ChannelMeans] = ()
    learns_with_student: bool = False
    whole_batch: bool = False

    @property
    def of_batch(self) -> bool:
        """Whether the value is one of the whole batch instead of a mean over images."""
        return Want.MOMENTS in self.wants or Want.BATCH in self.wants

    def sized_for(self, teacher: Classifier) -> Loss:
        """The loss with its module sized for this teacher; the loss itself if its value needs no sizing."""
        if not isinstance(self.value, SizedByTeacher):
            return self
        return replace(self, value=self.value.sized_for(teacher))

    def module_state(self, device: torch.device) -> ModuleState:
        """Fresh copies of the tensors that the loss owns, by name; empty if its value is a plain function. Tensors that
        require gradients are optimised together with the images.
        """
        if not isinstance(self.value, nn.Module):
            return {}
        with_images = not self.learns_with_student
        tensors = [*self.value.named_parameters(), *self.value.named_buffers()]
        return {
            name: tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad and with_images)
            for name, tensor in tensors
        }

    def value_with(self, state: ModuleState, trace: Trace) -> Tensor:
        """The unweighted value, computed with the tensors of `module_state`."""
        if not isinstance(self.value, nn.Module):
            return self.value(trace)
        value: Tensor = functional_call(self.value, state, (trace,))
        return value

    def module_loss(self, state: ModuleState, trace: Trace) -> Tensor:
        """The value that the loss's module minimises on images that the student learns from."""
        assert isinstance(self.value, nn.Module), "a plain function learns nothing"
        value: Tensor = functional_call(self.value, state, (trace,), {"module_loss": True})
        return value

    def module_parameters(self, state: ModuleState) -> list[Tensor]:
        """The tensors of `module_state` with respect to which `module_loss` is minimised."""
        assert isinstance(self.value, nn.Module), "a plain function has none"
        return [state[name] for name, _ in self.value.named_parameters()]

    def __rmul__(self, weight: float) -> Loss:
        return replace(self, weight=weight * self.weight)


def class_cross_entropy() -> Loss:
    """Cross-entropy of the teacher's logits against the intended class, mean over the batch (Yin 2020, L(x̂, y))."""
    return Loss("cross_entropy", lambda trace: F.cross_entropy(trace.logits, trace.labels), wants=(Want.LABELS,))


def inception(scale: float = 100.0) -> Loss:
    """e^(−logit_y / scale), mean over the batch (Haroush 2020, section 3.2; the paper prints the scale three ways).

    Raises `BadInput` for a scale that is not above 0.
    """
    require_positive("scale", scale)

    def value(trace: Trace) -> Tensor:
        intended = trace.logits.gather(1, trace.labels[:, None])
        return (-intended / scale).exp().mean()

    return Loss("inception", value, wants=(Want.LABELS,))


def competition(temperature: float = 3.0) -> Loss:
    """1 − JS(p_T, p_S) of teacher and student at `temperature`, mean over the batch, in nats (Yin 2020, R_compete).

    JS = ½KL(p_T ‖ M) + ½KL(p_S ‖ M) with M = ½(p_T + p_S), computed from log-softmax: nothing is clamped, so the
    gradient never becomes 0. JS ≤ ln 2, so the value never falls below 0.307. Raises `BadInput` for a temperature that
    is not above 0.
    """
    require_positive("temperature", temperature)

    def value(trace: Trace) -> Tensor:
        assert trace.student_logits is not None
        teacher = (trace.logits / temperature).log_softmax(1)
        student = (trace.student_logits / temperature).log_softmax(1)
        middle = torch.logaddexp(teacher, student) - math.log(2)
        divergence = 0.5 * (teacher.exp() * (teacher - middle) + student.exp() * (student - middle)).sum(1)
        return 1 - divergence.mean()

    return Loss("competition", value, wants=(Want.STUDENT,))


def bn_distance(first: float = 1.0) -> Loss:
    """Σ_l ‖μ_l − BN mean‖₂ + ‖σ²_l − BN var‖₂ over BatchNorm inputs; norms over channels, not squared (Yin 2020).

    The first BatchNorm's distance is multiplied by `first` (10 in the released ImageNet settings).
    """

    def value(trace: Trace) -> Tensor:
        assert trace.moments is not None
        distances = trace.moments.distances()
        return first * distances[0] + distances[1:].sum()

    return Loss("bn_distance", value, wants=(Want.MOMENTS,))


def bn_divergence() -> Loss:
    """J_KL: KL(N(μ̂, σ̂²) ‖ N(μ, σ²)), mean over the channels of a layer, then over BatchNorm layers and the input. The
    input's reference mean and variance are 0 and 1 in normalised space (Haroush 2020, eq. 1 to 3).
    """

    def value(trace: Trace) -> Tensor:
        assert trace.moments is not None
        at_input = Moments.of([_pixels(trace)], rest=trace.rest, name="input")
        return torch.cat([at_input.divergences(), trace.moments.divergences()]).mean()

    return Loss("bn_divergence", value, wants=(Want.MOMENTS,))


def pixel_divergence() -> Loss:
    """KL(N(μ̂, σ̂²) ‖ N(0, 1)) of each image's own pixels in normalised space, mean over colours and images.

    J_KL's term for the input (Haroush 2020, eq. 3) pools the pixels of all images. Treating each image alone is ours;
    it keeps a batch from being half black and half white.
    """

    def value(trace: Trace) -> Tensor:
        images, colours = trace.images.shape[:2]
        alone = _pixels(trace)
        # Every colour of every image is a channel of its own.
        record = LayerMoments(
            alone.mean_error.reshape(1, -1),
            alone.square_error.reshape(1, -1),
            alone.running_var.expand(images, colours).reshape(-1),
            alone.lack.expand(images, colours).reshape(-1),
        )
        return Moments.of([record]).divergences().mean()

    return Loss("pixel_divergence", value)


def _pixels(trace: Trace) -> LayerMoments:
    channels = trace.images.shape[1]
    return moments_of(trace.images, trace.images.new_zeros(channels), trace.images.new_ones(channels))


def activation_distance(leak: float = 0.0, *, later: float = 1.0, summed: bool = False, pooled: bool = False) -> Loss:
    """Σ over recorded layers of the mean over units and images of (scale·(r(t) − r(a)))²: t is the target, a the
    image's output, `scale` the layer's; r is ReLU, or leaky ReLU with slope `leak` below 0 (Lopes 2017, section 3.1.2).

    `summed` takes the sum over units instead of the mean, so that every unit of the network has the same weight; with a
    leak of 1 this is Σ_i (s̄_i − s_i)² of section 3.1.3. Each layer is weighted `later` times the layer before it. With
    `pooled`, targets are drawn regardless of class, and the loss wants no labels.
    """

    def value(trace: Trace) -> Tensor:
        squares = [
            (F.leaky_relu(target.values, leak) - F.leaky_relu(trace.outputs[layer].flatten(1), leak))
            .mul(target.scale)
            .square()
            for layer, target in trace.targets.items()
        ]
        distances = [(square.sum(1) if summed else square.mean(1)).mean() for square in squares]
        return torch.stack([later**depth * distance for depth, distance in enumerate(distances)]).sum()

    return Loss("activation_distance", value, wants=(Want.TARGETS,) if pooled else (Want.TARGETS, Want.LABELS))


def patch_similarity(points: int = 10, bandwidth: float = 0.01) -> Loss:
    """−Σ_l H_l over the blocks that mix positions; H_l is the differential entropy of the cosine similarities between
    all patch features of an image, mean over images (Li 2022, L_PSE).

    The density f of the similarities is estimated with Gaussian kernels of `bandwidth` (Li 2022) at `points`
    equidistant points, and −∫ f log f by the trapezoidal rule (as coded, with 1e-4 added to f). The points span each
    image's own range instead of the batch's, which is ours: an image's value then depends on no other image.
    Raises `BadInput` for less than 2 points and for a bandwidth that is not above 0.
    """
    require_positive("bandwidth", bandwidth)
    if points < 2:
        raise BadInput(f"The integral needs 2 points or more; there are {points}.", "Use 2 or more.")

    def entropy(features: Tensor) -> Tensor:
        directions = F.normalize(features, dim=2)
        similarities = (directions @ directions.transpose(1, 2)).flatten(1)
        # Equidistant by arithmetic: `linspace` would need the end points on the host.
        steps = torch.arange(points, device=features.device, dtype=features.dtype) / (points - 1)
        low, high = torch.aminmax(similarities.detach(), dim=1, keepdim=True)
        places = low + (high - low) * steps
        density = KernelDensity.apply(similarities, places, bandwidth) + 1e-4
        entropies: Tensor = torch.trapezoid(-density * density.log(), places, dim=1)
        return entropies.mean()

    def value(trace: Trace) -> Tensor:
        return -torch.stack([entropy(features) for features in trace.patches.values()]).sum()

    return Loss("patch_similarity", value, wants=(Want.PATCHES,))


class KernelDensity(torch.autograd.Function):
    """The density of the numbers in each row of `values` `(N, values)` at its `places` `(N, points)`, as `(N, points)`:
    the mean of Gaussians of standard deviation `bandwidth` around the values.

    Both passes work point by point, so that one tensor of the values' size is kept instead of one per point: 0.06 GB
    instead of 0.6 GB for 32 images and the 12 blocks of a ViT with 196 patches.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, places: Tensor, bandwidth: float) -> Tensor:
        """The density."""
        ctx.save_for_backward(values, places)
        ctx.bandwidth = bandwidth  # type: ignore[attr-defined]
        return torch.stack([_gaussians(values, place, bandwidth).mean(1) for place in places.split(1, 1)], 1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient with respect to the values; a Gaussian's derivative is itself × (place − value) / bandwidth²."""
        values, places = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth: float = ctx.bandwidth  # type: ignore[attr-defined]
        gradient = torch.zeros_like(values)
        for place, of_density in zip(places.split(1, 1), gradients[0].split(1, 1), strict=True):
            gradient += of_density * _gaussians(values, place, bandwidth) * (place - values)
        return gradient / (bandwidth**2 * values.shape[1]), None, None


def _gaussians(values: Tensor, place: Tensor, bandwidth: float) -> Tensor:
    return (((values - place) / bandwidth).square() / -2).exp() / (bandwidth * math.sqrt(2 * math.pi))


def total_variation() -> Loss:
    """Sum over the directions →, ↓, ↘, ↙ of the L2 norm of the shifted difference (Yin 2020, R_TV, as coded).

    The norm is taken over the whole batch tensor, so the value grows with the square root of the batch size.
    """

    def value(trace: Trace) -> Tensor:
        images = trace.images
        differences = (
            images[..., :, 1:] - images[..., :, :-1],
            images[..., 1:, :] - images[..., :-1, :],
            images[..., 1:, 1:] - images[..., :-1, :-1],
            images[..., 1:, :-1] - images[..., :-1, 1:],
        )
        norms = [
            trace.norm_over_batch(f"variation.{direction}", _norms(difference))
            for direction, difference in enumerate(differences)
        ]
        return torch.stack(norms).sum()

    return Loss("total_variation", value, wants=(Want.BATCH,))


def usual_variation(usual: float = 1.25) -> Loss:
    """|R_TV − usual·√pixels|: R_TV as in `total_variation`, `pixels` the number of values N·C·H·W (Li 2022, L_TV).

    As coded, R_TV of 32 images of 224 pixels is drawn towards a number between 2,500 and 3,000, which is 1.14 to 1.37
    times √pixels. The fixed factor of 1.25 is ours.
    """
    variation = total_variation()

    def value(trace: Trace) -> Tensor:
        images = trace.rest.images if trace.rest else len(trace.images)
        return (variation.value(trace) - usual * math.sqrt(images * trace.images[0].numel())).abs()

    return Loss("usual_variation", value, wants=variation.wants)


def smoothness(kernel: int = 5, sigma: float = 1.0) -> Loss:
    """Mean squared difference between the image and the image smoothed by a `kernel` × `kernel` Gaussian of `sigma`
    pixels, borders reflected (Haroush 2020, section 3.2). Raises `BadInput` for an even kernel or a sigma not above 0.
    """
    if kernel % 2 == 0 or sigma <= 0:
        raise BadInput(f"There is no {kernel} × {kernel} Gaussian of σ {sigma}.", "Use an odd kernel and a σ above 0.")

    def value(trace: Trace) -> Tensor:
        channels, border = trace.images.shape[1], kernel // 2
        # Computed on the device: a copy from the host would end the capture of a CUDA graph.
        offsets = torch.arange(kernel, device=trace.images.device) - border
        line = (-(offsets**2) / (2 * sigma**2)).exp()
        line = line / line.sum()
        filters = torch.outer(line, line).expand(channels, 1, kernel, kernel)
        padded = _reflected(_reflected(trace.images, border, 2), border, 3)
        return (trace.images - F.conv2d(padded, filters, groups=channels)).square().mean((1, 2, 3)).mean()

    return Loss("smoothness", value)


def _reflected(images: Tensor, border: int, axis: int) -> Tensor:
    """Add `border` pixels at both ends of an axis, mirrored at the outermost pixel.

    It uses slices, because the gradient of `F.pad`'s reflection is summed in no fixed order on CUDA.
    """
    size = images.shape[axis]
    before = images.narrow(axis, 1, border).flip(axis)
    behind = images.narrow(axis, size - 1 - border, border).flip(axis)
    return torch.cat([before, images, behind], axis)


def image_norm(*, each: bool = False) -> Loss:
    """‖x̂‖₂ of the whole batch in normalised space (Yin 2020, R_l2, as coded for CIFAR).

    With `each`, the mean of the images' own norms (as coded for ImageNet).
    """

    def value(trace: Trace) -> Tensor:
        norms = _norms(trace.images)
        return norms.mean() if each else trace.norm_over_batch("norm", norms)

    return Loss("image_norm", value, wants=() if each else (Want.BATCH,))


def require_positive(name: str, value: float) -> None:
    """Raise `BadInput` if a setting that is used as a divisor is not above 0."""
    if value <= 0:
        raise BadInput(f"{name} must be above 0; it is {value}.", "Use a number above 0.")


def _norms(images: Tensor) -> Tensor:
    """L2 norm `(N,)` of each image on its own, so that the bits do not depend on the number of threads."""
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3))
    return norms
