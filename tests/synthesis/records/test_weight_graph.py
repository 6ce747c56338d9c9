"""The graph of a network's units: its weights are the edges, its basis is orthonormal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.records import weight_graph
from dfcompress.synthesis.records.weight_graph import WeightGraph


class Shortcut(nn.Module):
    """Three layers, the first added to the second's output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images):
        first = torch.relu(self.a(images.flatten(1)))
        return self.c(torch.relu(self.b(first) + first))


def classifier(network, classes=3, size=(3, 2, 2)):
    return Classifier(network, ModelCard("x", classes, size, (0.5,) * size[0], (0.5,) * size[0])).frozen()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Shortcut()


def test_edges_are_the_weights_and_shortcuts_join_layers_too(network):
    graph = WeightGraph(classifier(network), ["a", "b", "logits"])
    a, b, c = network.a.weight, network.b.weight, network.c.weight
    expected = torch.zeros(15, 15)
    expected[:6, :6] = a @ a.T
    expected[6:12, :6], expected[:6, 6:12] = b, b.T
    expected[12:, 6:12], expected[6:12, 12:] = c, c.T
    expected[12:, :6], expected[:6, 12:] = c, c.T
    torch.testing.assert_close(graph.shift(torch.eye(15).double()).float(), expected)
    assert graph.neighbours() == [(0, 1), (0, 2), (1, 2)]


def test_maximum_pooling_joins_a_unit_with_the_mean_of_its_window():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2))
    graph = WeightGraph(classifier(network, 2, (1, 2, 2)), ["0", "logits"])
    shifted = graph.shift(torch.eye(6).double()[:1]).float()
    torch.testing.assert_close(shifted[0, 4:], network[4].weight[:, 0] / 4)


@pytest.mark.parametrize("functional", [nn.functional.relu, torch.relu, nn.functional.gelu, nn.functional.silu])
def test_every_way_to_write_an_activation_is_the_identity(functional):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, images):
            return self.b(functional(self.a(images.flatten(1))))

    net = Net()
    graph = WeightGraph(classifier(net, 2, (1, 2, 2)), ["a", "logits"])
    torch.testing.assert_close(graph.shift(torch.eye(7).double())[:5, 5:].float(), net.b.weight.T)


def test_the_transform_and_its_inverse_give_the_activation_back(lenet):
    graph = WeightGraph(lenet, ["conv2", "fc1", "fc2", "logits"])
    places = torch.arange(graph.units)
    basis = graph.basis(places)
    signals = torch.randn(3, graph.units)
    torch.testing.assert_close((signals @ basis.T) @ basis, signals, atol=2e-4, rtol=1e-3)


def test_leading_vectors_span_those_of_the_full_basis(network, monkeypatch):
    graph = WeightGraph(classifier(network), ["a", "b", "logits"])
    places = torch.arange(15)
    full = graph.basis(places)
    monkeypatch.setattr(weight_graph, "FULL_BASIS_UNITS", 14)
    monkeypatch.setattr(weight_graph, "LEADING_VECTORS", 4)
    leading = graph.basis(places)
    assert leading.shape == (4, 15)
    torch.testing.assert_close((leading @ full[:4].T).abs(), torch.eye(4), atol=1e-3, rtol=0)


def test_a_network_that_is_no_graph_is_refused():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, images):
            return self.b(self.a(images.flatten(1)) ** 2)

    with pytest.raises(BadInput, match="more than linear maps"):
        WeightGraph(classifier(Squares(), 2, (1, 2, 2)), ["a", "logits"])


def test_a_network_that_is_not_linear_in_its_images_is_refused():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(BadInput, match="more than linear maps"):
        WeightGraph(classifier(network, 2, (1, 2, 2)), ["2", "logits"])


def test_vectors_of_one_eigenvalue_are_told_apart():
    """Two units that nothing joins have one eigenvalue; the basis is still that of single units."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    network[1].weight.data.zero_()
    network[3].weight.data.zero_()
    graph = WeightGraph(classifier(network, 2, (1, 2, 2)), ["1", "logits"])
    graph._loops = lambda places: 1e-6 * torch.linspace(0, 1, len(places), dtype=torch.float64)
    basis = graph.basis(torch.arange(5)).abs()
    torch.testing.assert_close(basis.max(1).values, torch.ones(5))
