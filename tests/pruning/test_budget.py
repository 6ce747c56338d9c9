"""The budget is met, by the channels of least importance, and no layer is left without any."""

from __future__ import annotations

import re

import pytest
import torch
from test_groups import NETWORKS, Shared, classifier
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.pruning import latency
from dfcompress.pruning.budget import Costs, Pruning, choose, require_reachable
from dfcompress.pruning.groups import cut, find_groups
from dfcompress.pruning.importance import Ranking

pytest.importorskip("torch_pruning")


def ranked(groups):
    random = torch.Generator().manual_seed(0)
    return {group.name: Ranking(torch.rand(group.units, generator=random)) for group in groups}


@pytest.fixture(scope="module")
def networks():
    made = {name: classifier(NETWORKS[name]()) for name in ("residual adds", "grouped", "concatenations")}
    return {name: (each, find_groups(each).groups) for name, each in made.items()}


@pytest.mark.parametrize("resource", ["flops", "parameters", "filters"])
@pytest.mark.parametrize("uniform", [False, True])
def test_the_target_is_met_within_a_percent(resource, uniform, networks):
    made, groups = networks["residual adds"]
    asked = Pruning(resource=resource, share=0.4, importance="magnitude", uniform=uniform)
    ranking, costs = ranked(groups), Costs.of(made, groups, resource)
    kept = choose(costs, groups, ranking, asked)
    pruned = classifier(NETWORKS["residual adds"]())
    cut(pruned, groups, {group.name: ranking[group.name].clusters(group, kept[group.name]) for group in groups})
    share = Costs.of(pruned, [], resource).whole / costs.whole
    assert 0.99 * 0.4 <= share <= 0.4
    shares = [kept[group.name] / group.units for group in groups]
    assert (max(shares) - min(shares) < 0.05) == uniform


def test_channels_of_a_grouped_convolution_go_from_all_its_groups_alike(networks):
    made, groups = networks["grouped"]
    asked = Pruning(resource="flops", share=0.5, importance="magnitude")
    kept = choose(Costs.of(made, groups, "flops"), groups, ranked(groups), asked)
    several = [group for group in groups if group.blocks.max() > 0]
    assert several
    assert all(kept[group.name] % 4 == 0 for group in several)


def test_of_every_group_of_a_grouped_convolution_two_channels_stay(networks):
    """With one of each it would be a depthwise one, whose groups the next pruning would take away."""
    made, groups = networks["grouped"]
    costs = Costs.of(made, groups, "flops")
    with pytest.raises(BadInput, match="out of reach") as least:
        require_reachable(costs, groups, Pruning(resource="flops", share=1e-6, importance="magnitude"))
    share = float(re.search(r"possible is (0\.\d+)", str(least.value))[1])
    kept = choose(costs, groups, ranked(groups), Pruning(resource="flops", share=share * 1.01, importance="magnitude"))
    several = [group for group in groups if group.blocks.max() > 0]
    assert {kept[group.name] // (int(group.blocks.max()) + 1) for group in several} == {2}


def test_a_multiple_of_channels_stays(networks):
    made, groups = networks["residual adds"]
    asked = Pruning(resource="flops", share=0.5, importance="magnitude", round_to=8)
    kept = choose(Costs.of(made, groups, "flops"), groups, ranked(groups), asked)
    assert all(units % 8 == 0 for units in kept.values())
    assert any(kept[group.name] < group.units for group in groups)


def test_the_least_important_go_and_a_twentieth_of_each_group_stays(networks):
    made, groups = networks["concatenations"]
    costs = Costs.of(made, groups, "flops")
    scores = {
        group.name: Ranking(torch.arange(float(group.units)) + 100 * number) for number, group in enumerate(groups)
    }
    kept = choose(costs, groups, scores, Pruning(resource="flops", share=0.9, importance="magnitude"))
    assert kept[groups[0].name] == max(1, round(0.05 * groups[0].units))
    assert kept[groups[-1].name] == groups[-1].units
    left = scores[groups[0].name].clusters(groups[0], 2)
    assert left.tolist() == [-1] * (groups[0].units - 2) + [0, 1]


def test_a_share_out_of_reach_names_the_least_there_is(networks):
    made, groups = networks["residual adds"]
    costs = Costs.of(made, groups, "flops")
    with pytest.raises(BadInput, match=r"--flops 0.0001 is out of reach: the least possible is 0.0\d\d"):
        require_reachable(costs, groups, Pruning(resource="flops", share=0.0001))
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(BadInput, match="must be a share between 0 and 1"):
            Pruning(resource="flops", share=share)


def test_latency_is_the_sum_of_a_table_of_layers_that_grows_with_the_widths(networks):
    pytest.importorskip("onnxruntime")
    made, groups = networks["residual adds"]
    costs = Costs.of(made, groups, "latency")
    assert costs.kept(groups, {group.name: group.units for group in groups}) == pytest.approx(costs.whole)
    asked = Pruning(resource="latency", share=0.6, importance="magnitude")
    kept = choose(costs, groups, ranked(groups), asked)
    assert 0.59 * costs.whole <= costs.kept(groups, kept) <= 0.6 * costs.whole


def test_every_run_of_a_layer_counts_and_is_timed_with_its_own_pads(monkeypatch):
    seen = []

    def table(kind, c_in, c_out):
        seen.append(kind.pads)
        return lambda new_in, new_out: 1.0

    monkeypatch.setattr(latency, "_table", table)
    assert latency.layer_times(classifier(Shared()))["conv"](8, 8) == 2.0
    same = nn.Sequential(nn.Conv2d(3, 4, (4, 3), padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen.clear()
    latency.layer_times(classifier(same))
    assert seen == [(1, 1, 2, 1)]
