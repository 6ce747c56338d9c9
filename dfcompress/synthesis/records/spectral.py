"""Spectral records (Lopes et al. 2017, section 3.1.3): single activations, compressed on the graph of the weights.

An activation, the outputs of all layers for one training image, is a signal on a graph of the network's units
(`weight_graph.py`). Its deviation from the mean activation of its class is transformed to the graph's Fourier basis;
the largest coefficients (a share `keep`, 10 %) and their places are stored. `spectral-all` transforms all layers as one
graph, `spectral-pairs` each pair of layers that an edge joins, so that most layers are stored twice.

The authors' code implements no spectral objective, and the paper leaves the basis, the mean and the number of
activations open: those are ours. A record holds data of single examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.machine.process import threads
from dfcompress.models.classifier import Classifier
from dfcompress.models.trace import Target
from dfcompress.synthesis.records.accumulator import RecordSettings
from dfcompress.synthesis.records.moments import StreamingMoments, merge_states, states
from dfcompress.synthesis.records.record_file import Expected, Record, require_memory, tensor_bytes
from dfcompress.synthesis.records.targets import BatchTargets
from dfcompress.synthesis.records.weight_graph import (
    FULL_BASIS_UNITS,
    LEADING_VECTORS,
    WeightGraph,
    basis_memory_bytes,
    vectors_of,
)

SHARE_OF_DATA = 0.1
MEAN, LABEL = "mean", "label"
SAME_BASIS = 1e-2


class SpectralAccumulator:
    """Mean activations of the classes, and the activations of some images of each class.

    The activations of up to `per_class` images of each class are stored; the images are drawn with `random` from
    `labels` `(N,)`. There are fewer if the record would otherwise exceed a tenth of `data_bytes`. Raises `BadInput` if
    not even one activation per class fits, or if the basis does not fit into memory.
    """

    flat = True

    def __init__(
        self,
        teacher: Classifier,
        layers: Sequence[str],
        settings: RecordSettings,
        labels: Tensor,
        *,
        data_bytes: int,
        random: torch.Generator,
    ) -> None:
        self.settings, self.labels = settings, labels
        self.graph = WeightGraph(teacher, layers)
        self.parts = parts_of(self.graph, settings.kind)
        classes = teacher.card.classes
        self._sums = StreamingMoments(classes, self.graph.units, 1)
        largest_part = max(self.parts, key=lambda part: basis_memory_bytes(len(part)))
        require_basis_memory(largest_part)
        each = tensor_bytes(self._expected(1)) - tensor_bytes(self._expected(0))
        fixed = tensor_bytes(self._expected(0))
        fits = int((SHARE_OF_DATA * data_bytes - fixed) / (each * len(labels.unique())))
        if fits < 1:
            raise BadInput(
                f"One activation a class and the classes' means take over {SHARE_OF_DATA:.0%} of the data.",
                "Take another --kind, or fewer --layers.",
            )
        self.per_class = min(settings.per_class, fits)
        self._kept = random_subset(labels, self.per_class, random)
        self.bytes = tensor_bytes(self._expected(len(self._kept)))
        self.memory_bytes = (
            basis_memory_bytes(len(largest_part))
            + 16 * classes * self.graph.units
            + 8 * self.graph.units * len(self._kept)
        )
        self._numbers = [torch.zeros(0, dtype=torch.long)]
        self._examples = [torch.zeros(0, self.graph.units)]

    def _expected(self, examples: int) -> Expected:
        return expected_tensors(self.parts, self._sums.classes, self.graph.units, examples, self.settings.coefficients)

    def update(self, outputs: Sequence[Tensor], labels: Tensor, numbers: Tensor) -> None:
        """Add the layers' outputs `(N, units)`."""
        activations = torch.cat(list(outputs), 1)
        self._sums.update(activations, labels)
        wanted = torch.isin(numbers, self._kept)
        self._numbers.append(numbers[wanted])
        self._examples.append(activations[wanted])

    def state(self) -> dict[str, Tensor]:
        """The sums, and the chosen activations with their image numbers."""
        examples = {"numbers": torch.cat(self._numbers), "examples": torch.cat(self._examples)}
        return states({MEAN: self._sums}) | examples

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the state of another process."""
        merge_states({MEAN: self._sums}, state)
        self._numbers.append(state["numbers"])
        self._examples.append(state["examples"])

    def tensors(self) -> dict[str, Tensor]:
        """The classes' means `(classes, units)` and the label of each stored activation; for every part of the graph,
        the places and the values of the stored coefficients, `(N, kept)`, the values' scale `(1,)`, and a fingerprint
        of the basis `(vectors,)`.
        """
        numbers, order = torch.cat(self._numbers).sort()
        labels, activations = self.labels[numbers], torch.cat(self._examples)[order]
        means = self._sums.mean.float()
        tensors = {MEAN: means, LABEL: labels}
        for number, places in enumerate(self.parts):
            with threads(1):
                basis = self.graph.basis(places)
                coefficients = (activations - means[labels])[:, places] @ basis.T
            chosen, values = largest(coefficients, kept_of(len(places), self.settings.coefficients))
            scale = values.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            tensors |= {
                f"places.{number}": chosen.to(torch.uint16),
                f"values.{number}": (values / scale).half(),
                f"scale.{number}": scale[None],
                f"basis.{number}": fingerprint(basis),
            }
        return tensors

    def details(self) -> dict[str, Any]:
        """The share of stored coefficients, and the number of activations per class."""
        return {"keep": self.settings.coefficients, "per_class": self.per_class}

    def notices(self) -> list[str]:
        """Sentences about the single examples in the record, and about any reduction of what was requested."""
        found = [f"It holds data of single examples: {self.per_class} images of each class, lossily compressed."]
        if self.per_class < self.settings.per_class:
            found.append(f"More of each class would be over {SHARE_OF_DATA:.0%} of the data.")
        if any(len(part) > FULL_BASIS_UNITS for part in self.parts):
            found.append(
                f"Over {FULL_BASIS_UNITS:,} units in one graph: its {LEADING_VECTORS:,} leading vectors are used."
            )
        return found


def random_subset(labels: Tensor, each: int, random: torch.Generator) -> Tensor:
    """Numbers of up to `each` random images of every class in `labels` `(N,)`, sorted."""
    order = torch.randperm(len(labels), generator=random)
    chosen = [order[labels[order] == label][:each] for label in labels.unique().tolist()]
    return torch.cat(chosen).sort().values


def parts_of(graph: WeightGraph, kind: str) -> list[Tensor]:
    """The parts of the graph that are transformed separately: all units, or those of two neighbouring layers."""
    pairs = graph.neighbours() if kind == "spectral-pairs" else []
    return [graph.places(pair) for pair in pairs] or [torch.arange(graph.units)]


def kept_of(units: int, keep: float) -> int:
    """Number of coefficients stored for a graph of `units` units: the share `keep` of its basis vectors, at least 1."""
    return max(1, round(keep * vectors_of(units)))


def expected_tensors(parts: Sequence[Tensor], classes: int, units: int, examples: int, keep: float) -> Expected:
    """Types and shapes, by name, of the tensors that are stored for `examples` activations."""
    shapes: Expected = {MEAN: (torch.float32, (classes, units)), LABEL: (torch.int64, (examples,))}
    for number, places in enumerate(parts):
        count = kept_of(len(places), keep)
        shapes |= {
            f"places.{number}": (torch.uint16, (examples, count)),
            f"values.{number}": (torch.float16, (examples, count)),
            f"scale.{number}": (torch.float32, (1,)),
            f"basis.{number}": (torch.float32, (vectors_of(len(places)),)),
        }
    return shapes


def largest(coefficients: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of the `count` largest absolute coefficients of each row, sorted, and their values."""
    places = coefficients.abs().topk(count, 1).indices.sort(1).values
    return places, coefficients.gather(1, places)


