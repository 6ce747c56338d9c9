"""Images that a generator makes of latent vectors: a network learns, and with it, if asked to, the vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress.machine.compiling import compiled
from dfcompress.machine.device import PRECISIONS
from dfcompress.machine.execution import Execution
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.images import ParameterGroup, PixelStatistics

# The generator begins with maps of so many pixels a side at most, and doubles them twice at least: 8 → 16 → 32, 7 → 14
# → 28, 7 → … → 224. That of the code of Fang 2021 is this one at 32 pixels.
SMALLEST_MAP, FEWEST_DOUBLINGS = 8, 2
# Channels of any map are at most so many times those of the last one, as in DCGAN.
WIDEST = 8
LEAK = 0.2
# Deviations of weights at the start, as DCGAN states them.
STD = 0.02
EMBEDDING = 64


class Generator:
    """A DCGAN-style generator (as coded by Fang 2021): a linear layer to small maps, then doublings, each a 3 × 3
    convolution of the enlarged maps, and one to the colours; BatchNorm of the batch at hand and LeakyReLU between, and
    a sigmoid, so that images are in [0, 1].

    A latent vector z has `latent` numbers from N(0, 1). The last maps have `width` channels, those before them twice as
    many and so on. With `conditional` z is joined by a learnt vector of the image's class. With `learn_latents` the
    vectors of a batch are optimised too, at the rate `latent_lr` or that of the phase.
    A `persistent` generator goes on learning from batch to batch; with `fresh_noise` its first layer begins every batch
    anew, so that the same maps are mixed in another way (after Tran 2024, whose noise enters so). Another one begins
    every batch with new weights.
    Sizes that no doubling reaches are the middle of larger ones.
    """

    in_range = True

    def __init__(
        self,
        *,
        latent: int = 256,
        width: int = 64,
        conditional: bool = False,
        persistent: bool = False,
        learn_latents: bool = False,
        latent_lr: float | None = None,
        fresh_noise: bool = False,
    ) -> None:
        self.persistent = persistent
        self._latent, self._width, self._conditional = latent, width, conditional
        self._learn_latents, self._latent_lr, self._fresh_noise = learn_latents, latent_lr, fresh_noise
        self._weights: dict[str, Tensor] = {}
        # Vectors and classes by the size of a batch, as a student is shown other batches than those that are optimised.
        self._batches: dict[int, tuple[Tensor, Tensor]] = {}
        self._generated: Callable[..., Tensor] = generated
        self._precision = torch.float32

    def compute_as(self, execution: Execution) -> None:
        """Render in the precision of an execution, and compiled if it is."""
        self._precision = PRECISIONS[execution.precision]
        self._generated = compiled(generated) if execution.compile else generated

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Draw vectors for a batch, and weights unless they live on; what is drawn stays in the same memory."""
        channels, height, width = self._size = teacher.card.input_size
        if not self._weights:
            shapes = _shapes(self, channels, height, width, teacher.card.classes)
            self._weights = {name: torch.empty(shape, device=labels.device) for name, shape in shapes.items()}
            self._draw_weights(generator, "")
        elif self._fresh_noise:
            self._draw_weights(generator, "first.")
        latents = torch.randn(len(labels), self._latent, generator=generator)
        if len(labels) not in self._batches:
            vectors = torch.empty_like(latents, device=labels.device).requires_grad_(self._learn_latents)
            self._batches[len(labels)] = vectors, torch.empty_like(labels)
        self._latents, self._labels = self._batches[len(labels)]
        self._latents.detach().copy_(latents)
        self._labels.copy_(labels)
        self._mean, self._std = teacher.mean, teacher.std

    def _draw_weights(self, generator: torch.Generator, part: str) -> None:
        """Begin the tensors whose names start with `part`."""
        for name, weight in self._weights.items():
            if not name.startswith(part):
                continue
            drawn = torch.randn(weight.shape, generator=generator)
            kind = name.rpartition(".")[2]
            if kind != "embedding":
                drawn = STD * drawn + 1 if kind == "scale" else STD * drawn if kind == "weight" else 0 * drawn
            weight.detach().copy_(drawn)
            weight.requires_grad_(True)

    def parameters(self) -> list[ParameterGroup]:
        """The weights at the rate of the phase, and the vectors if they are learnt."""
        groups = [ParameterGroup([*self._weights.values()])]
        if self._learn_latents:
            groups.append(ParameterGroup([self._latents], lr=self._latent_lr))
        return groups

    def render(self) -> Tensor:
        """The images `(N, C, H, W)` in normalised space."""
        labels = self._labels if self._conditional else None
        images = self._generated(self._weights, self._latents, labels, self._size, self._precision)
        return (images - self._mean) / self._std

    def project(self) -> None:
        """Nothing to put back: a sigmoid keeps images in range."""

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, vectors, and the classes they are joined by."""
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        return {**weights, "latents": self._latents.detach(), "labels": self._labels}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put the tensors of a `state_dict` in place of these."""
        for name, tensor in {**self._weights, "latents": self._latents, "labels": self._labels}.items():
            tensor.copy_(state[name])


