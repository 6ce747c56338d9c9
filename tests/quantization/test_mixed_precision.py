"""Sensitivity finds the layer that matters, and chosen bits keep the size and spend it there."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, quantize_layers
from dfcompress.models.grids import WIDTHS, Scheme
from dfcompress.models.saving import save, saved_bytes, state_bytes
from dfcompress.quantization import mixed_precision
from dfcompress.quantization.bits import RequestedBits
from dfcompress.quantization.mixed_precision import (
    WORK,
    _cheapest,
    choose_bits,
    images_to_measure_on,
    require_reachable,
    sensitivities,
)
from dfcompress.quantization.ranges import calibrate

LAYERS = ("0", "2", "4", "8")


def teacher() -> Classifier:
    """Layer 2 passes everything on through few, unlike weights; layer 4 hardly changes what passes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        network[8].weight.mul_(20)
    return Classifier(network, ModelCard("test", 4, (3, 8, 8), (0.5,) * 3, (0.3,) * 3)).frozen()


def images(count: int = 32) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def wanted(weights: int | None = None) -> dict[str, RequestedBits]:
    return dict.fromkeys(LAYERS, RequestedBits(weights, 8))


def test_each_layer_is_asked_alone_and_fewer_bits_cost_more():
    found = {}
    for bits in (2, 8):
        student = copy.deepcopy(teacher())
        quantize_layers(student.network, dict.fromkeys(LAYERS, (bits, 32)))
        found[bits] = sensitivities(student, images(), LAYERS)
    assert list(found[2]) == list(LAYERS)
    assert all(found[2][name] > 10 * found[8][name] > 0 for name in LAYERS)


def test_what_a_network_that_is_sure_loses_is_not_lost_in_rounding():
    sure = teacher()
    sure.network[8].bias.data[0] += 20
    quantize_layers(sure.network, dict.fromkeys(LAYERS, (8, 32)))
    assert all(0 < found < 1e-7 for found in sensitivities(sure, images(), LAYERS).values())


@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(True), Scheme(asymmetric=WIDTHS), Scheme(asymmetric=(2, 3))], ids=str
)
@pytest.mark.parametrize("ratio", [0.26, 0.28, 0.3, 0.33])
def test_the_file_keeps_the_size_and_uses_it(tmp_path, ratio, scheme):
    classifier = teacher()
    chosen = choose_bits(classifier, wanted(), images(), size_ratio=ratio, scheme=scheme)
    student = copy.deepcopy(classifier)
    quantize_layers(student.network, chosen, asymmetric=scheme.asymmetric)
    calibrate(student, [images()], signed=scheme.signed)
    freeze(student.network)
    save(student, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size == saved_bytes(student)
    allowed = ratio * state_bytes(classifier.network)
    largest = max(classifier.network.get_submodule(name).weight.numel() for name in LAYERS)
    # Marks and the tensor of zero points are counted for layers that end at a width without.
    unneeded = 200 if scheme.asymmetric == (2, 3) else 0
    assert allowed - largest / 8 - 100 - unneeded < size <= allowed


def test_bits_that_were_asked_for_stay_and_the_rest_is_chosen():
    asked = wanted() | {"0": RequestedBits(8, 8)}
    assert choose_bits(teacher(), asked, images(), size_ratio=0.3, scheme=Scheme())["0"].weights == 8
    given = choose_bits(teacher(), wanted(3), images(), size_ratio=None, scheme=Scheme())
    assert given == dict.fromkeys(LAYERS, (3, 8))


def test_the_choice_is_the_best_of_all():
    random = np.random.default_rng(0)
    for _ in range(20):
        costs = np.sort(random.random((4, 3)))[:, ::-1]
        sizes = np.sort(random.integers(1, 30, (4, 3)))
        room = float(sizes.min(1).sum() + random.integers(0, 40))
        best = min(
            (sum(costs[row, place] for row, place in enumerate(places)), places)
            for places in itertools.product(range(3), repeat=4)
            if sum(sizes[row, place] for row, place in enumerate(places)) <= room
        )
        chosen = _cheapest(costs, sizes, room)
        assert sum(costs[row, place] for row, place in enumerate(chosen)) == pytest.approx(best[0])
        assert sum(sizes[row, place] for row, place in enumerate(chosen)) <= room


def test_a_size_below_two_bits_is_refused_with_the_least_there_is():
    with pytest.raises(BadInput, match=r"0\.05 cannot be kept: with 2-bit weights the file is 0\.\d+ of the model"):
        require_reachable(teacher(), wanted(), 0.05, Scheme())


@pytest.mark.parametrize("ratio", [None, 0.0, 1.5])
def test_auto_needs_a_share(ratio):
    with pytest.raises(BadInput, match=r"--size-ratio 0\.15"):
        require_reachable(teacher(), wanted(), ratio, Scheme())


def test_a_size_without_anything_to_choose_is_refused():
    with pytest.raises(BadInput, match="all are given"):
        require_reachable(teacher(), wanted(4), 0.2, Scheme())


@pytest.mark.parametrize(
    ("side", "available", "work", "bits", "count"),
    [
        (32, 960, 1, 4, 128),
        (64, 960, 1, 4, 128),
        (64, 50, 1, 4, 50),
        (128, 960, 1, 4, 32),
        (224, 960, 1, 4, 16),
        (224, 9, 1, 4, 9),
        (224, 960, WORK / 20, 4, 5),  # In each of 4 layers.
        (224, 960, WORK, 4, 2),
        (224, 960, WORK, None, 16),  # Bits depend on the images.
    ],
)
def test_images_of_many_pixels_and_of_large_networks_are_measured_on_fewer(
    side, available, work, bits, count, monkeypatch
):
    """Every layer costs a pass of them."""
    monkeypatch.setattr(mixed_precision, "multiply_accumulates", lambda teacher: work)
    made = teacher()
    made.card = replace(made.card, input_size=(3, side, side))
    assert len(wanted(bits)) == 4
    assert images_to_measure_on(made, wanted(bits), available) == count
