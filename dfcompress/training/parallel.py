"""Training of one student by several processes: every batch is divided among them, and gradients and BatchNorm
statistics are computed over the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.distributed import World, world
from dfcompress.errors import BadInput
from dfcompress.machine.device import collective_backend, identity
from dfcompress.models.plain_layers import BATCHNORMS


def require_shares(share: int, everyone: World) -> None:
    """Raise `BadInput` where `share`, the images of each set in a batch, cannot be divided equally among processes."""
    if share % everyone.world_size:
        raise BadInput(
            f"{share} images of each set in a batch do not divide among {everyone.world_size} processes.",
            f"Use --train-batch-size and --images so that {everyone.world_size} divides them.",
        )


def require_plain(network: nn.Module, everyone: World) -> None:
    """Raise `BadInput` where several processes would train a BatchNorm of a class that is not torch's own: such a layer
    may do more than normalise.
    """
    for module in network.modules():
        if everyone.world_size > 1 and isinstance(module, _BatchNorm) and type(module) not in BATCHNORMS:
            name = type(module).__name__
            raise BadInput(f"A {name} cannot be trained by several processes.", "Train this student in one process.")


def replicated(module: nn.Module, everyone: World) -> nn.Module:
    """The module itself for one process; for several, a replica whose gradients are averaged over the processes."""
    if everyone.world_size == 1:
        return module
    device = identity(next(module.parameters()).device)
    everyone.init_process_group(collective_backend(everyone.all_gather(device)))
    # Every step uses the same parameters, so no step waits for unused ones (of an auxiliary head).
    replica = nn.parallel.DistributedDataParallel(module, static_graph=True)
    # Buffers are equal in all processes already: the statistics are computed over the whole batch.
    replica.broadcast_buffers = False
    return replica


def mean(values: Tensor, everyone: World) -> Tensor:
    """The mean of `values` over the processes; with several, `values` itself is overwritten by the sum."""
    if everyone.world_size == 1:
        return values
    distributed.all_reduce(values)
    return values / everyone.world_size


@contextmanager
def synchronised(network: nn.Module, everyone: World) -> Iterator[None]:
    """Inside, BatchNorms in training mode use the statistics of the whole batch, also where several processes share it.

    Raises `BadInput` where `require_plain` does.
    """
    require_plain(network, everyone)
    layers = (
        [module for module in network.modules() if isinstance(module, _BatchNorm)] if everyone.world_size > 1 else []
    )
    classes = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = _SynchronisedBatchNorm
    try:
        yield
    finally:
        for layer, before in zip(layers, classes, strict=True):
            layer.__class__ = before


class _SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm over the images of all processes, each of which has the same number of images (torch's SyncBatchNorm
    works on CUDA alone).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept every shape: the layer's original class decides the shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise features `(N, C, ...)`."""
        if not self.training:
            return super().forward(input)
        features, axes = input.float(), [0, *range(2, input.dim())]
        shape = (1, -1, *[1] * (input.dim() - 2))
        count = world().world_size * features.numel() // features.shape[1]
        centre = _Mean.apply(features.mean(axes))
        errors = features - centre.view(shape)
        var = _Mean.apply(errors.square().mean(axes))
        self._remember(centre.detach(), var.detach() * count / max(1, count - 1))
        normal: Tensor = errors * (var + self.eps).rsqrt().view(shape)
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
    """The mean over the processes; the backward pass averages the gradients over the processes too."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        return mean(values.clone(), world())

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> Tensor:
        return mean(gradients[0].clone(), world())
