"""Learnt rounding ends on whole integers beside the weight, lowers a unit's error, and resumes to the same bits."""

from __future__ import annotations

import copy
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
from dfcompress.quantization.ranges import calibrate, fit_weights
from dfcompress.quantization.reconstruction import Reconstruction, reconstruct, units_of

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


def calibrated(float_classifier: Classifier, bits: tuple[int, int] = (3, 4)) -> Classifier:
    student = copy.deepcopy(float_classifier)
    quantize_layers(student.network, dict.fromkeys(layers_of(float_classifier).quantizable, bits))
    fit_weights(student, rule="mse")
    calibrate(student, [images().float() / 255])
    return student


def test_units_are_residual_blocks_and_single_layers_in_the_order_they_run():
    network = find("cifar_resnet20").make(10, 3)
    classifier = Classifier(network, ModelCard("cifar_resnet20", 10, (3, 32, 32), (0.5,) * 3, (0.3,) * 3))
    quantize_layers(network, dict.fromkeys(layers_of(classifier).quantizable, (4, 32)))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert units_of(classifier) == ["conv1", *blocks, "fc"]


def test_units_of_a_plain_chain_are_its_layers():
    assert units_of(calibrated(teacher())) == ["0", "2.0", "5"]


def test_every_weight_ends_on_one_of_its_two_integers_and_the_answers_come_closer():
    float_classifier = teacher()
    student = calibrated(float_classifier)
    nearest = copy.deepcopy(student)
    freeze(nearest.network)
    scales = {name: layer.scale_now() for name, layer in quantized_layers(student.network).items()}
    done = reconstruct(student, float_classifier, images(), QUICK, seed=0, state=None)
    assert done.units == 3
    assert done.steps == 180
    moved = 0
    for name, layer in quantized_layers(student.network).items():
        integers, scale = layer.integer_weight()
        assert torch.equal(scale, scales[name])
        weight = float_classifier.network.get_submodule(name).weight
        exact = (weight.flatten(1) / scale[:, None]).clamp(-3, 3)
        assert ((integers.flatten(1) - exact).abs() < 1.0001).all()
        moved += int((integers != quantized_layers(nearest.network)[name].integer_weight()[0]).sum())
    assert moved > 0
    tested = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    wanted = float_classifier(tested)
    assert (student(tested) - wanted).square().mean() < (nearest(tested) - wanted).square().mean()


class StoppedError(Exception):
    """A kill."""


def test_a_stopped_reconstruction_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    float_classifier, state = teacher(), tmp_path / "state"
    whole = calibrated(float_classifier)
    expected = reconstruct(whole, float_classifier, images(), QUICK, seed=0, state=None)

    def stop_after_one(*arguments: object) -> None:
        saving(*arguments)
        raise StoppedError

    saving = reconstruction.save_state
    monkeypatch.setattr(reconstruction, "save_state", stop_after_one)
    with pytest.raises(StoppedError):
        reconstruct(calibrated(float_classifier), float_classifier, images(), QUICK, seed=0, state=state)
    monkeypatch.undo()
    resumed = calibrated(float_classifier)
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
    with pytest.raises(BadInput, match="no reconstruction"):
        Reconstruction(**wrong)
