"""The units of a network as one graph, weighted by the network's own weights, and its Fourier basis.

Vertices are the outputs of recorded layers. An edge joins two units if one reaches the other without passing a third
recorded layer, with activation functions replaced by the identity and maximum pooling by average pooling; its weight is
the change of one unit per unit change of the other. Units of the first layer that read the same pixels are joined, too,
by the sum over pixels of the products of their weights: without these edges, most of the first layer's activity is in
the kernel of the adjacency matrix and has no frequency at all.

Such a graph is directed and without cycles, so its adjacency matrix A is nilpotent and has no basis of eigenvectors.
The Fourier basis here consists of the eigenvectors of A + Aᵀ (Sandryhaila & Moura 2013 for undirected graphs): it is
orthonormal, so the transform preserves energy and its inverse is the transpose.

A record does not contain the basis, so another machine must find the same basis. Everything is therefore in float64,
and every unit has a loop of a different weight, up to a millionth, to separate vectors that would otherwise share an
eigenvalue.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.models.hooks import hook_outputs
from dfcompress.models.recorder import LOGITS, outputs_of_one_image

FULL_BASIS_UNITS = 8000
LEADING_VECTORS = 1024
SIGNALS_A_PASS = 512
NUMBERS_A_PASS = 2**24
LOOPS = 1e-6

_ACTIVATIONS = {
    torch.relu,
    torch.relu_,
    F.relu,
    F.relu6,
    F.hardtanh,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.hardswish,
    F.softplus,
    torch.sigmoid,
    torch.tanh,
    Tensor.relu,
    Tensor.relu_,
    Tensor.sigmoid,
    Tensor.tanh,
}


class _Linearised(TorchFunctionMode):
    """Replaces activation functions by the identity, and maximum pooling by average pooling."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _ACTIVATIONS:
            return args[0]
        if function in (torch.max_pool2d, F.max_pool2d):
            return _average(*args, **kwargs)
        return function(*args, **kwargs)


