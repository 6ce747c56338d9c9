"""Means and covariances of a stream of vectors, in one pass and in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


class StreamingMoments:
    """Mean and covariance of vectors `(N, units)`, separately for each class.

    The covariance is stored in consecutive equal blocks of up to `block` units (the last padded with zeros), because
    the full covariance of many units does not fit into memory: `block` = `units` is the full covariance, 1 the
    variances. Batches are merged by the update of Chan, Golub & LeVeque (1983), which loses no digits to large means.
    """

    def __init__(self, classes: int, units: int, block: int) -> None:
        self.classes, self.units = classes, units
        self.blocks, self.block = blocks_of(units, block)
        padded = self.blocks * self.block
        self.count = torch.zeros(classes, dtype=torch.float64)
        self._mean = torch.zeros(classes, padded, dtype=torch.float64)
        # Sums of products of deviations.
        self._scatter = torch.zeros(classes, self.blocks, self.block, self.block, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """The mean `(classes, units)`, float64."""
        return self._mean[:, : self.units]

    @property
    def variance(self) -> Tensor:
        """The unbiased variance `(classes, units)`, float64."""
        sums = self._scatter.diagonal(dim1=2, dim2=3).flatten(1)[:, : self.units]
        return sums / (self.count - 1)[:, None]

    def covariance(self, label: int) -> Tensor:
        """The unbiased covariance of one class, `(blocks, block, block)`, float64; needs two vectors of the class."""
        return self._scatter[label] / (self.count[label] - 1)

    def update(self, vectors: Tensor, labels: Tensor | None = None) -> None:
        """Add `vectors` `(N, units)` of the classes `labels` `(N,)`, or without labels all to class 0."""
        padded = F.pad(vectors, (0, self.blocks * self.block - self.units))
        if labels is None:
            self._add(0, padded)
        else:
            for label in labels.unique().tolist():
                self._add(label, padded[labels == label])

    def _add(self, label: int, vectors: Tensor) -> None:
        values = vectors.double()
        mean = values.mean(0)
        deviations = (values - mean).view(len(values), self.blocks, self.block)
        if self.block == 1:
            scatter = deviations.square().sum(0)[..., None]
        else:
            scatter = deviations.transpose(0, 1).mT @ deviations.transpose(0, 1)
        self._merge(label, len(values), mean, scatter)

    def state(self) -> dict[str, Tensor]:
        """Everything that `merge` needs."""
        return {"count": self.count, "mean": self._mean, "scatter": self._scatter}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the `state` of another process."""
        for label, count in enumerate(state["count"].tolist()):
            if count:
                self._merge(label, count, state["mean"][label], state["scatter"][label])

    def _merge(self, label: int, count: float, mean: Tensor, scatter: Tensor) -> None:
        before = float(self.count[label])
        total = before + count
        step = mean - self._mean[label]
        blocks = step.view(self.blocks, self.block)
        self._scatter[label] += scatter
        self._scatter[label].baddbmm_(blocks[:, :, None], blocks[:, None, :], alpha=before * count / total)
        self._mean[label] += step * (count / total)
        self.count[label] = total


def blocks_of(units: int, block: int) -> tuple[int, int]:
    """The number of blocks of up to `block` units, and the size of each if all are equally large."""
    count = -(-units // min(units, block))
    return count, -(-units // count)


def states(moments: Mapping[str, StreamingMoments]) -> dict[str, Tensor]:
    """The states of several moments as one dict of tensors."""
    return {f"{name}.{part}": tensor for name, of_layer in moments.items() for part, tensor in of_layer.state().items()}


def merge_states(moments: Mapping[str, StreamingMoments], state: Mapping[str, Tensor]) -> None:
    """Add the result of `states` from another process."""
    for name, of_layer in moments.items():
        of_layer.merge({part: state[f"{name}.{part}"] for part in of_layer.state()})
