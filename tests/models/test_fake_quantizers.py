"""Fake quantizers give exactly the values of their integers, and gradients that pass straight through."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.machine.compiling import can_compile
from dfcompress.models.fake_quantizers import (
    QuantizedConv2d,
    QuantizedLayer,
    freeze,
    in_float,
    is_quantized,
    learn_steps,
    quantize_layers,
    quantized_layers,
)
from dfcompress.models.grids import InputGrid

WIDTHS = st.integers(2, 8)
REALS = st.floats(-100, 100, width=32)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


def quantized_network(*, bits: int = 4, asymmetric: bool = False) -> nn.Sequential:
    network = small_network()
    layers = dict.fromkeys(("0", "3", "5", "8"), (bits, bits))
    quantize_layers(network, layers, asymmetric=[bits] if asymmetric else [])
    for layer in quantized_layers(network).values():
        layer.input_grid = InputGrid.covering(-1.0, 2.0, bits=bits)
    return network


def a_linear_layer(rows: list[list[float]], *, bits: int, asymmetric: bool = False) -> QuantizedLayer:
    network = nn.Sequential(nn.Linear(len(rows[0]), len(rows), bias=False))
    network[0].weight = nn.Parameter(torch.tensor(rows))
    quantize_layers(network, {"0": (bits, 32)}, asymmetric=[bits] if asymmetric else [])
    return quantized_layers(network)["0"]


both_kinds = pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])


def test_a_four_bit_weight_has_the_integers_minus_seven_to_seven_of_its_channel():
    layer = a_linear_layer([[7.0, -3.4, 0.6, -7.0], [0.7, 0.34, -0.06, 0.0]], bits=4)
    torch.testing.assert_close(layer.quantized_weight(), torch.tensor([[7.0, -3.0, 1.0, -7.0], [0.7, 0.3, -0.1, 0.0]]))


def test_two_bits_have_three_values_on_a_symmetric_grid_and_four_on_an_asymmetric_one():
    rows = [[-1.0, 0.0, 1.0, 2.0], [-6.0, -4.0, -2.0, 0.0], [3.0, 2.0, 1.0, 0.4]]
    values = a_linear_layer(rows, bits=2, asymmetric=True).quantized_weight()
    assert values.tolist() == [[-1.0, 0.0, 1.0, 2.0], [-6.0, -4.0, -2.0, 0.0], [3.0, 2.0, 1.0, 0.0]]
    symmetric = a_linear_layer(rows, bits=2).quantized_weight()
    assert symmetric.tolist() == [[0.0, 0.0, 0.0, 2.0], [-6.0, -6.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0]]


def test_only_the_widths_that_are_named_are_asymmetric():
    network = small_network()
    quantize_layers(network, {"0": (8, 8), "3": (2, 4), "8": (4, 4)}, asymmetric=(2, 8))
    kinds = {name: layer.weight_grid.symmetric for name, layer in quantized_layers(network).items()}
    assert kinds == {"0": False, "3": False, "8": True}


@settings(max_examples=60, deadline=None)
@given(WIDTHS, st.lists(st.lists(REALS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_frozen_asymmetric_weight_is_its_integers_less_the_zero_point_times_the_scale(bits, rows):
    layer = a_linear_layer(rows, bits=bits, asymmetric=True)
    before, quantized = layer.weight.detach().clone(), layer.quantized_weight().detach()
    layer.freeze()
    integers, grid = layer.integer_weight()
    assert integers.dtype == torch.uint8
    assert torch.equal(layer.weight, quantized)
    assert torch.equal(layer.weight, (integers.int() - grid.zero_point[:, None]) * grid.scale[:, None])
    assert 0 <= grid.zero_point.min() <= grid.zero_point.max() < 2**bits
    assert integers.max().item() < 2**bits
    # Half a step of rounding, and half a step by which the grid moves to meet zero.
    assert ((layer.weight - before).abs() <= 1.0001 * grid.scale[:, None]).all()
    assert (layer.weight[before == 0] == 0).all()


@both_kinds
def test_a_grid_times_a_factor_gives_the_factor_times_the_values(asymmetric):
    layer = a_linear_layer([[-1.0, 0.3, 2.0], [-0.1, 0.3, 0.7], [0.0, 0.0, 0.0]], bits=3, asymmetric=asymmetric)
    layer.freeze()
    integers, grid = layer.integer_weight()
    factor = torch.tensor([-2.0, 0.5, -4.0])
    folded, folded_grid = grid.times(factor, integers)
    assert (folded.dtype, folded_grid.bits, folded_grid.symmetric) == (integers.dtype, 3, not asymmetric)
    assert torch.equal(folded_grid.weight(folded), layer.weight * factor[:, None])
    assert torch.equal(folded[1], integers[1])
    low, high = folded_grid.integers()
    assert low <= folded.min() <= folded.max() <= high


def test_a_grid_follows_its_layer_to_another_device():
    network = quantized_network(asymmetric=True)
    freeze(network)
    network.to("meta")
    grid = quantized_layers(network)["3"].weight_grid
    assert {grid.scale.device.type, grid.zero_point.device.type} == {"meta"}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_steps_of_an_asymmetric_weight_are_learnt_and_its_zero_points_stay(bits):
    layer = a_linear_layer([[-0.5, 0.3, 2.0, 1.0], [-3.0, 0.3, 0.7, -1.0]], bits=bits, asymmetric=True)
    before, grid = layer.quantized_weight().detach(), layer.grid_now()
    layer.learn_steps()
    torch.testing.assert_close(layer.quantized_weight(), before)
    (layer.quantized_weight() * torch.arange(8.0).view(2, 4)).sum().backward()
    assert layer.weight_step.grad.abs().min() > 0
    with torch.no_grad():
        layer.weight_step.mul_(1.5)
    learnt = layer.quantized_weight().detach()
    layer.freeze()
    torch.testing.assert_close(layer.weight, learnt)
    torch.testing.assert_close(layer.weight_grid.scale, 1.5 * grid.scale)
    assert torch.equal(layer.weight_grid.zero_point, grid.zero_point)


def test_the_gradient_of_an_asymmetric_step_is_that_of_the_paper():
    """LSQ, eq. 3, of a grid −1 .. 2 times the step: N is a channel's weights, Q the larger end."""
    layer = a_linear_layer([[-0.9, 0.2, 0.74, 2.0]], bits=2, asymmetric=True)
    layer.learn_steps()
    step = 0.5
    with torch.no_grad():
        layer.weight_step.fill_(step)
    layer.quantized_weight().sum().backward()
    inside = [round(v / step) - v / step for v in (0.2, 0.74)]
    assert layer.weight_step.grad.item() == pytest.approx((sum(inside) - 1 + 2) / (4 * 2) ** 0.5, rel=1e-4)
    assert layer.weight.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_the_weight_scale_follows_the_weight_until_frozen():
    layer = a_linear_layer([[1.0, 0.5]], bits=2)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert layer.quantized_weight().abs().max() == 2.0


