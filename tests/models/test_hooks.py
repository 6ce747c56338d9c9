"""What hooks see is there at that moment; what they keep is not changed by layers that work in place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dfcompress
from dfcompress.models.hooks import counted_runs, hooked_inputs, hooked_outputs, kept_outputs


def in_place() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.SiLU(inplace=True), nn.Linear(4, 2))


def hooks_in(network: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in network.modules())


def test_kept_outputs_are_those_of_the_layer_and_not_of_the_in_place_layer_behind_it():
    network, given, kept = in_place(), torch.randn(5, 3), {}
    with kept_outputs(network, ["0"], kept.__setitem__):
        network(given)
    assert torch.equal(kept["0"], network[0](given))


def test_kept_outputs_carry_gradients_and_have_the_type_asked_for():
    network, given, kept = in_place(), torch.randn(5, 3, requires_grad=True), {}
    with kept_outputs(network, ["0"], kept.__setitem__, dtype=torch.float64):
        network(given)
    (found,) = torch.autograd.grad(kept["0"].sum(), given)
    assert kept["0"].dtype == torch.float64
    torch.testing.assert_close(found, network[0].weight.sum(0).expand(5, 3))


def test_an_input_is_seen_before_its_module_writes_into_it():
    network, given, seen = in_place(), torch.randn(5, 3), []
    with hooked_inputs(network, ["1"], lambda name, features: seen.append(features.clone())):
        network(given)
    assert torch.equal(seen[0], network[0](given))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(input=given)


@pytest.mark.parametrize("network", [ByKeyword(), nn.Sequential(nn.Linear(3, 4))])
def test_what_a_hook_returns_takes_the_place_of_input_and_output(network):
    (name, layer), given = list(network.named_modules())[1], torch.randn(5, 3)
    of_doubled, raised = layer(2 * given), layer(given) + 1
    with hooked_inputs(network, [name], lambda _, features: 2 * features):
        assert torch.equal(network(given), of_doubled)
    with hooked_outputs(network, [name], lambda _, features: features + 1):
        assert torch.equal(network(given), raised)


def test_no_hook_is_left_where_a_pass_fails_or_a_name_is_wrong():
    network = in_place()
    for name in ("0", "nowhere"):
        with pytest.raises((RuntimeError, AttributeError)), hooked_inputs(network, ["0", name], lambda *_: None):
            network(torch.randn(5, 7))
    assert hooks_in(network) == 0


def test_runs_with_several_tensors_are_no_plain_runs():
    network, given = nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 2)), torch.randn(5, 3)
    with counted_runs(network, ["0", "1"]) as runs:
        network[1](network[0](network[0](given)), given)
    assert runs == Counter({"0": 2, "1": 1_000_000})


def test_hooks_are_registered_in_one_place():
    package = Path(dfcompress.__file__).parent
    found = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if "register_forward" in path.read_text()
    }
    assert found == {"models/hooks.py"}
