"""After correction every channel has the float network's mean, and behind a BatchNorm its variance."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import in_float, quantize_layers
from dfcompress.models.hooks import kept_outputs
from dfcompress.quantization.bias_correction import correct
from dfcompress.quantization.ranges import calibrate


def teacher() -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 4),
    )
    for norm in (network[1], network[7]):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return Classifier(network, ModelCard("test", 4, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)).frozen()


def quantized(float_classifier: Classifier, images: torch.Tensor, bits: int) -> Classifier:
    student = copy.deepcopy(float_classifier)
    quantize_layers(student.network, dict.fromkeys(("0", "3", "6", "9"), (bits, bits)))
    calibrate(student, [images])
    return student


def outputs(classifier: Classifier, images: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    found = {}
    with kept_outputs(classifier.network, names, found.__setitem__):
        classifier(images)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_means_and_variances_are_those_of_the_float_network(bits):
    float_classifier, images = teacher(), torch.rand(64, 3, 8, 8)
    student = quantized(float_classifier, images, bits)
    names = ["1", "3", "7", "9"]
    wanted, before = outputs(float_classifier, images, names), outputs(student, images, names)
    correct(student, float_classifier, images)
    after = outputs(student, images, names)
    for name in names:
        dims = (0, 2, 3) if wanted[name].dim() == 4 else (0,)
        torch.testing.assert_close(after[name].mean(dims), wanted[name].mean(dims), rtol=1e-4, atol=1e-4)
        assert (before[name].mean(dims) - wanted[name].mean(dims)).abs().max() > 1e-3
    for name in ("1", "7"):
        dims = (0, 2, 3) if wanted[name].dim() == 4 else (0,)
        torch.testing.assert_close(after[name].var(dims), wanted[name].var(dims), rtol=2e-2, atol=1e-3)


def test_a_network_that_is_not_changed_is_not_corrected():
    float_classifier, images = teacher(), torch.rand(64, 3, 8, 8)
    student = quantized(float_classifier, images, 4)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with in_float(student.network):
        correct(student, float_classifier, images)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_a_channel_that_never_moves_stays_finite():
    float_classifier, images = teacher(), torch.zeros(8, 3, 8, 8)
    student = quantized(float_classifier, torch.rand(8, 3, 8, 8), 4)
    correct(student, float_classifier, images)
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())


def test_no_hook_and_no_training_mode_is_left():
    float_classifier, images = teacher(), torch.rand(8, 3, 8, 8)
    student = quantized(float_classifier, images, 4)
    correct(student, float_classifier, images)
    assert not student.training
    assert not any(module._forward_hooks for each in (student, float_classifier) for module in each.modules())


class ChannelsLast(nn.Module):
    """A linear layer on (N, H, W, C), and a BatchNorm on (N, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(images.permute(0, 2, 3, 1))
        return self.head(self.norm(mixed.flatten(1, 2).transpose(1, 2)).mean(2))


class Twice(nn.Module):
    """The same convolution and BatchNorm, two times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        once = self.norm(self.conv(images))
        return self.head(self.norm(self.conv(once)).mean((2, 3)))


def test_channels_are_where_the_layer_has_them():
    torch.manual_seed(0)
    card = ModelCard("test", 4, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)
    float_classifier, images = Classifier(ChannelsLast(), card).frozen(), torch.rand(32, 3, 8, 8)
    student = copy.deepcopy(float_classifier)
    quantize_layers(student.network, {"mix": (2, 3), "head": (2, 3)})
    calibrate(student, [images])
    correct(student, float_classifier, images)
    names = ["mix", "norm", "head"]
    wanted, after = outputs(float_classifier, images, names), outputs(student, images, names)
    for name, dims in (("mix", (0, 1, 2)), ("norm", (0, 2)), ("head", (0,))):
        torch.testing.assert_close(after[name].mean(dims), wanted[name].mean(dims), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after["norm"].var((0, 2)), wanted["norm"].var((0, 2)), rtol=1e-3, atol=1e-4)


def test_modules_that_run_twice_are_left_as_they_are():
    torch.manual_seed(0)
    card = ModelCard("test", 4, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)
    float_classifier, images = Classifier(Twice(), card).frozen(), torch.rand(32, 3, 8, 8)
    student = copy.deepcopy(float_classifier)
    quantize_layers(student.network, {"conv": (3, 4), "head": (3, 4)})
    calibrate(student, [images])
    correct(student, float_classifier, images)
    for name, tensor in float_classifier.network.state_dict().items():
        assert torch.equal(student.network.state_dict()[name], tensor) == (name != "head.bias")


@pytest.mark.parametrize("louder", [0.1, 10.0, 1e-9])
def test_means_of_dead_channels_are_corrected_as_those_of_others(louder):
    """Of a dead channel BatchNorm divides by its eps alone, and never by less."""
    float_classifier, images = teacher(), torch.rand(64, 3, 8, 8)
    float_classifier.network[1].running_var[:4] = 0.0
    student = copy.deepcopy(float_classifier)
    for parameter in student.network[0].parameters():
        parameter.mul_(louder)
    quantize_layers(student.network, {"0": (8, 8)})
    calibrate(student, [images])
    correct(student, float_classifier, images)
    wanted, after = (outputs(each, images, ["1"])["1"] for each in (float_classifier, student))
    scale = wanted.std((0, 2, 3))
    assert ((after.mean((0, 2, 3)) - wanted.mean((0, 2, 3))) / scale).abs().max() < 1e-3
    assert student.network[1].running_var.isfinite().all()
    assert (student.network[1].running_var >= 0).all()
