"""What follows absorbs what can be predicted, and BatchNorms give what they gave."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from odd_networks import Net
from test_groups import classifier
from torch import Tensor, nn

from dfcompress.models.hooks import hooked_outputs
from dfcompress.pruning.groups import clusters_of, cut, find_groups
from dfcompress.pruning.repair import refit

pytest.importorskip("torch_pruning")
IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)


def test_a_channel_that_the_others_give_together_is_absorbed_without_loss():
    """The last three channels are mixtures of the first five, before a 3x3 layer and a linear one with a bias."""
    made = classifier(Net(norm=lambda channels: nn.Identity(), act=nn.Identity))
    for layer in (made.network.stem[0], made.network.body[0]):
        layer.weight.data[5:] = torch.einsum("oi,i...->o...", torch.randn(3, 5), layer.weight.data[:5])
    groups = find_groups(made).groups
    clusters = {group.name: clusters_of(torch.arange(8) < 5) for group in groups}
    shown, pruned, plain = IMAGES.float() / 255, copy.deepcopy(made), copy.deepcopy(made)
    cut(pruned, groups, clusters)
    refit(pruned, made, groups, clusters, IMAGES)
    cut(plain, groups, clusters)
    error = (pruned(shown) - made(shown)).abs().max() / made(shown).std()
    assert error < 0.02
    assert (plain(shown) - made(shown)).abs().max() / made(shown).std() > 10 * error


def test_the_mean_of_a_channel_that_nothing_predicts_goes_into_the_bias():
    made = classifier(Net(norm=lambda channels: nn.Identity(), head=nn.Linear))
    groups = [group for group in find_groups(made).groups if group.name == "body.0"]
    clusters = {"body.0": clusters_of(torch.arange(8) < 4)}
    pruned, shown = copy.deepcopy(made), IMAGES.float() / 255
    cut(pruned, groups, clusters)
    refit(pruned, made, groups, clusters, IMAGES)
    torch.testing.assert_close(pruned(shown).mean(0), made(shown).mean(0), rtol=1e-3, atol=1e-3)


def test_behind_a_batchnorm_every_channel_has_the_mean_and_the_variance_that_it_had():
    made = classifier(Net())
    groups = find_groups(made).groups
    clusters = {group.name: clusters_of(torch.arange(8) % 2 == 0) for group in groups}
    pruned, shown, seen = copy.deepcopy(made), IMAGES.float() / 255, {}
    cut(pruned, groups, clusters)
    refit(pruned, made, groups, clusters, IMAGES)
    for each, note in ((made, "before"), (pruned, "after")):
        with hooked_outputs(each.network, ["body.1"], lambda name, output, note=note: seen.__setitem__(note, output)):
            each(shown)
    before, after = seen["before"][:, ::2], seen["after"]
    torch.testing.assert_close(after.mean((0, 2, 3)), before.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.var((0, 2, 3)), before.var((0, 2, 3)), rtol=1e-3, atol=1e-3)


class Pools(nn.Module):
    """Every channel goes several times into what follows: beside itself pooled, and by its maximum and its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 8, 3), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = self.body(torch.cat([features, F.avg_pool2d(features, 3, 1, 1)], 1))
        return self.head(torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1))


def test_channels_that_go_several_times_into_a_layer_are_fitted_each_for_itself():
    made = classifier(Pools())
    groups = find_groups(made).groups
    assert {group.name for group in groups} == {"stem", "body"}
    clusters = {group.name: clusters_of(torch.arange(8) < 6) for group in groups}
    plain, shown = copy.deepcopy(made), IMAGES.float() / 255
    cut(plain, groups, clusters)
    pruned = copy.deepcopy(plain)
    refit(pruned, made, groups, clusters, IMAGES)
    error, before = ((each(shown) - made(shown)).square().mean() for each in (pruned, plain))
    assert error < 0.1 * before
    variance = made(shown).var(0).mean()
    assert error < 0.5 * variance