def require_basis_memory(places: Tensor) -> None:
    """Raise `BadInput` if computing the basis of a part of the graph takes too much memory."""
    units = len(places)
    remedy = "Record fewer --layers, or another --kind."
    require_memory(f"The Fourier basis of {units:,} units", basis_memory_bytes(units), remedy)


def fingerprint(basis: Tensor) -> Tensor:
    """One number per vector, `(vectors,)`: another machine may find vectors of opposite sign, or other vectors."""
    return basis @ torch.randn(basis.shape[1], generator=torch.Generator().manual_seed(0))


class SpectralSampler:
    """Draws the stored activations of a spectral record, one for every image.

    Activations are decoded in one thread, so that they do not depend on the number of threads. Raises `BadInput` if the
    record does not fit the network, or if this machine's linear algebra finds another basis.
    """

    fixes_dropout = False

    def __init__(self, record: Record, teacher: Classifier) -> None:
        self.layers = record.about.layers
        graph = WeightGraph(teacher, self.layers)
        with threads(1):
            self._examples = decoded(graph, record).split(graph.sizes, 1)
        self._labels = record.tensors[LABEL]

    def sample(self, labels: Tensor, random: torch.Generator) -> BatchTargets:
        """A stored activation of its class for every image, drawn at random."""
        places = torch.tensor([self._one_of(label, random) for label in labels.tolist()])
        examples = zip(self.layers, self._examples, strict=True)
        return BatchTargets({layer: Target(outputs[places], torch.tensor(1.0)) for layer, outputs in examples})

    def _one_of(self, label: int, random: torch.Generator) -> int:
        of_label = (self._labels == label).nonzero().flatten()
        return int(of_label[torch.randint(len(of_label), (), generator=random)])


