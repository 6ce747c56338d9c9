"""Grids: values, rounding and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcompress.models.grids import InputGrid, WeightGrid, on_grid, on_learnt_grid

WIDTHS = st.integers(2, 8)
REALS = st.floats(-100, 100, width=32)


@settings(max_examples=100, deadline=None)
@given(WIDTHS, REALS, REALS, st.lists(REALS, min_size=1, max_size=20))
def test_quantized_activations_lie_on_the_grid(bits, one_end, other_end, activations):
    grid = InputGrid.covering(min(one_end, other_end), max(one_end, other_end), bits=bits)
    values = torch.tensor([q - grid.zero_point for q in range(2**bits)]) * torch.tensor(grid.scale)
    assert torch.isin(grid.quantized(torch.tensor(activations)), values).all()


@settings(max_examples=100, deadline=None)
@given(WIDTHS, REALS, REALS)
def test_zero_is_exactly_a_value_of_the_grid(bits, one_end, other_end):
    grid = InputGrid.covering(min(one_end, other_end), max(one_end, other_end), bits=bits)
    assert 0 <= grid.zero_point < 2**bits
    assert grid.quantized(torch.zeros(1)).item() == 0.0


def test_the_grid_after_a_relu_spends_all_its_values_above_zero():
    assert InputGrid.covering(0.0, 3.0, bits=4) == InputGrid(bits=4, scale=torch.tensor(0.2).item(), zero_point=0)


def test_the_grid_of_a_signed_range_spans_it():
    grid = InputGrid.covering(-1.0, 2.0, bits=2)
    assert grid == InputGrid(bits=2, scale=1.0, zero_point=1)
    assert grid.quantized(torch.tensor([-9.0, -0.6, 0.4, 1.6, 9.0])).tolist() == [-1.0, -1.0, 0.0, 2.0, 2.0]


@settings(max_examples=200, deadline=None)
@given(WIDTHS, st.booleans(), REALS, REALS, st.lists(REALS, min_size=1, max_size=20))
def test_values_and_gradients_are_those_of_torch(bits, signed, one_end, other_end, activations):
    grid = InputGrid.covering(min(one_end, other_end), max(one_end, other_end), bits=bits, signed=signed)
    ties = (torch.arange(-300, 300) + 0.5) * grid.scale
    values = torch.cat([torch.tensor(activations), ties]).requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(values, grid.scale, grid.zero_point, *grid.integers())
    (gradient,) = torch.autograd.grad(expected.sum(), values)
    found = grid.quantized(values)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), values)[0], gradient)
    with torch.no_grad():
        assert torch.equal(grid.quantized(values), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_and_their_gradients_are_those_of_torch(symmetric):
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = 0.5 * weight.detach().flatten(1)
    grid = WeightGrid.covering(rows.amin(1), rows.amax(1), bits=3, symmetric=symmetric)
    expected = torch.fake_quantize_per_channel_affine(weight, grid.scale, grid.zero_point, 0, *grid.integers())
    found = grid.quantized(weight)
    assert torch.equal(found, expected)
    assert not torch.equal(found, weight)
    gradients = [torch.autograd.grad(each.square().sum(), weight)[0] for each in (found, expected)]
    assert torch.equal(*gradients)
    assert (gradients[0] == 0).any()


def test_the_gradient_of_activations_passes_straight_through_except_where_clipped():
    activations = torch.tensor([-5.0, -0.3, 0.4, 5.0], requires_grad=True)
    InputGrid.covering(-1.0, 2.0, bits=2).quantized(activations).sum().backward()
    assert activations.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_a_signed_grid_spans_both_sides_alike_and_spends_its_lowest_integer():
    grid = InputGrid.covering(-1.0, 3.0, bits=3, signed=True)
    assert grid == InputGrid(bits=3, scale=1.0, zero_point=0, signed=True)
    assert grid.quantized(torch.tensor([-9.0, -3.4, 0.4, 9.0])).tolist() == [-4.0, -3.0, 0.0, 3.0]


@settings(max_examples=100, deadline=None)
@given(WIDTHS, REALS, REALS, st.lists(REALS, min_size=1, max_size=20))
def test_a_learnt_step_gives_the_values_of_the_grid_it_starts_from(bits, one_end, other_end, activations):
    grid = InputGrid.covering(min(one_end, other_end), max(one_end, other_end), bits=bits)
    step = grid.as_step(torch.device("cpu"))
    values = (torch.arange(2**bits) - grid.zero_point).float() * step
    assert torch.isin(grid.quantized(torch.tensor(activations), step=step), values).all()
    assert grid.with_step(step) == grid


def test_the_gradient_of_a_step_is_that_of_the_paper():
    """LSQ, eq. 3: −v/s + round(v/s) inside, the clipped end outside; scaled by 1/√(N·Q), N of one image."""
    values = torch.tensor([[0.2, 0.74, 1.9, 9.0, -5.0]], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    on_learnt_grid(values, step, 0, 7).sum().backward()
    inside = [round(v / 0.5) - v / 0.5 for v in (0.2, 0.74, 1.9)]
    assert step.grad.item() == pytest.approx((sum(inside) + 7 + 0) / (5 * 7) ** 0.5, rel=1e-5)
    assert values.grad.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]]


def test_the_pace_of_a_step_does_not_depend_on_how_a_batch_is_shared_out():
    values = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    gradients = []
    for parts in (1, 4):
        step = torch.tensor(0.07, requires_grad=True)
        for some in values.split(8 // parts):
            (on_learnt_grid(some, step, 0, 15).square().sum() / 8).backward()
        gradients.append(step.grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


@pytest.mark.parametrize("ends", [(-1, 1), (torch.tensor([[-1]]), torch.tensor([[1]]))])
def test_weights_at_the_ends_of_a_learnt_grid_can_still_leave_them(ends):
    """After learnt rounding every weight is a value of its grid, and few bits leave many at an end."""
    values = torch.tensor([[-0.5, 0.0, 0.5]], requires_grad=True)
    on_learnt_grid(values, torch.tensor([[0.5]], requires_grad=True), *ends).sum().backward()
    assert values.grad.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("rounded", [on_grid, on_learnt_grid])
def test_what_is_compiled_returns_a_tensor_that_nothing_wrote_to(rounded, monkeypatch):
    """Otherwise torch 2.11 loses the gradient; the tests run with a later version, which does not."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    values = torch.randn(4, requires_grad=True)
    assert rounded(values, torch.tensor(0.1), -7, 7)._version == 0
