"""Packing takes the true number of bits, comes back exactly, and refuses what it did not write."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, is_quantized, quantize_layers, quantized_layers, tensor_grids
from dfcompress.models.grids import InputGrid
from dfcompress.models.packing import pack_integers, pack_network, unpack_integers, unpack_network
from dfcompress.models.tensor_grids import quantize_tensors
from dfcompress.quantization.ranges import calibrate


def fresh_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.running_mean)
    layers = [nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 5)).eval()


def frozen_network(asymmetric: Collection[int] = ()) -> nn.Sequential:
    network = fresh_network(seed=0)
    quantize_layers(network, {"0": (8, 8), "3": (3, 5), "6": (8, 32)}, asymmetric=asymmetric)
    for name in ("0", "3"):
        layer = quantized_layers(network)[name]
        layer.input_grid = InputGrid.covering(-0.3, 1.7, bits=layer.input_bits)
    freeze(network)
    return network


def packed_network(asymmetric: Collection[int] = ()) -> tuple[dict[str, torch.Tensor], dict]:
    tensors, quantization = pack_network(frozen_network(asymmetric))
    return tensors, json.loads(json.dumps(quantization))


some_kinds = pytest.mark.parametrize("asymmetric", [(), (3,), range(2, 9)], ids=["none", "some", "all"])


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 8), st.integers(0, 41))
def test_integers_of_any_width_and_number_come_back(data, bits, count):
    integer = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = torch.tensor(data.draw(st.lists(integer, min_size=count, max_size=count)), dtype=torch.int8)
    packed = pack_integers(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_integers(packed, bits, (count,)), values)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 8), st.integers(0, 41))
def test_unsigned_integers_of_any_width_and_number_come_back(data, bits, count):
    drawn = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    values = torch.tensor(drawn, dtype=torch.uint8)
    assert torch.equal(unpack_integers(pack_integers(values, bits), bits, (count,), signed=False), values)


def test_four_bits_pack_the_first_value_into_the_low_half_of_a_byte():
    assert pack_integers(torch.tensor([1, -1, 7]), 4).tolist() == [0xF1, 0x07]


def test_three_bits_run_across_bytes():
    assert pack_integers(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]


def test_a_shape_comes_back():
    values = torch.arange(-4, 4).reshape(2, 1, 4).to(torch.int8)
    assert torch.equal(unpack_integers(pack_integers(values, 3), 3, (2, 1, 4)), values)


@pytest.mark.parametrize("value", [-9, 8, 200])
def test_a_value_that_does_not_fit_is_refused(value):
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack_integers(torch.tensor([0, value]), 4)


def test_the_wrong_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="5 values of 3 bits take 2 bytes, not 3"):
        unpack_integers(torch.zeros(3, dtype=torch.uint8), 3, (5,))


@some_kinds
def test_an_unpacked_network_is_the_frozen_one_to_the_bit(asymmetric):
    frozen, loaded = frozen_network(asymmetric), fresh_network(seed=1)
    images = torch.randn(8, 3, 9, 9)
    assert not torch.equal(loaded(images), frozen(images))
    unpack_network(loaded, *packed_network(asymmetric))
    assert torch.equal(loaded(images), frozen(images))
    assert all(torch.equal(tensor, frozen.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@some_kinds
def test_packing_the_unpacked_network_gives_the_same_file(asymmetric):
    tensors, quantization = packed_network(asymmetric)
    loaded = fresh_network(seed=1)
    unpack_network(loaded, tensors, quantization)
    again, quantization_again = pack_network(loaded)
    assert quantization_again == quantization
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_a_file_without_zero_points_is_of_version_two_as_it_was_written_before_there_were_any():
    network = nn.Sequential(nn.Linear(4, 1, bias=False))
    tensors = {
        "0.weight_packed": torch.tensor([0xF1, 0x70], dtype=torch.uint8),
        "quantization.scales": torch.ones(1) / 2,
    }
    quantization = {"version": 2, "layers": {"0": {"bits": "4w8a", "scale": 0.5, "zero_point": 3}}}
    unpack_network(network, tensors, quantization)
    assert network[0].weight.tolist() == [[0.5, -0.5, 0.0, 3.5]]
    assert network[0].input_grid == InputGrid(bits=8, scale=0.5, zero_point=3)
    again, quantization_again = pack_network(network)
    assert quantization_again == quantization
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_zero_points_of_asymmetric_layers_are_stored_once_in_the_order_of_the_layers():
    tensors, quantization = packed_network(asymmetric=(8,))
    assert quantization["version"] == 3
    assert {name: layer.get("asymmetric") for name, layer in quantization["layers"].items()} == {
        "0": True,
        "3": None,
        "6": True,
    }
    layers = quantized_layers(frozen_network(asymmetric=(8,)))
    expected = torch.cat([layers[name].weight_grid.zero_point for name in ("0", "6")])
    assert torch.equal(tensors["quantization.zero_points"], expected.to(torch.uint8))
    assert "quantization.zero_points" not in packed_network()[0]


@pytest.mark.parametrize(
    ("zero_points", "problem"),
    [
        (None, "is missing"),
        (torch.zeros(3, dtype=torch.uint8), r"\[3\], not torch.uint8 \[4\]"),
        (torch.tensor([0, 1, 8, 1], dtype=torch.uint8), "holds 8, which no weight of 3 bits has"),
    ],
)
def test_damaged_zero_points_are_refused_by_name(zero_points, problem):
    tensors, quantization = packed_network(asymmetric=(3,))
    del tensors["quantization.zero_points"]
    if zero_points is not None:
        tensors["quantization.zero_points"] = zero_points
    network = fresh_network(seed=1)
    with pytest.raises(BadInput, match=f"'quantization.zero_points'.*{problem}"):
        unpack_network(network, tensors, quantization)
    assert not is_quantized(network)


def test_each_layer_is_stored_in_its_own_bits_and_nothing_twice():
    tensors, quantization = packed_network()
    assert {name: list(tensor.shape) for name, tensor in tensors.items() if not name.startswith("1.")} == {
        "0.weight_packed": [6 * 27],
        "0.bias": [6],
        "3.weight_packed": [41],  # 108 integers of 3 bits
        "3.bias": [4],
        "6.weight_packed": [20],
        "quantization.scales": [15],
        "6.bias": [5],
    }
    assert "1.num_batches_tracked" not in tensors
    assert quantization["layers"]["6"] == {"bits": "8w32a"}
    assert list(quantization["layers"]["3"]) == ["bits", "scale", "zero_point"]


def test_a_network_that_is_not_frozen_cannot_be_packed():
    network = fresh_network(seed=0)
    quantize_layers(network, {"0": (4, 32)})
    with pytest.raises(ValueError, match="frozen"):
        pack_network(network)


def test_a_network_that_is_not_calibrated_cannot_be_packed():
    network = fresh_network(seed=0)
    quantize_layers(network, {"0": (4, 4)})
    freeze(network)
    with pytest.raises(ValueError, match="layer 0 was never calibrated"):
        pack_network(network)


@pytest.mark.parametrize(
    ("layer", "field", "value"),
    [
        ("0", "bits", "9w8a"),
        ("0", "bits", "1w8a"),
        ("0", "bits", "8w16a"),
        ("0", "bits", "w8a8"),
        ("0", "bits", 8),
        ("0", "bits", None),
        ("3", "scale", 0.0),
        ("3", "scale", -1.0),
        ("3", "scale", float("nan")),
        ("3", "scale", 1e300),
        ("3", "scale", None),
        ("3", "zero_point", -1),
        ("3", "zero_point", 32),
        ("3", "zero_point", 1.5),
        ("3", "zero_point", True),
        ("3", "signed", 1),
        ("6", "asymmetric", 1),
    ],
)
def test_a_damaged_setting_is_refused_by_name(layer, field, value):
    tensors, quantization = packed_network()
    quantization["layers"][layer][field] = value
    with pytest.raises(BadInput, match=f"layer '{layer}' has {field} "):
        unpack_network(fresh_network(seed=1), tensors, quantization)


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        [],
        "4w4a",
        {},
        {"version": 1, "layers": {}},
        {"version": 2, "layers": []},
        {"version": 2, "layers": {"0": 8}},
    ],
)
def test_settings_of_another_shape_are_refused(quantization):
    with pytest.raises(BadInput, match="damaged"):
        unpack_network(fresh_network(seed=1), packed_network()[0], quantization)


@pytest.mark.parametrize("name", ["conv9", "1", "2", ""])
def test_settings_of_a_layer_that_cannot_be_quantized_are_refused(name):
    tensors, quantization = packed_network()
    quantization["layers"][name] = quantization["layers"]["0"]
    with pytest.raises(BadInput, match=f"{name!r}"):
        unpack_network(fresh_network(seed=1), tensors, quantization)


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("0.weight_packed", None, "is missing"),
        ("1.running_var", None, "is missing"),
        ("0.weight_packed", torch.zeros(161, dtype=torch.uint8), r"\[161\], not torch.uint8 \[162\]"),
        ("0.weight_packed", torch.zeros(162), "torch.float32"),
        ("0.weight_packed", torch.full((162,), 128, dtype=torch.uint8), "holds -128, which is not a weight"),
        ("quantization.scales", torch.ones(5), r"\[5\], not torch.float32 \[15\]"),
        ("quantization.scales", None, "is missing"),
        ("quantization.scales", torch.tensor([1.0] * 14 + [float("inf")]), "not scales"),
        ("quantization.scales", torch.tensor([1.0] * 14 + [float("nan")]), "not scales"),
        ("quantization.scales", torch.tensor([1.0] * 14 + [0.0]), "not scales"),
        ("6.bias", torch.zeros(6), r"\[6\], not torch.float32 \[5\]"),
        ("0.weight", torch.zeros(6, 3, 3, 3), "that its architecture does not"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name_and_nothing_is_loaded(name, tensor, problem):
    tensors, quantization = packed_network()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    network = fresh_network(seed=1)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(BadInput, match=f"'{name}'.*{problem}"):
        unpack_network(network, tensors, quantization)
    assert not is_quantized(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def int8_graph() -> Classifier:
    """A frozen network with grids on all tensors, and its fresh twin's place to be unpacked into."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    classifier = Classifier(network, ModelCard("test", 2, (1, 4, 4), (0.5,), (0.5,))).frozen()
    quantize_tensors(classifier, ["0", "3"])
    quantize_layers(classifier.network, {"0": (8, 8), "3": (8, 8)})
    calibrate(classifier, [torch.rand(4, 1, 4, 4)])
    freeze(classifier.network)
    return classifier


