"""Spectral records: what they keep, and that another machine's basis is noticed."""

from __future__ import annotations

import pytest
import torch

from dfcompress.errors import BadInput
from dfcompress.synthesis.records import weight_graph
from dfcompress.synthesis.records.accumulator import RecordSettings
from dfcompress.synthesis.records.record_file import Description, Record
from dfcompress.synthesis.records.spectral import SpectralAccumulator, decoded, largest, random_subset
from dfcompress.synthesis.records.weight_graph import WeightGraph

LAYERS = ["fc1", "fc2", "logits"]


def kept(lenet, *, data_bytes=10**7, **options):
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 10
    activations = torch.randn(60, 214, generator=random)
    keeping = RecordSettings(**{"kind": "spectral-all", **options})
    accumulator = SpectralAccumulator(
        lenet, LAYERS, keeping, labels, data_bytes=data_bytes, random=torch.Generator().manual_seed(1)
    )
    for first in (0, 25):
        part = slice(first, first + 25 if first == 0 else None)
        accumulator.update(activations[part].split([120, 84, 10], 1), labels[part], torch.arange(60)[part])
    return accumulator, activations, labels


def record_of(accumulator):
    about = Description(accumulator.settings.kind, tuple(LAYERS), 60, (6,) * 10, "", **accumulator.details())
    return Record(about, accumulator.tensors())


@pytest.mark.parametrize("kind", ["spectral-all", "spectral-pairs"])
def test_all_coefficients_give_the_activations_back(kind, lenet):
    accumulator, activations, labels = kept(lenet, kind=kind, coefficients=1.0, per_class=3)
    tensors = accumulator.tensors()
    chosen = random_subset(labels, 3, torch.Generator().manual_seed(1))
    back = decoded(WeightGraph(lenet, LAYERS), record_of(accumulator))
    torch.testing.assert_close(back, activations[chosen], atol=0.01, rtol=0)  # Values are float16.
    assert torch.equal(tensors["label"], labels[chosen])


def test_the_largest_coefficients_are_kept():
    places, values = largest(torch.tensor([[1.0, -5.0, 0.5, 3.0]]), 2)
    assert places.tolist() == [[1, 3]]
    assert values.tolist() == [[-5.0, 3.0]]


def test_fewer_coefficients_are_further_from_the_activations(lenet):
    errors = []
    for keep in (0.05, 0.3, 1.0):
        accumulator, activations, labels = kept(lenet, coefficients=keep, per_class=2)
        chosen = random_subset(labels, 2, torch.Generator().manual_seed(1))
        back = decoded(WeightGraph(lenet, LAYERS), record_of(accumulator))
        errors.append(float((back - activations[chosen]).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_vectors_of_the_other_sign_are_turned(lenet, monkeypatch):
    accumulator, activations, labels = kept(lenet, coefficients=1.0, per_class=1)
    record = record_of(accumulator)
    usual = WeightGraph.basis
    monkeypatch.setattr(WeightGraph, "basis", lambda self, places: -usual(self, places))
    chosen = random_subset(labels, 1, torch.Generator().manual_seed(1))
    back = decoded(WeightGraph(lenet, LAYERS), record)
    torch.testing.assert_close(back, activations[chosen], atol=0.01, rtol=0)


def test_another_basis_is_refused(lenet, monkeypatch):
    record = record_of(kept(lenet)[0])
    usual = WeightGraph.basis
    monkeypatch.setattr(WeightGraph, "basis", lambda self, places: usual(self, places).roll(1, 0))
    with pytest.raises(BadInput, match="another Fourier basis"):
        decoded(WeightGraph(lenet, LAYERS), record)


@pytest.mark.parametrize("kind", ["spectral-all", "spectral-pairs"])
def test_a_record_stays_under_a_tenth_of_the_data(kind, lenet):
    accumulator, _, _ = kept(lenet, kind=kind, data_bytes=130_000, per_class=6)
    assert 0 < accumulator.per_class < 6
    tensors = accumulator.tensors()
    assert accumulator.bytes == sum(tensor.nbytes for tensor in tensors.values()) <= 13_000
    assert any("over 10%" in notice for notice in accumulator.notices())
    assert any("single examples" in notice for notice in accumulator.notices())


def test_a_process_that_saw_nothing_adds_nothing(lenet):
    accumulator, _, labels = kept(lenet, per_class=2)
    idle = SpectralAccumulator(
        lenet, LAYERS, accumulator.settings, labels, data_bytes=10**7, random=torch.Generator().manual_seed(1)
    )
    before = accumulator.tensors()
    accumulator.merge(idle.state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in accumulator.tensors().items())


def test_above_the_limit_a_share_of_the_leading_vectors_is_kept(lenet, monkeypatch):
    monkeypatch.setattr(weight_graph, "FULL_BASIS_UNITS", 100)
    monkeypatch.setattr(weight_graph, "LEADING_VECTORS", 20)
    accumulator, _, _ = kept(lenet, per_class=2, coefficients=0.25)
    tensors = accumulator.tensors()
    assert tensors["places.0"].shape == (20, 5)
    assert accumulator.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert decoded(WeightGraph(lenet, LAYERS), record_of(accumulator)).shape == (20, 214)


@pytest.mark.parametrize("name", ["mean", "label", "places.0", "values.0", "scale.0", "basis.0"])
def test_a_record_without_one_of_its_tensors_is_refused(name, lenet):
    record = record_of(kept(lenet)[0])
    del record.tensors[name]
    with pytest.raises(BadInput, match=f"has nothing as {name}"):
        decoded(WeightGraph(lenet, LAYERS), record)


def test_places_outside_the_graph_are_refused(lenet):
    record = record_of(kept(lenet)[0])
    record.tensors["places.0"][0, 0] = 40_000
    with pytest.raises(BadInput, match="a coefficient that its graph has not"):
        decoded(WeightGraph(lenet, LAYERS), record)


def test_large_values_survive_their_16_bits(lenet):
    accumulator, _, _ = kept(lenet, per_class=1, coefficients=1.0)
    accumulator._examples = [1e6 * examples for examples in accumulator._examples]
    assert all(tensor.isfinite().all() for tensor in accumulator.tensors().values() if tensor.is_floating_point())


def test_where_nothing_fits_into_a_tenth_it_is_refused(lenet):
    with pytest.raises(BadInput, match="over 10% of the data"):
        kept(lenet, data_bytes=50_000)
