"""One student on several processes: every batch is shared out, and what comes of it is that of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.distributed import peers
from dfcompress.errors import BadInput


def require_shares(batch_size: int, sets: int) -> None:
    """Raise `BadInput` where a batch of so many sets cannot be shared out equally."""
    count = peers().count
    if batch_size % (sets * count):
        raise BadInput(
            f"Batches of {batch_size} images do not divide among {count} processes and {sets} sets of images.",
            f"Use a multiple of {sets * count} for --train-batch-size.",
        )


def replicated(module: nn.Module) -> nn.Module:
    """The module, whose gradients are averaged over the processes where there are several."""
    if peers().count == 1:
        return module
    peers().connect("nccl" if next(module.parameters()).is_cuda else "gloo")
    # Buffers are the same everywhere: statistics are those of the whole batch.
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    if peers().count == 1:
        return values
    distributed.all_reduce(values)
    return values / peers().count


@contextmanager
def synchronised(network: nn.Module) -> Iterator[None]:
    """Let BatchNorms in training mode use the statistics of the whole batch inside, where it is shared out."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)] if peers().count > 1 else []
    classes = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = _SynchronisedBatchNorm
    try:
        yield
    finally:
        for layer, own in zip(layers, classes, strict=True):
            layer.__class__ = own


class _SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm over the images of all processes, which have equally many (torch's own works on CUDA alone)."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Whatever its own class took."""

    def forward(self, input: Tensor) -> Tensor:
        """Features `(N, C, ...)`."""
        if not self.training:
            return super().forward(input)
        features, axes = input.float(), [0, *range(2, input.dim())]
        shape = (1, -1, *[1] * (input.dim() - 2))
        count = peers().count * features.numel() // features.shape[1]
        centre = _Mean.apply(features.mean(axes))
        errors = features - centre.view(shape)
        var = _Mean.apply(errors.square().mean(axes))
        self._remember(centre.detach(), var.detach() * count / max(1, count - 1))
        normal = errors * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _remember(self, centre: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(centre, share)
        self.running_var.lerp_(var, share)


class _Mean(torch.autograd.Function):
    """The mean over the processes, and of the gradients likewise."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        return mean(values.clone())

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> Tensor:
        return mean(gradients[0].clone())