def unpacked_graph(tensors, quantization) -> Classifier:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    classifier = Classifier(network, ModelCard("test", 2, (1, 4, 4), (0.5,), (0.5,))).frozen()
    quantize_tensors(classifier, ["0", "3"])
    unpack_network(classifier.network, tensors, quantization)
    return classifier


def test_grids_on_all_tensors_come_back():
    classifier = int8_graph()
    tensors, quantization = pack_network(classifier.network)
    assert quantization["version"] == 4
    assert quantization["layers"] == {"0": {"bits": "8w8a"}, "3": {"bits": "8w8a"}}
    assert quantization["tensors"].keys() == {"input_1", "_1", "_2"}
    again = unpacked_graph(tensors, json.loads(json.dumps(quantization)))
    images = torch.rand(4, 1, 4, 4)
    assert torch.equal(again(images), classifier(images))
    assert quantized_layers(again.network)["3"].input_grid == tensor_grids(classifier.network)["_2"].input_grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["tensors"].pop("_1"), "The tensor behind '_1' has a grid in the network"),
        (lambda values: values["tensors"].update(add={"scale": 0.5}), "The tensor behind 'add' has a grid in the file"),
        (lambda values: values["tensors"]["_1"].update(scale=0), "tensor '_1' has scale 0"),
        (lambda values: values["tensors"]["_1"].update(zero_point=256), "tensor '_1' has zero_point 256"),
        (lambda values: values.update(tensors=[1]), "its tensors have no settings"),
        (lambda values: values.update(version=2), "layer '0' has scale None|in the network"),
    ],
)
def test_other_grids_than_the_networks_are_refused(change, message):
    tensors, quantization = pack_network(int8_graph().network)
    change(quantization)
    with pytest.raises(BadInput, match=message):
        unpacked_graph(tensors, quantization)


def test_tensors_that_share_memory_are_packed_apart():
    """As safetensors wants them: here two layers with one bias."""
    network = frozen_network()
    network.append(nn.Linear(5, 5))
    network[7].bias = network[6].bias
    stored, _ = pack_network(network)
    assert save(stored)
    assert torch.equal(stored["7.bias"], stored["6.bias"])