def _doublings(height: int, width: int) -> int:
    """How often maps are doubled until they are as large as images."""
    doublings = FEWEST_DOUBLINGS
    while max(height, width) > SMALLEST_MAP << doublings:
        doublings += 1
    return doublings


def _shapes(images: Generator, channels: int, height: int, width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights by name, in the order they are used in."""
    doublings = _doublings(height, width)
    rows, columns = (-(-side // 2**doublings) for side in (height, width))
    maps = [images._width * min(WIDEST, 2**left) for left in range(doublings - 1, -1, -1)]
    inputs = images._latent + (EMBEDDING if images._conditional else 0)
    shapes: dict[str, tuple[int, ...]] = {"classes.embedding": (classes, EMBEDDING)} if images._conditional else {}
    shapes |= {"first.weight": (maps[0] * rows * columns, inputs), "first.bias": (maps[0] * rows * columns,)}
    shapes |= {"first_norm.scale": (maps[0],), "first_norm.shift": (maps[0],)}
    for number, (before, behind) in enumerate(zip([maps[0], *maps], maps, strict=False)):
        shapes |= {f"doubling{number}.weight": (behind, before, 3, 3)}
        shapes |= {f"doubling{number}.scale": (behind,), f"doubling{number}.shift": (behind,)}
    return {**shapes, "colours.weight": (channels, maps[-1], 3, 3), "colours.bias": (channels,)}


def generated(
    weights: Mapping[str, Tensor],
    latents: Tensor,
    labels: Tensor | None,
    size: tuple[int, int, int],
    precision: torch.dtype,
) -> Tensor:
    """The images `(N, *size)` in [0, 1] of latent vectors `(N, latent)`, and of their classes `(N,)` where these count;
    convolutions and the linear layer run in `precision`.
    """
    _, height, width = size
    doublings = _doublings(height, width)
    rows, columns = (-(-side // 2**doublings) for side in (height, width))
    vectors = latents if labels is None else torch.cat([latents, weights["classes.embedding"][labels]], 1)
    with torch.autocast(latents.device.type, precision, enabled=precision != torch.float32):
        maps = F.linear(vectors, weights["first.weight"], weights["first.bias"]).view(len(latents), -1, rows, columns)
        maps = maps.contiguous(memory_format=torch.channels_last)
        maps = _normalised(maps, weights, "first_norm")
        for number in range(doublings):
            maps = convolved_doubled(maps, weights[f"doubling{number}.weight"])
            maps = F.leaky_relu(_normalised(maps, weights, f"doubling{number}"), LEAK)
        colours = F.conv2d(maps, weights["colours.weight"], weights["colours.bias"], padding=1)
    top, left = (rows * 2**doublings - height) // 2, (columns * 2**doublings - width) // 2
    return colours.float()[:, :, top : top + height, left : left + width].contiguous().sigmoid()


def convolved_doubled(maps: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(F.interpolate(maps, scale_factor=2), weight, padding=1)` of a 3 × 3 weight, as one transposed
    convolution: a pixel of the doubled maps sees four of the maps through nine weights, and their sums are 4 × 4.

    Both ways, of 128 maps of 16 × 16 from 128 to 64 channels, 144 ms in place of 449 in bf16 and 281 in place of 651 in
    fp32, on one core.
    """
    kernel = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
    kernel = kernel[..., 1:] + kernel[..., :-1]
    return F.conv_transpose2d(maps, kernel, stride=2, padding=1)


def _normalised(maps: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """BatchNorm by the statistics of the batch at hand, and no others."""
    scale, shift = weights[f"{name}.scale"], weights[f"{name}.shift"]
    return F.batch_norm(maps, None, None, scale, shift, training=True)