@pytest.mark.parametrize(("asymmetric", "integers"), [(False, [[0, 0], [7, -2]]), (True, [[0, 0], [15, 0]])])
def test_an_all_zero_channel_stays_zero_and_finite(asymmetric, integers):
    layer = a_linear_layer([[0.0, 0.0], [1.0, -0.25]], bits=4, asymmetric=asymmetric)
    layer.quantized_weight().sum().backward()
    assert layer.quantized_weight()[0].tolist() == [0.0, 0.0]
    assert layer.weight.grad.isfinite().all()
    layer.freeze()
    assert layer.weight[0].tolist() == [0.0, 0.0]
    assert layer.integer_weight()[0].tolist() == integers


@settings(max_examples=60, deadline=None)
@given(WIDTHS, st.lists(st.lists(REALS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_frozen_weight_is_its_integers_times_the_scale_and_within_half_a_step(bits, rows):
    layer = a_linear_layer(rows, bits=bits)
    before, quantized = layer.weight.detach().clone(), layer.quantized_weight().detach()
    layer.freeze()
    integers, grid = layer.integer_weight()
    assert torch.equal(layer.weight, quantized)
    assert torch.equal(layer.weight, integers * grid.scale[:, None])
    assert integers.abs().max() <= 2 ** (bits - 1) - 1
    assert ((layer.weight - before).abs() <= 0.5001 * grid.scale[:, None]).all()


def test_a_frozen_network_is_traced_by_fx():
    network, images = quantized_network().eval(), torch.randn(2, 3, 8, 8)
    for layer in quantized_layers(network).values():
        layer.input_grid = InputGrid.covering(-2.0, 2.0, bits=4)
    freeze(network)
    assert torch.equal(torch.fx.symbolic_trace(network)(images), network(images))


def test_the_gradient_of_weights_passes_straight_through():
    layer = a_linear_layer([[7.0, -3.4, 0.6, -7.0]], bits=4)
    (layer.quantized_weight() * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_swapping_keeps_the_state_dict_keys_and_values():
    before, network = small_network().state_dict(), quantized_network()
    assert list(network.state_dict()) == list(before)
    freeze(network)
    assert list(network.state_dict()) == list(before)


def test_a_quantized_layer_computes_the_plain_layer_of_its_quantized_weight_and_input():
    network = quantized_network()
    plain = small_network()
    images = torch.randn(4, 8, 9, 9)
    layer = quantized_layers(network)["3"]
    plain[3].weight = nn.Parameter(layer.quantized_weight())
    assert torch.equal(layer(images), plain[3](layer.quantized_input(images)))
    assert not torch.equal(layer(images), plain[3](images))


@both_kinds
def test_freezing_does_not_change_a_bit_of_the_output(asymmetric):
    network, images = quantized_network(asymmetric=asymmetric), torch.randn(4, 3, 12, 12)
    before = network(images)
    freeze(network)
    assert torch.equal(network(images), before)
    freeze(network)
    assert torch.equal(network(images), before)


def test_in_float_the_network_is_the_plain_one_until_the_end():
    network, plain, images = quantized_network(), small_network(), torch.randn(2, 3, 12, 12)
    quantized = network(images)
    with in_float(network):
        assert torch.equal(network(images), plain(images))
    assert torch.equal(network(images), quantized)


@both_kinds
def test_channels_last_gives_the_same_quantized_weights(asymmetric):
    network = quantized_network(asymmetric=asymmetric)
    expected = [layer.quantized_weight() for layer in quantized_layers(network).values()]
    network.to(memory_format=torch.channels_last)
    for layer, weight in zip(quantized_layers(network).values(), expected, strict=True):
        assert torch.equal(layer.quantized_weight(), weight)
        layer.freeze()
        assert torch.equal(layer.weight, weight)


def test_a_copy_is_quantized_and_independent():
    network, images = quantized_network(), torch.randn(2, 3, 12, 12)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(images), network(images))
    freeze(twin)
    assert isinstance(twin[0], QuantizedConv2d)
    assert not network[0].is_frozen


def test_training_under_bf16_autocast_quantizes_in_fp32():
    network = quantized_network()
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(2, 3, 12, 12)).float().square().sum().backward()
    assert network[3].quantized_input(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_network_is_one_graph_with_the_gradients_of_the_eager_one():
    network, images = quantized_network(), torch.randn(2, 3, 12, 12)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, dynamic=False)
    for model in (network, compiled):
        model(images).square().sum().backward()
    for eager, fused in zip(network.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(fused.grad, eager.grad, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(BadInput, match="no layer 'fc'"):
        quantize_layers(small_network(), {"fc": (4, 4)})


def test_a_subclass_with_arithmetic_of_its_own_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    with pytest.raises(BadInput, match="Standardised"):
        quantize_layers(nn.Sequential(Standardised(3, 3, 3)), {"0": (4, 4)})


def test_a_transformer_layer_calls_its_quantized_layers_with_and_without_gradients():
    """Without gradients torch computes such a layer in one operation, of which the quantizers would know nothing."""
    torch.manual_seed(0)
    network, tokens = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval(), torch.randn(4, 5, 8)
    quantize_layers(network, {"0.linear1": (2, 2), "0.linear2": (2, 2)})
    for layer in quantized_layers(network).values():
        layer.input_grid = InputGrid.covering(-2.0, 2.0, bits=2)
    with torch.no_grad():
        in_one_operation = network(tokens)
    torch.testing.assert_close(in_one_operation, network(tokens).detach())


def test_a_refused_layer_leaves_the_others_as_they_were():
    network = small_network()
    with pytest.raises(BadInput, match="BatchNorm2d"):
        quantize_layers(network, {"0": (4, 4), "1": (4, 4)})
    assert not is_quantized(network)
    assert is_quantized(quantized_network())


@both_kinds
def test_learnt_steps_begin_where_the_layer_is_and_are_frozen_with_it(asymmetric):
    network, images = quantized_network(asymmetric=asymmetric), torch.randn(4, 3, 12, 12)
    for layer in quantized_layers(network).values():
        layer.weight_shares.fill_(0.8)
    before = network(images)
    learn_steps(network)
    torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-3)
    network(images).square().sum().backward()
    layer = quantized_layers(network)["3"]
    assert layer.weight_step.grad.abs().min() > 0
    assert layer.input_step.grad.abs() > 0
    assert {"3.weight_step", "3.input_step"} <= network.state_dict().keys()
    with torch.no_grad():
        layer.weight_step.mul_(1.5)
        layer.input_step.mul_(0.5)
    trained = network(images)
    freeze(network)
    torch.testing.assert_close(network(images), trained, rtol=1e-4, atol=1e-3)
    assert list(network.state_dict()) == list(small_network().state_dict())


def test_one_layer_alone_can_be_left_quantized():
    network, plain, images = quantized_network(), small_network(), torch.randn(2, 3, 12, 12)
    with in_float(network, but="3"):
        inner = network[:3](images)
        assert torch.equal(inner, plain[:3](images))
        assert torch.equal(network[3](inner), quantized_layers(network)["3"](inner))
        assert not torch.equal(network[3](inner), plain[3](inner))
