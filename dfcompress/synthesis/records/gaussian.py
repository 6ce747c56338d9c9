"""Gaussian records (Lopes et al. 2017, section 3.1.1 and 3.1.2): a mean and a covariance of layers' outputs a class.

`top-layer` keeps the logits alone, `all-layers` the outputs of every weighted layer, before the activation function.
Logits are divided by the temperature (8), which only sets how much they count against the other layers.
The paper leaves open whether classes are kept apart; the authors' code does, and so do we, unless they are pooled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.models.recorder import LOGITS
from dfcompress.synthesis.records.keeping import Keeping
from dfcompress.synthesis.records.moments import StreamingMoments, merge_states, states

# Where `--covariance auto` stops: the record's bytes, and the share of the machine's memory for the sums.
AUTO_RECORD_BYTES = 256 * 2**20
MEMORY_SHARE = 0.5
BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
FIRST_JITTER = 1e-10


class GaussianKeeper:
    """Sums of layers' outputs, class by class; `outputs` `(1, ...)` are those of one image, by layer.

    Raises `BadInput` where the covariance that was asked for does not fit into memory.
    """

    flat = True

    def __init__(self, outputs: Mapping[str, Tensor], keeping: Keeping, classes: int) -> None:
        self.keeping = keeping
        self.units = {layer: output[0].numel() for layer, output in outputs.items()}
        self._classes = 1 if keeping.pooled else classes
        self.block = self._block()
        self.bytes, self.memory_bytes = self._bytes(self.block), self._memory_bytes(self.block)
        self._moments: dict[str, StreamingMoments] = {}

    @property
    def covariance(self) -> str:
        """As `--covariance` takes it."""
        if self.block >= max(self.units.values()):
            return "full"
        return "diagonal" if self.block == 1 else f"block:{self.block}"

    def _block(self) -> int:
        """The block that was asked for, or the largest that suits."""
        memory = MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        largest = max(self.units.values())
        fixed = {"full": largest, "diagonal": 1, "auto": None}.get(self.keeping.covariance, self.keeping.block)
        if fixed is None:
            candidates = (largest, *(block for block in BLOCKS if block < largest))
            fixed = next((block for block in candidates if self._bytes(block) <= AUTO_RECORD_BYTES), 1)
        if (needed := self._memory_bytes(fixed)) > memory:
            raise BadInput(
                f"Summing up {sum(self.units.values()):,} units takes {needed / 2**30:,.1f} GiB, more than half of this"
                " machine's memory.",
                "Use a smaller --covariance (block:N or diagonal), --pooled, fewer --layers, or --kind top-layer.",
            )
        return fixed

    def _bytes(self, block: int) -> int:
        return 4 * self._numbers(block, lambda side: side * (side + 1) // 2)

    def _memory_bytes(self, block: int) -> int:
        return 8 * self._numbers(block, lambda side: side * side)

    def _numbers(self, block: int, of_block: Any) -> int:
        blocks = {layer: -(-units // min(units, block)) for layer, units in self.units.items()}
        return self._classes * sum(n + blocks[layer] * of_block(min(n, block)) for layer, n in self.units.items())

    def update(self, outputs: Sequence[Tensor], labels: Tensor, numbers: Tensor) -> None:
        """Take in the layers' outputs `(N, units)`."""
        for (layer, units), output in zip(self.units.items(), outputs, strict=True):
            if layer not in self._moments:
                self._moments[layer] = StreamingMoments(self._classes, units, self.block)
            tempered = output / self.keeping.temperature if layer == LOGITS else output
            self._moments[layer].update(tempered, None if self.keeping.pooled else labels)

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return states(self._moments)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums of another process."""
        merge_states(self._moments, state)

    def tensors(self) -> dict[str, Tensor]:
        """`mean.<layer>` `(classes, units)`, and in `factor.<layer>` the lower triangles of the covariance's Cholesky
        factors `(classes, blocks, block·(block + 1)/2)`; fp32.
        """
        kept: dict[str, Tensor] = {}
        for layer, own in self._moments.items():
            rows, columns = torch.tril_indices(own.block, own.block)
            triangles = [cholesky(own.covariance(label))[:, rows, columns].float() for label in range(own.classes)]
            kept |= {f"mean.{layer}": own.mean.float(), f"factor.{layer}": torch.stack(triangles)}
        return kept

    def details(self) -> dict[str, Any]:
        """Temperature, whether classes are pooled, and the form of the covariance."""
        return {
            "temperature": self.keeping.temperature,
            "pooled": self.keeping.pooled,
            "covariance": self.covariance,
        }

    def notices(self) -> list[str]:
        """What form the covariance has."""
        return [f"Covariance of {sum(self.units.values()):,} units: {self.covariance}."]


def cholesky(covariance: Tensor) -> Tensor:
    """Lower factors of covariances `(blocks, n, n)`.

    Units that are always the same, or fewer images than units, leave a covariance singular: the smallest share of the
    mean variance that suffices, from 1e-10 up, is added to the diagonal.
    """
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    unit = diagonal.mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    share = FIRST_JITTER
    while True:
        added = torch.diag_embed((unit * share)[:, None].expand_as(diagonal))
        factor, failed = torch.linalg.cholesky_ex(covariance + added)
        if not failed.any():
            return factor
        share *= 10


class GaussianLayer:
    """The Gaussian of one layer, class by class, as a record keeps it."""

    def __init__(self, tensors: Mapping[str, Tensor], layer: str) -> None:
        self._mean, self._triangles = tensors[f"mean.{layer}"], tensors[f"factor.{layer}"]
        self.classes, self.units = self._mean.shape
        self.blocks = self._triangles.shape[1]
        self.block = int((2 * self._triangles.shape[2] + 0.25) ** 0.5)

    def sample(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """A vector `(N, units)` for each of the classes `labels` `(N,)`, whatever the class where they are pooled."""
        labels = labels if self.classes > 1 else torch.zeros_like(labels)
        noise = torch.randn(len(labels), self.blocks, self.block, generator=random)
        rows, columns = torch.tril_indices(self.block, self.block)
        factor = torch.zeros(self.blocks, self.block, self.block)
        vectors = torch.empty(len(labels), self.units)
        for label in labels.unique().tolist():
            factor[:, rows, columns] = self._triangles[label]
            own = labels == label
            deviations = torch.einsum("bij,nbj->nbi", factor, noise[own]).flatten(1)
            vectors[own] = self._mean[label] + deviations[:, : self.units]
        return vectors
