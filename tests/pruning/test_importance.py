"""Each importance is its paper's number, and folding loses nothing where channels are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from odd_networks import Net
from test_groups import NETWORKS, classifier
from torch import nn
from torch.nn import functional as F

from dfcompress.pruning import importance
from dfcompress.pruning.groups import cut, find_groups
from dfcompress.pruning.importance import BATCH, rank

pytest.importorskip("torch_pruning")


@pytest.fixture
def small():
    made = classifier(Net())
    return made, find_groups(made).groups


def test_taylor_is_the_squared_weight_times_gradient_summed_over_a_channel(small):
    """By central differences of the loss, of every weight alone (Molchanov et al. 2019, equation 8)."""
    made, groups = small
    images = torch.randint(0, 256, (2 * BATCH, 3, 32, 32), dtype=torch.uint8)
    scores = rank("taylor", made, groups, images)["stem.0"].scores
    made.double()
    channel, expected = 3, 0.0
    layers = [made.network.stem[0].weight, made.network.stem[1].weight, made.network.stem[1].bias]
    for some in images.split(BATCH):
        shown = some.double() / 255
        answers = made(shown).argmax(1)
        for tensor in layers:
            values = tensor.data[channel].view(-1)
            for place in range(len(values)):
                value, losses = values[place].item(), []
                for step in (1e-5, -1e-5):
                    values[place] = value + step
                    losses.append(F.cross_entropy(made(shown), answers).item())
                values[place] = value
                expected += (value * (losses[0] - losses[1]) / 2e-5) ** 2 / 2
    assert scores[channel].item() == pytest.approx(expected, rel=1e-3)


def test_taylor_of_images_that_do_not_fit_at_once_is_the_same(small, monkeypatch):
    made, groups = small
    images = torch.randint(0, 256, (BATCH + 8, 3, 32, 32), dtype=torch.uint8)
    whole = rank("taylor", made, groups, images)["stem.0"].scores
    asked = []
    monkeypatch.setattr(importance, "images_at_once", lambda wanted, taken, **_: asked.append(taken) or 5)
    torch.testing.assert_close(rank("taylor", made, groups, images)["stem.0"].scores, whole)
    assert asked[0].each > 3 * 32 * 32 * 4
    assert asked[0].beside > 0  # The gradients of the weights.


def test_scales_and_weights_are_squared_and_shares_of_their_mean(small):
    made, groups = small
    scale = made.network.stem[1].weight.square()
    assert torch.allclose(rank("bn-scale", made, groups)["stem.0"].scores, scale / scale.mean())
    weight = made.network.stem[0].weight.square().flatten(1).sum(1)
    assert torch.allclose(rank("magnitude", made, groups)["stem.0"].scores, weight / weight.mean())


@pytest.mark.parametrize("groups", [1, 2], ids=["whole", "grouped"])
@pytest.mark.parametrize("name", ["taylor", "magnitude", "fold"])
def test_a_transposed_convolution_is_judged_by_what_it_gives(name, groups):
    """It stores its inputs first; a channel that is always 0 is worth least."""
    network = Net(
        nn.Sequential(nn.Conv2d(8, 12, 1), nn.ConvTranspose2d(12, 16, 2, 2, groups=groups), nn.Conv2d(16, 8, 1))
    )
    made = classifier(network)
    layer = network.get_submodule("between.1")
    for block in layer.weight.data.chunk(groups, 0):
        block[:, 3] = 0
    layer.bias.data.view(groups, -1)[:, 3] = 0
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    group = next(each for each in find_groups(made).groups if each.name == "between.1")
    ranking = rank(name, made, [group], images)["between.1"]
    assert len(ranking.scores) == 16
    if name != "fold":
        assert set(ranking.scores.argsort()[:groups].tolist()) == {3 + 16 // groups * each for each in range(groups)}


def test_batchnorms_without_statistics_can_be_folded():
    made = classifier(Net())
    for norm in (made.network.stem[1], made.network.body[1]):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    found = find_groups(made).groups
    assert all(ranking.tree for ranking in rank("fold", made, found).values())


def test_every_channel_is_worth_a_number(small):
    made, groups = small
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for name in ("taylor", "bn-scale", "magnitude", "fold", "random"):
        assert all(each.scores.isfinite().all() for each in rank(name, made, groups, images).values())


def test_random_is_of_its_seed_alone(small):
    made, groups = small
    one, again, other = (rank("random", made, groups, seed=seed)["stem.0"].scores for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["residual adds", "grouped", "depthwise"])
def test_folding_channels_that_are_twins_changes_no_answer(name):
    """Every second unit is made a copy of the one before it (of the same block), and all pairs are merged."""
    made = classifier(NETWORKS[name]())
    groups = find_groups(made).groups
    for group in groups:
        for block in range(int(group.blocks.max()) + 1):
            units = (group.blocks == block).nonzero()[:, 0]
            for layer, side, places in group.members:
                if side != "in":
                    for tensor in made.network.get_submodule(layer).state_dict().values():
                        if tensor.dim():
                            pairs = places[units[: len(units) // 2 * 2]].view(-1, 2)
                            tensor[pairs[:, 1]] = tensor[pairs[:, 0]]
    ranking = rank("fold", made, groups)
    pruned = copy.deepcopy(made)
    sizes = {group.name: group.units // (int(group.blocks.max()) + 1) for group in groups}
    kept = {group.name: (sizes[group.name] + 1) // 2 * (int(group.blocks.max()) + 1) for group in groups}
    cut(pruned, groups, {group.name: ranking[group.name].clusters(group, kept[group.name]) for group in groups})
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(pruned(images), made(images), rtol=1e-3, atol=1e-3)
    assert sum(each.numel() for each in pruned.parameters()) < 0.5 * sum(each.numel() for each in made.parameters())


def test_gradients_that_decide_are_in_exact_fp32(small, precisions):
    made, groups = small
    passes = precisions(made)
    rank("taylor", made, groups, torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert set(passes) == {"ieee"}