def decoded(graph: WeightGraph, record: Record) -> Tensor:
    """The activations `(N, units)` decoded from a record; if parts share a unit, the mean of the parts' values.

    Raises `BadInput` if the record does not fit the network, or if the basis differs from the one it was recorded with.
    """
    about, tensors = record.about, record.tensors
    parts, classes = parts_of(graph, about.kind), len(about.class_counts)
    labels = tensors.get(LABEL, torch.zeros(0))
    record.require(expected_tensors(parts, classes, graph.units, len(labels), about.keep))
    if labels.unique().tolist() != list(range(classes)):
        raise BadInput(f"{record.path} has not an activation of every class.", "Record again.")
    total = torch.zeros(len(labels), graph.units)
    times = torch.zeros(graph.units)
    for number, places in enumerate(parts):
        chosen = tensors[f"places.{number}"].long()
        values = tensors[f"values.{number}"].float() * tensors[f"scale.{number}"]
        if int(chosen.max()) >= vectors_of(len(places)):
            raise BadInput(f"{record.path} names a coefficient that its graph has not.", "Record again.")
        require_basis_memory(places)
        basis = graph.basis(places)
        signs = _signs(fingerprint(basis), tensors[f"basis.{number}"], chosen, values)
        coefficients = torch.zeros(len(labels), len(basis)).scatter_(1, chosen, values * signs[chosen])
        total[:, places] += coefficients @ basis
        times[places] += 1
    return tensors[MEAN][labels] + total / times.clamp_min(1)


def _signs(here: Tensor, recorded: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    """1 for each basis vector that equals the record's, −1 for each that is its negative."""
    energy = torch.zeros(len(here)).scatter_add_(0, chosen.flatten(), values.square().flatten())
    other = (here.abs() - recorded.abs()).abs() > SAME_BASIS
    share = float(energy[other].sum() / energy.sum().clamp_min(1e-30))
    if share > SAME_BASIS:
        raise BadInput(
            f"This machine's linear algebra finds another Fourier basis than the record's, for {share:.0%} of it.",
            "Record on the same kind of machine, or take another kind of record.",
        )
    return torch.where(here * recorded < 0, -1.0, 1.0)