def _average(
    features: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    return F.avg_pool2d(features, kernel_size, stride or kernel_size, padding, ceil_mode)


class WeightGraph:
    """The graph of `layers`, in the order of the forward pass; a signal on it is their concatenated outputs.

    Raises `BadInput` if layers are joined by anything nonlinear except activations and pooling.
    """

    def __init__(self, teacher: Classifier, layers: Sequence[str]) -> None:
        self.network = copy.deepcopy(teacher.network).cpu().double().eval().requires_grad_(False)
        self._shape = teacher.card.input_size
        self._layers = list(layers)
        self._injected: dict[str, Tensor] = {}
        self._computed: dict[str, Tensor] = {}
        hook_outputs(self.network, [name for name in self._layers if name != LOGITS], self._replace)
        self._offset = self._forward({}, self._dark(1))
        self.sizes = [output.shape[1] for output in self._offset]
        self.units = sum(self.sizes)
        everything = sum(output.numel() for output in outputs_of_one_image(teacher).values())
        self._signals_a_pass = max(1, min(SIGNALS_A_PASS, NUMBERS_A_PASS // everything))
        self._check_linear()

    def _dark(self, count: int) -> Tensor:
        return torch.zeros(count, *self._shape, dtype=torch.float64)

    def _replace(self, name: str, output: Tensor) -> Tensor:
        """The tensor that replaces a layer's output: a separate one, so that the output needs no copy."""
        self._computed[name] = output.flatten(1)
        injected = self._injected.get(name)
        return output * 0 if injected is None else injected.view(-1, *output.shape[1:]).clone()

    def _forward(self, injected: dict[str, Tensor], images: Tensor) -> list[Tensor]:
        """The outputs that every layer computes from `images` and from the `injected` outputs of earlier layers."""
        self._injected = injected
        with _Linearised():
            self._computed[LOGITS] = self.network(images).flatten(1)
        return [self._computed[name] for name in self._layers]

    def _linear(self, signals: Tensor, images: Tensor) -> Tensor:
        """A·signals plus the contribution of `images`, `(B, units)`."""
        parts = dict(zip(self._layers, signals.split(self.sizes, 1), strict=True))
        computed = self._forward(parts, images)
        return torch.cat([values - offset for values, offset in zip(computed, self._offset, strict=True)], 1)

    def shift(self, signals: Tensor) -> Tensor:
        """(A + Aᵀ)·signals, including the edges of common pixels, `(B, units)` → `(B, units)`, float64."""
        sources = signals.clone().requires_grad_(True)
        images = self._dark(len(signals)).requires_grad_(True)
        onwards = self._linear(sources, images)
        back, pixels = torch.autograd.grad(onwards, (sources, images), grad_outputs=signals)
        with torch.no_grad():
            common = self._linear(torch.zeros_like(signals), pixels)
        return onwards.detach() + back + common

    def neighbours(self) -> list[tuple[int, int]]:
        """Pairs of layers that an edge joins, as indices in the order of the forward pass."""
        random = torch.Generator().manual_seed(0)
        pairs = []
        for source, size in enumerate(self.sizes):
            signal = torch.zeros(1, self.units, dtype=torch.float64)
            first = sum(self.sizes[:source])
            signal[:, first : first + size] = torch.randn(1, size, generator=random)
            with torch.no_grad():
                reached = self._linear(signal, self._dark(1)).split(self.sizes, 1)
            pairs += [(source, place) for place, part in enumerate(reached) if part.abs().max() > 1e-9]
        return pairs

    def places(self, layers: Sequence[int]) -> Tensor:
        """The indices in a signal of the units of some layers."""
        starts = np.cumsum([0, *self.sizes])
        return torch.cat([torch.arange(starts[layer], starts[layer + 1]) for layer in layers])

    def basis(self, places: Tensor) -> Tensor:
        """Eigenvectors `(vectors, len(places))` of the graph of the units at `places`, in decreasing order of absolute
        eigenvalue; fp32.

        All eigenvectors for up to 8,000 units, the leading 1,024 for more.
        """
        units = len(places)
        loops = self._loops(places)
        if units > FULL_BASIS_UNITS:
            return self._leading(places, loops)
        identity = torch.eye(units, dtype=torch.float64)
        rows = [self._restricted(part, places, loops) for part in identity.split(self._signals_a_pass)]
        matrix = torch.cat(rows)
        values, vectors = torch.linalg.eigh((matrix + matrix.T).div_(2))
        order = values.abs().argsort(descending=True, stable=True)
        basis: Tensor = vectors.T[order].float().contiguous()
        return basis

    def _restricted(self, signals: Tensor, places: Tensor, loops: Tensor) -> Tensor:
        whole = torch.zeros(len(signals), self.units, dtype=torch.float64)
        whole[:, places] = signals
        return self.shift(whole)[:, places] + loops * signals

    def _loops(self, places: Tensor) -> Tensor:
        """Weights of the loops, `(len(places),)`: up to a millionth of the matrix's norm, by a random signal."""
        signal = torch.randn(1, len(places), generator=torch.Generator().manual_seed(0)).double()
        norm: Tensor = self._restricted(signal, places, torch.zeros(1)).norm()
        return LOOPS * norm * torch.linspace(0, 1, len(places), dtype=torch.float64)

    def _leading(self, places: Tensor, loops: Tensor) -> Tensor:
        from scipy.sparse.linalg import LinearOperator, eigsh  # Slow to import, and seldom needed.

        units = len(places)

        def apply(vector: Any) -> Any:
            return self._restricted(torch.from_numpy(vector.reshape(1, -1)), places, loops)[0].numpy()

        operator = LinearOperator((units, units), matvec=apply, dtype=np.float64)
        start = torch.randn(units, generator=torch.Generator().manual_seed(0)).double().numpy()
        values, vectors = eigsh(operator, k=vectors_of(units), which="LM", v0=start)
        order = torch.from_numpy(np.abs(values)).argsort(descending=True, stable=True)
        return torch.from_numpy(vectors.T.copy())[order].float().contiguous()

    def _check_linear(self) -> None:
        """Raise `BadInput` unless shifting is linear, from the images on, and symmetric."""
        random = torch.Generator().manual_seed(0)
        first, second = torch.randn(2, 1, self.units, generator=random).double().unbind()
        image, other = torch.randn(2, 1, *self._shape, generator=random).double().unbind()
        with torch.no_grad():
            both = self._linear(first + second, image + other)
            apart = self._linear(first, image) + self._linear(second, other)
        symmetric = torch.allclose((first * self.shift(second)).sum(), (self.shift(first) * second).sum(), rtol=1e-4)
        if not symmetric or not torch.allclose(both, apart, rtol=0, atol=1e-6 * float(both.abs().max())):
            raise BadInput(
                "This network's layers are joined by more than linear maps, activations and pooling: it is no graph.",
                "Keep another kind of record.",
            )


def vectors_of(units: int) -> int:
    """Number of vectors in the basis of a graph of `units` units."""
    return units if units <= FULL_BASIS_UNITS else min(LEADING_VECTORS, units - 1)


def basis_memory_bytes(units: int) -> int:
    """Bytes that computing this basis takes: the matrix and its vectors several times, or the solver's vectors."""
    return 8 * units * (5 * units if units <= FULL_BASIS_UNITS else 5 * vectors_of(units))
