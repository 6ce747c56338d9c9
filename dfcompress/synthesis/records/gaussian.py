"""Gaussian records (Lopes et al. 2017, section 3.1.1 and 3.1.2): mean and covariance of layers' outputs for each class.

`top-layer` stores the logits alone, `all-layers` the outputs of every weighted layer, before the activation function.
Logits are divided by the temperature (8), which only sets their weight relative to the other layers. The paper leaves
open whether classes are kept apart; the authors' code keeps them apart, and so do we, unless they are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput, DfcompressError
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_outputs
from dfcompress.models.recorder import DROPOUTS, LOGITS, outputs_of_one_image
from dfcompress.models.trace import Target
from dfcompress.synthesis.records import FIXED_DROPOUT
from dfcompress.synthesis.records.accumulator import RecordSettings
from dfcompress.synthesis.records.moments import StreamingMoments, blocks_of, merge_states, states
from dfcompress.synthesis.records.record_file import Expected, Record, require_memory, tensor_bytes
from dfcompress.synthesis.records.targets import BatchTargets

AUTO_RECORD_BYTES = 256 * 2**20
# Numbers of blocks into which `--covariance auto` divides the largest layer, tried until the record is at most
# `AUTO_RECORD_BYTES`.
PARTS = [1, *(parts * 2**power for power in range(16) for parts in (2, 3))]
LESS = "Use a smaller --covariance (block:N or diagonal), --class-independent, fewer --layers, or --kind top-layer."
JITTER = [10.0**exponent for exponent in range(-10, 1)]


class GaussianAccumulator:
    """Sums of layers' outputs for each class; `outputs` holds one image's outputs `(1, ...)` by layer.

    Raises `BadInput` if the requested covariance does not fit into memory.
    """

    flat = True

    def __init__(self, outputs: Mapping[str, Tensor], settings: RecordSettings, classes: int) -> None:
        self.settings = settings
        self.units = {layer: output[0].numel() for layer, output in outputs.items()}
        self._classes = 1 if settings.class_independent else classes
        self.block = self._block()
        self.bytes = tensor_bytes(self.expected)
        self.memory_bytes = self._memory_bytes(self.block)

    @property
    def covariance(self) -> str:
        """The form of the covariance, as `--covariance` takes it."""
        if self.block >= max(self.units.values()):
            return "full"
        return "diagonal" if self.block == 1 else f"block:{self.block}"

    @property
    def expected(self) -> Expected:
        """The types and shapes of the tensors to store, by name."""
        return expected_tensors(self.units, self._classes, self.block)

    def _block(self) -> int:
        """The requested block size, or with `auto` the largest whose record is small enough."""
        largest = max(self.units.values())
        fixed = {"full": largest, "diagonal": 1, "auto": None}.get(self.settings.covariance, self.settings.block)
        if fixed is None:
            candidates = [-(-largest // parts) for parts in PARTS if parts < largest]
            sizes = {block: tensor_bytes(expected_tensors(self.units, self._classes, block)) for block in candidates}
            fixed = next((block for block, size in sizes.items() if size <= AUTO_RECORD_BYTES), 1)
        require_memory(f"Summing up {sum(self.units.values()):,} units", self._memory_bytes(fixed), LESS)
        return fixed

    def _memory_bytes(self, block: int) -> int:
        """Bytes of the sums, and of the work on the blocks of one class."""
        shapes = [blocks_of(units, block) for units in self.units.values()]
        squares = [blocks * side * side for blocks, side in shapes]
        return 8 * (self._classes * (sum(self.units.values()) + sum(squares)) + 4 * max(squares))

    @cached_property
    def _moments(self) -> dict[str, StreamingMoments]:
        return {layer: StreamingMoments(self._classes, units, self.block) for layer, units in self.units.items()}

    def update(self, outputs: Sequence[Tensor], labels: Tensor, numbers: Tensor) -> None:
        """Add the layers' outputs `(N, units)`."""
        for (layer, moments), output in zip(self._moments.items(), outputs, strict=True):
            tempered = output / self.settings.temperature if layer == LOGITS else output
            moments.update(tempered, None if self.settings.class_independent else labels)

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return states(self._moments)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums of another process."""
        merge_states(self._moments, state)

    def tensors(self) -> dict[str, Tensor]:
        """By layer, `mean.<layer>` `(classes, units)` and `factor.<layer>` `(classes, blocks, block·(block + 1)/2)`,
        the lower triangles of the covariance's Cholesky factors; fp32.
        """
        tensors: dict[str, Tensor] = {}
        for layer, moments in self._moments.items():
            rows, columns = torch.tril_indices(moments.block, moments.block)
            triangles = [
                cholesky(moments.covariance(label))[:, rows, columns].float() for label in range(moments.classes)
            ]
            tensors |= {f"mean.{layer}": moments.mean.float(), f"factor.{layer}": torch.stack(triangles)}
        return tensors

    def details(self) -> dict[str, Any]:
        """The temperature, whether classes are pooled, and the form of the covariance."""
        return {
            "temperature": self.settings.temperature,
            "pooled": self.settings.class_independent,
            "covariance": self.covariance,
        }

    def notices(self) -> list[str]:
        """A sentence that states the form of the covariance."""
        return [f"Covariance of {sum(self.units.values()):,} units: {self.covariance}."]


def cholesky(covariance: Tensor) -> Tensor:
    """Lower Cholesky factors of covariances `(blocks, n, n)`, which are changed in place.

    Units with constant output, or fewer images than units, make a covariance singular: a growing share of its mean
    variance, from 1e-10 up, is added to the diagonal until the factorisation succeeds. Raises `DfcompressError` if it
    never does.
    """
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    unit = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    for share in JITTER:
        diagonal += share * unit
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed.any():
            return factor
    raise DfcompressError("A covariance cannot be factored.", "Use --covariance diagonal.")


def expected_tensors(units: Mapping[str, int], classes: int, block: int) -> Expected:
    """Types and shapes, by name, of the tensors that are stored for layers of `units` units each."""
    shapes: Expected = {}
    for layer, count in units.items():
        blocks, side = blocks_of(count, block)
        shapes[f"mean.{layer}"] = (torch.float32, (classes, count))
        shapes[f"factor.{layer}"] = (torch.float32, (classes, blocks, side * (side + 1) // 2))
    return shapes


class GaussianLayer:
    """The Gaussian of one layer for each class, read from a record's tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], layer: str) -> None:
        self._mean, self._triangles = tensors[f"mean.{layer}"], tensors[f"factor.{layer}"]
        self.classes, self.units = self._mean.shape
        self.blocks = self._triangles.shape[1]
        self.block = int((2 * self._triangles.shape[2] + 0.25) ** 0.5)

    def sample(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """A random vector for each of the classes `labels` `(N,)`, as `(N, units)`; pooled records ignore the class."""
        labels = labels if self.classes > 1 else torch.zeros_like(labels)
        noise = torch.randn(len(labels), self.blocks, self.block, generator=random)
        rows, columns = torch.tril_indices(self.block, self.block)
        factor = torch.zeros(self.blocks, self.block, self.block)
        vectors = torch.empty(len(labels), self.units)
        for label in labels.unique().tolist():
            factor[:, rows, columns] = self._triangles[label]
            of_label = labels == label
            deviations = torch.einsum("bij,nbj->nbi", factor, noise[of_label]).flatten(1)
            vectors[of_label] = self._mean[label] + deviations[:, : self.units]
        return vectors


def require_gaussians(record: Record, teacher: Classifier) -> None:
    """Raise `BadInput` if a record does not fit the network."""
    about = record.about
    outputs = outputs_of_one_image(teacher)
    if unknown := [layer for layer in about.layers if layer not in outputs]:
        raise BadInput(f"{record.path} knows a layer {unknown[0]!r}, which {teacher.name} has not.", "Record again.")
    units = {layer: outputs[layer][0].numel() for layer in about.layers}
    settings = RecordSettings(kind=about.kind, covariance=about.covariance)
    block = {"full": max(units.values()), "diagonal": 1}.get(about.covariance, settings.block or 0)
    record.require(expected_tensors(units, 1 if about.pooled else len(about.class_counts), block))
    if about.kind == FIXED_DROPOUT:
        dropouts(teacher)


class GaussianSampler:
    """Draws targets from a Gaussian record, and dropout filters if the record was made with fixed ones."""

    def __init__(self, record: Record, teacher: Classifier) -> None:
        about = record.about
        self.layers = about.layers
        self.fixes_dropout = about.kind == FIXED_DROPOUT
        # Records hold logits divided by the temperature; targets are for undivided logits.
        self._scales = [torch.tensor(1 / about.temperature if layer == LOGITS else 1.0) for layer in self.layers]
        self._gaussians = [GaussianLayer(record.tensors, layer) for layer in self.layers]
        self._dropouts = dropouts(teacher) if self.fixes_dropout else []

    def sample(self, labels: Tensor, random: torch.Generator) -> BatchTargets:
        """Targets for every layer, each layer drawn independently, and a filter for every dropout layer."""
        targets = {
            layer: Target(gaussian.sample(labels, random) / scale, scale)
            for layer, gaussian, scale in zip(self.layers, self._gaussians, self._scales, strict=True)
        }
        return BatchTargets(targets, tuple(_filter(*each, len(labels), random) for each in self._dropouts))


def _filter(shape: tuple[int, ...], rate: float, count: int, random: torch.Generator) -> Tensor:
    """One filter for the whole batch, as in training; kept values are multiplied by 1 / (1 − rate)."""
    kept = torch.rand(shape, generator=random) >= rate
    return (kept / max(1 - rate, torch.finfo(torch.float32).tiny)).expand(count, *shape)


@torch.no_grad()
def dropouts(teacher: Classifier) -> list[tuple[tuple[int, ...], float]]:
    """The shape of one image's filter and the dropout rate of every dropout layer, in the order of the forward pass.

    Dropout of channels has one value per channel. Raises `BadInput` if the network has no dropout layer.
    """
    seen: list[tuple[tuple[int, ...], float]] = []

    layers = {name: module for name, module in teacher.network.named_modules() if isinstance(module, DROPOUTS)}

    def note(name: str, output: Tensor) -> None:
        layer, shape = layers[name], tuple(output.shape[1:])
        seen.append((shape if type(layer) is nn.Dropout else (shape[0], *[1] * (len(shape) - 1)), layer.p))

    with hooked_outputs(teacher.network, layers, note):
        pass_once(teacher)
    if not seen:
        raise BadInput(f"{teacher.name} has no dropout layer whose filters could be fixed.", "Use --kind all-layers.")
    return seen
