"""Layers that normalise as BatchNorm does count as one, by what they answer; others are named and left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from dfcompress import console
from dfcompress.models.batchnorms import plain_batchnorms
from dfcompress.models.bn_folding import fold_batchnorms
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load, opened
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import FusedRecorder, HookRecorder
from dfcompress.models.saving import save
from dfcompress.models.statistics import (
    require_statistics,
    statistics_layers,
    unused_statistics,
    why_no_statistics,
)


class Own(nn.Module):
    """Calls `F.batch_norm` on its own buffers; then `after`."""

    def __init__(self, channels: int, eps: float = 1e-5, after=lambda features: features) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.fixed_eps, self.after = eps, after

    def forward(self, features: Tensor) -> Tensor:
        normal = F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.fixed_eps
        )
        return self.after(normal)


class Inside(Own):
    """Normalises what it has made of its input."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features * 2)


def with_eps(channels):
    return Own(channels, eps=1e-2)


def with_activation(channels):
    return Own(channels, after=F.relu)


def with_tracking(channels):
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


SOURCE = """
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
def made(norm):
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
def frozen(): return made(FrozenBatchNorm2d)
def sync(): return made(nn.SyncBatchNorm)
def plain(): return made(nn.BatchNorm2d)
"""


def classifier(norm, channels=8):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, channels, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(36 * channels, 5))
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.dim():
            positive = name.endswith(("running_var", "weight"))
            tensor.data.copy_(torch.rand(len(tensor)) + 0.5 if positive else torch.randn(len(tensor)))
            if name == "running_var":
                tensor[0] = 0.0
    return Classifier(network, ModelCard("test", 5, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)).frozen()


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.SyncBatchNorm, Own])
def test_what_answers_as_batchnorm_becomes_one(norm):
    made = classifier(norm(8))
    before, keys = made(IMAGES), made.network.state_dict().keys()
    plain_batchnorms(made)
    assert type(made.network[1]) is nn.BatchNorm2d
    assert made.network.state_dict().keys() - keys <= {"1.num_batches_tracked"}
    assert keys <= made.network.state_dict().keys()
    torch.testing.assert_close(made(IMAGES), before, rtol=1e-5, atol=1e-5)
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert fold_batchnorms(made) == ["1"]


def test_over_vectors_it_becomes_the_one_for_vectors_under_every_name():
    torch.manual_seed(0)
    shared = nn.SyncBatchNorm(6)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), shared, nn.Linear(6, 6), shared, nn.Linear(6, 5))
    made = Classifier(network, ModelCard("test", 5, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)).frozen()
    plain_batchnorms(made)
    assert type(made.network[2]) is nn.BatchNorm1d
    assert made.network[4] is made.network[2]


