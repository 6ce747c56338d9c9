"""Images that a generator renders from latent vectors; with `learn_latents` the vectors are trained, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress.machine.device import PRECISIONS
from dfcompress.machine.execution import Execution, maybe_compiled
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.images import ParameterGroup, PixelStatistics

# The first maps have at most this many pixels a side, and are doubled at least this often: 8 → 16 → 32, 7 → 14 → 28, 7
# → … → 224. At 32 pixels this is the generator of Fang 2021's code.
SMALLEST_MAP, FEWEST_DOUBLINGS = 8, 2
# Maximum number of channels of any map, as a multiple of the last map's channels, as in DCGAN.
WIDEST = 8
LEAK = 0.2
# Standard deviation of initial weights, as stated for DCGAN.
STD = 0.02
EMBEDDING = 64


class Generator:
    """A DCGAN-style generator (as coded by Fang 2021): a linear layer to small maps, then doublings, each a 3 × 3
    convolution of the enlarged maps, and a convolution to the colours. Between them are BatchNorm with the present
    batch's statistics and LeakyReLU; a sigmoid at the end keeps images in [0, 1].

    A latent vector z has `latent` numbers from N(0, 1). The last maps have `width` channels, the maps before them twice
    as many and so on. With `conditional`, a learnt vector of the image's class is concatenated to z. With
    `learn_latents`, the vectors of a batch are optimised, too, at the learning rate `latent_lr` or, if None, the
    phase's. A `persistent` generator continues to learn from batch to batch; with `fresh_noise`, its first layer is
    drawn anew for every batch, so that the same maps are mixed in another way (after Tran 2024, whose noise enters in
    this way). A generator that is not persistent begins every batch with new weights.
    Images of a size that no doubling reaches are the centre of larger ones.
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
        # Vectors and classes by batch size, because batches for a student may differ in size from optimised batches.
        self._batches: dict[int, tuple[Tensor, Tensor]] = {}
        self._generated: Callable[..., Tensor] = generated
        self._precision = torch.float32

    def compute_as(self, execution: Execution) -> None:
        """Render in the precision of `execution`, and compiled if it compiles."""
        self._precision = PRECISIONS[execution.precision]
        self._generated = maybe_compiled(generated, execution)

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Draw a batch's vectors, and the weights unless they persist; drawn tensors stay in the same memory."""
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
        self._latents.detach().copy_(latents, non_blocking=True)
        self._labels.copy_(labels)
        self._mean, self._std = teacher.mean, teacher.std

    def _draw_weights(self, generator: torch.Generator, part: str) -> None:
        """Initialise the tensors whose names start with `part`."""
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
        """The weights at the phase's learning rate, and the vectors if they are learnt."""
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
        """Nothing to do: a sigmoid keeps images in range."""

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, latent vectors, and the classes of the batch."""
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        return {**weights, "latents": self._latents.detach(), "labels": self._labels}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a `state_dict` into these."""
        for name, tensor in {**self._weights, "latents": self._latents, "labels": self._labels}.items():
            tensor.copy_(state[name])


def _doublings(height: int, width: int) -> int:
    """Number of doublings after which maps are as large as images."""
    doublings = FEWEST_DOUBLINGS
    while max(height, width) > SMALLEST_MAP << doublings:
        doublings += 1
    return doublings


def _shapes(images: Generator, channels: int, height: int, width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights by name, in order of use."""
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
    """The images `(N, *size)` in [0, 1] of latent vectors `(N, latent)` and, for a conditional generator, of classes
    `labels` `(N,)`; convolutions and the linear layer run in `precision`.
    """
    _, height, width = size
    doublings = _doublings(height, width)
    rows, columns = (-(-side // 2**doublings) for side in (height, width))
    vectors = latents if labels is None else torch.cat([latents, _embedded(labels, weights["classes.embedding"])], 1)
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


def _embedded(labels: Tensor, embedding: Tensor) -> Tensor:
    """The rows of `embedding` `(classes, width)` for labels `(N,)`, as a product: the gradient of an index adds up rows
    by atomic operations on CUDA if compiled, so its bits would depend on the order of threads.
    """
    classes = torch.arange(len(embedding), device=labels.device)
    return (labels[:, None] == classes).to(embedding.dtype) @ embedding


def convolved_doubled(maps: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(F.interpolate(maps, scale_factor=2), weight, padding=1)` of a 3 × 3 weight, as one transposed
    convolution: a pixel of the result depends on four pixels of `maps` through nine weights, whose sums form a 4 × 4
    kernel.

    Forward and backward of 128 inputs of 16 × 16 pixels from 128 to 64 channels take, on one core, 144 ms instead of
    449 ms in bf16 and 281 ms instead of 651 ms in fp32.
    """
    kernel = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
    kernel = kernel[..., 1:] + kernel[..., :-1]
    return F.conv_transpose2d(maps, kernel, stride=2, padding=1)


def _normalised(maps: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """BatchNorm with the statistics of the present batch alone."""
    scale, shift = weights[f"{name}.scale"], weights[f"{name}.shift"]
    return F.batch_norm(maps, None, None, scale, shift, training=True)
