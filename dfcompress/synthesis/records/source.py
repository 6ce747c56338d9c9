"""`RecordSource`: a record made ready for synthesis, and what it asks of the images of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.recorder import DROPOUTS, LOGITS, Target
from dfcompress.synthesis.records import GAUSSIAN, SPECTRAL
from dfcompress.synthesis.records.gaussian import GaussianLayer
from dfcompress.synthesis.records.record import Record
from dfcompress.synthesis.records.spectral import LABEL, decoded
from dfcompress.synthesis.records.weight_graph import WeightGraph


@dataclass(frozen=True)
class Asked:
    """What a batch is asked for: `targets` of the record's layers, and `filters` that dropout layers multiply by, held
    for all steps; `(N, ...)` each.
    """

    targets: tuple[Target, ...] = ()
    filters: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Asked:
        """The same on a device."""
        targets = tuple(Target(values.to(device), scale.to(device)) for values, scale in self.targets)
        return Asked(targets, tuple(tensor.to(device) for tensor in self.filters))

    @staticmethod
    def together(parts: list[Asked]) -> Asked:
        """Of several batches, one after the other."""
        targets = tuple(
            Target(torch.cat([own.values for own in same]), same[0].scale)
            for same in zip(*(part.targets for part in parts), strict=True)
        )
        return Asked(targets, tuple(map(torch.cat, zip(*(part.filters for part in parts), strict=True))))


class RecordSource:
    """What `record` says of its `teacher`: pixels to start from, and activations to draw.

    `layers` are those whose outputs it knows. Raises `BadInput` where a spectral record cannot be decoded here.
    """

    def __init__(self, record: Record, teacher: Classifier) -> None:
        about = record.about
        self.pixels = record.pixels
        self.layers = about.layers if about.kind in (*GAUSSIAN, *SPECTRAL) else ()
        self._scales = [torch.tensor(1 / about.temperature if layer == LOGITS else 1.0) for layer in self.layers]
        self._gaussians = [GaussianLayer(record.tensors, layer) for layer in self.layers if about.kind in GAUSSIAN]
        self._dropouts = _dropouts(teacher) if about.kind == "all-layers-dropout" else []
        self._examples: tuple[Tensor, ...] = ()
        if about.kind in SPECTRAL:
            graph = WeightGraph(teacher, self.layers)
            self._examples = decoded(graph, about.kind, record.tensors).split(graph.sizes, 1)
            self._examples_of = record.tensors[LABEL]

    @property
    def fixes_dropout(self) -> bool:
        """Whether each batch has dropout filters of its own."""
        return bool(self._dropouts)

    def ask(self, labels: Tensor, random: torch.Generator) -> Asked:
        """Draw activations of the classes `labels` `(N,)`, and dropout filters; all from `random`, on the CPU."""
        if self._examples:
            places = [self._one_of(label, random) for label in labels.tolist()]
            values = [layer[places] for layer in self._examples]
        else:
            values = [layer.sample(labels, random) for layer in self._gaussians]
        # Records hold scaled outputs, targets are what the outputs themselves shall be.
        targets = tuple(Target(own / scale, scale) for own, scale in zip(values, self._scales, strict=True))
        return Asked(targets, tuple(self._filter(*each, len(labels), random) for each in self._dropouts))

    def _one_of(self, label: int, random: torch.Generator) -> int:
        own = (self._examples_of == label).nonzero().flatten()
        return int(own[torch.randint(len(own), (), generator=random)])

    def _filter(self, shape: torch.Size, rate: float, count: int, random: torch.Generator) -> Tensor:
        """One filter for the whole batch, as in training: what is kept counts 1 / (1 − rate)."""
        kept = torch.rand(shape, generator=random) >= rate
        return (kept / (1 - rate)).expand(count, *shape)


@torch.no_grad()
def _dropouts(teacher: Classifier) -> list[tuple[torch.Size, float]]:
    """Shape of one image's features and rate of every dropout layer, in the order of the forward pass."""
    seen: list[tuple[torch.Size, float]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, DROPOUTS)
        seen.append((output.shape[1:], layer.p))

    layers = [module for module in teacher.network.modules() if isinstance(module, DROPOUTS)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with evaluating(teacher):
            teacher(torch.zeros(1, *teacher.card.input_size, device=teacher.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return seen