@pytest.mark.parametrize("recorder", [HookRecorder, FusedRecorder])
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.SyncBatchNorm, Own, with_eps, with_activation])
def test_its_statistics_are_those_of_the_batchnorm_with_the_same_numbers(norm, recorder):
    made = classifier(norm(8))
    twin = copy.deepcopy(made)
    twin.network[1] = nn.BatchNorm2d(8, eps=1e-2 if norm is with_eps else 1e-5).eval()
    twin.network[1].load_state_dict(made.network[1].state_dict(), strict=False)
    answers = made(IMAGES)
    plain_batchnorms(made)
    found = [recorded(recorder, each.network) for each in (made, twin)]
    for own, expected in zip(found[0].layers[0], found[1].layers[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].logits, made.network(made.normalise(IMAGES)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(IMAGES), answers, rtol=1e-4, atol=1e-4)


def recorded(make, network):
    return make(network, moments=True)((IMAGES - 0.4) / 0.3)


@pytest.mark.parametrize("norm", [Inside, with_tracking])
def test_statistics_of_anything_but_the_input_are_named_and_not_used(norm):
    made = classifier(norm(8))
    before = made(IMAGES)
    plain_batchnorms(made)
    assert torch.equal(made(IMAGES), before)
    assert statistics_layers(made.network) == []
    assert unused_statistics(made.network) == ["1"]
    assert why_no_statistics(made.network) == "the running statistics of 1 are not those of a BatchNorm's input"


def test_statistics_that_are_left_out_beside_others_are_named(capsys):
    made = classifier(nn.Sequential(nn.BatchNorm2d(8), Inside(8)))
    console.configure(console.NORMAL)
    try:
        require_statistics(made)
    finally:
        console.configure(console.QUIET)
    assert "statistics of 1.1 are not those" in capsys.readouterr().err


@pytest.mark.parametrize("factory", ["frozen", "sync"])
def test_a_file_of_it_is_loaded_saved_and_loaded_again(factory, tmp_path):
    (tmp_path / "nets.py").write_text(SOURCE)
    space: dict = {}
    exec(SOURCE, space)
    made = space[factory]()
    made[1].running_var.uniform_(0.5, 2.0)
    torch.save(made.state_dict(), tmp_path / "net.pt")
    arch = {"arch": f"{tmp_path / 'nets.py'}:{factory}", "input_size": (3, 8, 8)}
    first = load(tmp_path / "net.pt", **arch)
    assert type(first.network[1]) is nn.BatchNorm2d
    save(first, tmp_path / "saved")
    again = load(tmp_path / "saved", **arch)
    torch.testing.assert_close(first.network(IMAGES), made.eval()(IMAGES), rtol=1e-5, atol=1e-5)
    assert torch.equal(again(IMAGES), first(IMAGES))


def test_frozen_batchnorms_of_timm_become_batchnorms_with_their_activation_behind_them():
    norms = pytest.importorskip("timm.layers")
    made = classifier(norms.FrozenBatchNormAct2d(8, act_layer=nn.PReLU))
    before, keys = made(IMAGES), made.network.state_dict().keys()
    settled = opened(made)
    assert isinstance(settled.network[1], _BatchNorm)
    assert [type(each) for each in opened(settled).network.modules()] == [*map(type, settled.network.modules())]
    assert settled.network.state_dict().keys() - keys == {"1.num_batches_tracked"}
    assert keys <= settled.network.state_dict().keys()
    for make in (HookRecorder, FusedRecorder):
        recording = recorded(make, settled.network)
        assert len(recording.layers) == 1
        torch.testing.assert_close(recording.logits, before, rtol=1e-4, atol=1e-4)
    assert fold_batchnorms(settled) == ["1"]
    torch.testing.assert_close(settled(IMAGES), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", [1e-6, 1.0, 1e3])
def test_an_eps_that_is_not_stated_is_found(variance):
    made = classifier(Own(8, eps=1e-3))
    made.network[1].running_var.fill_(variance)
    plain_batchnorms(made)
    assert made.network[1].eps == 1e-3


def test_a_stated_eps_that_is_not_used_is_not_believed():
    norm = Own(8, eps=1e-3)
    norm.eps = 1e-5
    made = classifier(norm)
    norm.running_var.fill_(1e3)
    plain_batchnorms(made)
    assert made.network[1] is norm


def test_a_layer_with_a_hook_of_its_own_keeps_it():
    norm = nn.SyncBatchNorm(8)
    norm.register_forward_hook(lambda layer, given, output: output)
    made = classifier(norm)
    plain_batchnorms(made)
    assert made.network[1] is norm


class ByKeyword(nn.Module):
    """Hands its features over by the name that torch gives them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(input=features)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_batchnorm_called_by_keyword_is_replaced_and_recorded(norm):
    made = classifier(nn.Identity())
    made.network[1] = ByKeyword(norm(8)).eval()
    before = made(IMAGES)
    plain_batchnorms(made)
    assert type(made.network[1].norm) is nn.BatchNorm2d
    one, other = (recorded(make, made.network) for make in (HookRecorder, FusedRecorder))
    torch.testing.assert_close(one.logits, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_a_classifier_made_in_python_gets_plain_batchnorms_in_a_copy():
    made = classifier(nn.SyncBatchNorm(8))
    settled = opened(made)
    assert type(settled.network[1]) is nn.BatchNorm2d
    assert type(made.network[1]) is nn.SyncBatchNorm
    assert [type(each) for each in opened(settled).network.modules()] == [*map(type, settled.network.modules())]
    torch.testing.assert_close(settled(IMAGES), made(IMAGES), rtol=1e-4, atol=1e-4)
