"""Learnt rounding ends on whole integers beside the weight, lowers a unit's error, and resumes to the same bits."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, quantize_layers, quantized_layers
from dfcompress.quantization import reconstruction
from dfcompress.quantization.bits import layers_of
from dfcompress.quantization.layer_report import signal_to_noise
from dfcompress.quantization.ranges import calibrate, fit_weights
from dfcompress.quantization.reconstruction import Reconstruction, images_that_fit, reconstruct, units_of

QUICK = Reconstruction(steps=60, batch_size=16, lr=0.03)


def images(count: int = 48) -> Tensor:
    random = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=random)


def teacher() -> Classifier:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), block, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    return Classifier(network, ModelCard("test", 4, (3, 8, 8), (0.5,) * 3, (0.3,) * 3)).frozen()


def calibrated(
    float_classifier: Classifier, bits: tuple[int, int] = (3, 4), asymmetric: Collection[int] = ()
) -> Classifier:
    student = copy.deepcopy(float_classifier)
    layers = dict.fromkeys(layers_of(float_classifier).quantizable, bits)
    quantize_layers(student.network, layers, asymmetric=asymmetric)
    fit_weights(student, rule="mse")
    calibrate(student, [images().float() / 255])
    return student


def test_units_are_residual_blocks_and_single_layers_in_the_order_they_run():
    network = find("cifar_resnet20").make(10, 3)
    classifier = Classifier(network, ModelCard("cifar_resnet20", 10, (3, 32, 32), (0.5,) * 3, (0.3,) * 3))
    quantize_layers(network, dict.fromkeys(layers_of(classifier).quantizable, (4, 32)))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert units_of(classifier) == ["conv1", *blocks, "fc"]


class Windows(nn.Module):
    """One layer sees four windows of an image as rows, another a table; a block holds a third and the head a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.windowed, self.of_table = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(2, 8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        windows = images.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        features = self.windowed(windows).mean((2, 3)).unflatten(0, (len(images), 4)).mean(1)
        features = features + self.of_table(torch.ones(5, 2)).mean(0)
        return self.head(self.block(features[..., None, None]).flatten(1))


def test_layers_whose_rows_are_no_images_keep_the_nearest_rounding():
    torch.manual_seed(0)
    windows = Classifier(Windows(), ModelCard("test", 4, (3, 8, 8), (0.5,) * 3, (0.3,) * 3)).frozen()
    student = calibrated(windows)
    assert units_of(student) == ["block.0", "head"]
    found = reconstruct(student, windows, images(), QUICK, seed=0, state=None)
    assert found.units == 2
    assert {name for name, layer in quantized_layers(student.network).items() if layer.is_frozen} == {"block.0", "head"}


def test_units_of_a_plain_chain_are_its_layers():
    assert units_of(calibrated(teacher())) == ["0", "2.0", "5"]


@pytest.mark.parametrize("asymmetric", [(), (3,)], ids=["symmetric", "asymmetric"])
def test_every_weight_ends_on_one_of_its_two_integers_and_the_answers_come_closer(asymmetric):
    float_classifier = teacher()
    student = calibrated(float_classifier, asymmetric=asymmetric)
    nearest = copy.deepcopy(student)
    freeze(nearest.network)
    grids = {name: layer.grid_now() for name, layer in quantized_layers(student.network).items()}
    done = reconstruct(student, float_classifier, images(), QUICK, seed=0, state=None)
    assert done.units == 3
    assert done.steps == 180
    moved = 0
    for name, layer in quantized_layers(student.network).items():
        integers, grid = layer.integer_weight()
        assert torch.equal(grid.scale, grids[name].scale)
        assert torch.equal(grid.zero_point, grids[name].zero_point)
        weight = float_classifier.network.get_submodule(name).weight
        exact = (weight.flatten(1) / grid.scale[:, None] + grid.zero_point[:, None]).clamp(*grid.integers())
        assert ((integers.flatten(1) - exact).abs() < 1.0001).all()
        moved += int((integers != quantized_layers(nearest.network)[name].integer_weight()[0]).sum())
    assert moved > 0
    tested = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    wanted = float_classifier(tested)
    assert (student(tested) - wanted).square().mean() < (nearest(tested) - wanted).square().mean()


class TwoInputs(nn.Module):
    """A block that takes what went past another one, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.again, self.head = (
            nn.Conv2d(3, 8, 3),
            _Joined(),
            nn.Conv2d(8, 8, 1),
            nn.Linear(8, 4),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = self.again(self.again(self.block(features, features)))
        return self.head(features.mean((2, 3)))


class _Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        return self.conv(features) + skipped


def test_blocks_of_two_inputs_are_taken_apart_and_layers_that_run_twice_keep_their_rounding():
    torch.manual_seed(0)
    card = ModelCard("test", 4, (3, 8, 8), (0.5,) * 3, (0.3,) * 3)
    float_classifier = Classifier(TwoInputs(), card).frozen()
    student = calibrated(float_classifier)
    assert units_of(student) == ["stem", "block.conv", "head"]
    reconstruct(student, float_classifier, images(), QUICK, seed=0, state=None)
    assert not quantized_layers(student.network)["again"].is_frozen
    freeze(student.network)
    noise = signal_to_noise(student, float_classifier, images().float() / 255)
    assert all(noise[name] > 3 for name in ("stem", "block.conv", "again", "head"))


def test_signal_to_noise_is_ten_decibels_a_factor_of_ten():
    float_classifier = teacher()
    student = calibrated(float_classifier, (8, 32))
    freeze(student.network)
    layer = quantized_layers(student.network)["5"]
    before = signal_to_noise(student, float_classifier, images().float() / 255)
    with torch.no_grad():
        exact = float_classifier.network[5]
        layer.weight.copy_(exact.weight)
        layer.bias.copy_(exact.bias + 0.5)
    features = images().float() / 255
    for number in range(5):
        student.network[number] = float_classifier.network[number]
    wanted = float_classifier(features)
    expected = 10 * torch.log10(wanted.square().sum() / (0.25 * wanted.numel())).item()
    assert signal_to_noise(student, float_classifier, features)["5"] == pytest.approx(expected, rel=1e-4)
    assert before["5"] > 25


def rewritten(*, inplace: bool) -> Classifier:
    """A network whose block begins with an activation that may write into the block's input."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.SiLU(inplace), nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Block(block), nn.ReLU(inplace), nn.Flatten(), nn.Linear(32, 4))
    return Classifier(network, ModelCard("test", 4, (3, 8, 8), (0.5,) * 3, (0.3,) * 3)).frozen()


class Block(nn.Module):
    """One unit of two layers, with a shortcut."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features)


def test_networks_that_work_in_place_get_the_numbers_of_the_same_function_that_does_not():
    """Features and outputs are those of the moment: both networks compute the same, so both are treated the same."""
    found = []
    for inplace in (False, True):
        float_classifier = rewritten(inplace=inplace)
        student = calibrated(float_classifier)
        before = signal_to_noise(student, float_classifier, images().float() / 255)
        done = reconstruct(student, float_classifier, images(), QUICK, seed=0, state=None)
        after = signal_to_noise(student, float_classifier, images().float() / 255)
        found.append((before, done.losses, after))
    assert found[1] == found[0]
    assert list(found[0][1]) == ["0", "1", "4"]


def test_rounding_is_pushed_to_whole_integers_and_steps_of_inputs_are_learnt(monkeypatch: pytest.MonkeyPatch):
    shares: list[Tensor] = []
    harden = reconstruction.SoftRounding.harden

    def watched(rounding: reconstruction.SoftRounding) -> None:
        shares.append(rounding.h().detach().flatten())
        harden(rounding)

    monkeypatch.setattr(reconstruction.SoftRounding, "harden", watched)
    float_classifier = teacher()
    student = calibrated(float_classifier)
    before = {name: layer.input_grid for name, layer in quantized_layers(student.network).items()}
    settings = Reconstruction(steps=250, batch_size=16, lr=0.05, input_lr=1e-3, rounding=0.05)
    reconstruct(student, float_classifier, images(), settings, seed=0, state=None)
    undecided = torch.cat(shares)
    assert ((undecided < 0.05) | (undecided > 0.95)).double().mean() > 0.9
    for name, layer in quantized_layers(student.network).items():
        assert layer.input_grid.scale != before[name].scale
        assert layer.input_grid.scale == pytest.approx(before[name].scale, rel=0.5)


def test_dropping_the_quantization_of_activations_changes_what_is_learnt():
    float_classifier = teacher()
    students = [calibrated(float_classifier, (3, 2)) for _ in range(2)]
    for student, drop in zip(students, (0.0, 0.5), strict=True):
        settings = replace(QUICK, drop=drop)
        reconstruct(student, float_classifier, images(), settings, seed=0, state=None)
    assert not torch.equal(students[0].network[5].weight, students[1].network[5].weight)


def test_features_of_large_images_take_no_more_memory_than_allowed(monkeypatch: pytest.MonkeyPatch):
    float_classifier, passed = teacher(), []
    convolution = 4 * (2 * 3 * 8 * 8 + 8 * 6 * 6)
    monkeypatch.setattr(reconstruction, "FEATURES", 10 * convolution)
    assert images_that_fit(float_classifier, "0", room=10 * convolution) == 10
    assert images_that_fit(float_classifier, "5", room=10 * convolution) == 10 * convolution // (4 * (2 * 32 + 4))
    features = reconstruction._features

    def watched(classifier: Classifier, name: str, some: Tensor, *sides: str) -> list[Tensor]:
        passed.append((name, len(some)))
        return features(classifier, name, some, *sides)

    monkeypatch.setattr(reconstruction, "_features", watched)
    reconstruct(calibrated(float_classifier), float_classifier, images(), QUICK, seed=0, state=None)
    assert max(count for name, count in passed if name == "0") == 10
    assert max(count for name, count in passed if name == "5") == 48


class StoppedError(Exception):
    """A kill."""


@pytest.mark.parametrize("asymmetric", [(), (3,)], ids=["symmetric", "asymmetric"])
def test_a_stopped_reconstruction_goes_on_to_the_same_bits(
    asymmetric: Collection[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    float_classifier, state = teacher(), tmp_path / "state"
    whole = calibrated(float_classifier, asymmetric=asymmetric)
    expected = reconstruct(whole, float_classifier, images(), QUICK, seed=0, state=None)

    def stop_after_one(*arguments: object) -> None:
        saving(*arguments)
        raise StoppedError

    saving = reconstruction.save_state
    monkeypatch.setattr(reconstruction, "save_state", stop_after_one)
    stopped = calibrated(float_classifier, asymmetric=asymmetric)
    with pytest.raises(StoppedError):
        reconstruct(stopped, float_classifier, images(), QUICK, seed=0, state=state)
    monkeypatch.undo()
    resumed = calibrated(float_classifier, asymmetric=asymmetric)
    done = reconstruct(resumed, float_classifier, images(), QUICK, seed=0, state=state)
    assert done.losses == expected.losses
    for name, layer in quantized_layers(whole.network).items():
        assert torch.equal(quantized_layers(resumed.network)[name].weight, layer.weight)
        assert quantized_layers(resumed.network)[name].input_grid == layer.input_grid


def test_seeds_differ():
    float_classifier = teacher()
    students = [calibrated(float_classifier) for _ in range(3)]
    for student, seed in zip(students, (0, 0, 1), strict=True):
        reconstruct(student, float_classifier, images(), QUICK, seed=seed, state=None)
    weights = [student.network[0].weight for student in students]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"drop": -0.5}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput, match="is not possible"):
        Reconstruction(**wrong)
