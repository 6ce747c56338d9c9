"""Calibration averages the extremes of 16-image chunks, and real few-bit networks stay good classifiers."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.machine.memory import count_bytes
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, quantize_layers, quantized_layers
from dfcompress.models.grids import InputGrid, WeightGrid
from dfcompress.models.packing import pack_network, unpack_network
from dfcompress.quantization import observers
from dfcompress.quantization.bits import layers_of
from dfcompress.quantization.calibration import Calibration, usual_steps
from dfcompress.quantization.observers import mse, range_rules
from dfcompress.quantization.observers.mse import SHARES
from dfcompress.quantization.ranges import calibrate, fit_weights


def one_layer_classifier(*, mean: float = 0.0, std: float = 1.0) -> Classifier:
    """Its only layer sees the normalised images, which here are single pixels."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    quantize_layers(network, {"0": (8, 8)})
    return Classifier(network, ModelCard("test", 2, (1, 1, 1), (mean,), (std,)))


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def calibrated_grid(classifier: Classifier, *batches: Tensor) -> InputGrid:
    calibrate(classifier, batches)
    grid = quantized_layers(classifier.network)["0"].input_grid
    assert grid is not None
    return grid


def test_the_range_is_the_mean_of_the_extremes_of_sixteen_image_chunks():
    first_chunk = pixels(*[0.5] * 15, 1.0)
    second_chunk = pixels(*[0.1] * 15, 0.2)
    grid = calibrated_grid(one_layer_classifier(), torch.cat([first_chunk, second_chunk]))
    assert grid == InputGrid.covering(0.0, (1.0 + 0.2) / 2, bits=8)


def test_images_are_seen_as_the_network_sees_them():
    grid = calibrated_grid(one_layer_classifier(mean=0.5, std=0.25), pixels(*[0.0] * 8, *[0.75] * 8))
    assert grid == InputGrid.covering(-2.0, 1.0, bits=8)


def test_how_the_chunks_are_batched_does_not_matter():
    images = torch.rand(64, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    at_once = calibrated_grid(one_layer_classifier(), images)
    assert calibrated_grid(one_layer_classifier(), *images.split(16)) == at_once
    assert calibrated_grid(one_layer_classifier(), *images.split(5)) == at_once
    assert calibrated_grid(one_layer_classifier(), images[:48], images[48:]) == at_once


def test_calibrating_again_forgets_the_old_range():
    classifier = one_layer_classifier()
    calibrated_grid(classifier, pixels(100.0))
    assert calibrated_grid(classifier, pixels(1.0)) == InputGrid.covering(0.0, 1.0, bits=8)


def test_calibration_leaves_modes_statistics_and_hooks_as_they_were():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1)).train()
    quantize_layers(network, {"1": (8, 8)})
    classifier = Classifier(network, ModelCard("test", 2, (1, 1, 1), (0.0,), (1.0,)))
    calibrate(classifier, [pixels(0.1, 0.9)])
    assert network[0].training
    assert network[0].running_mean.item() == 0.0
    assert not network[1]._forward_pre_hooks


def test_ranges_are_those_of_the_float_network():
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    network[0].weight = nn.Parameter(torch.tensor([1.0, 0.75]).view(2, 1, 1, 1))
    network[1].weight = nn.Parameter(torch.tensor([1.0, -0.25]).view(1, 2, 1, 1))  # at 2 bits: 1 and 0
    network.append(nn.Linear(1, 1))
    quantize_layers(network, {"0": (8, 8), "1": (2, 8), "2": (8, 8)})
    calibrate(Classifier(network, ModelCard("test", 1, (1, 1, 1), (0.0,), (1.0,))), [pixels(1.0)])
    assert quantized_layers(network)["2"].input_grid == InputGrid.covering(0.0, 1 - 0.25 * 0.75, bits=8)


class Overwritten(nn.Module):
    """After a layer has taken them, its input's activations grow tenfold, in place or not."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.layer, self.inplace = nn.Conv2d(1, 1, 1), inplace

    def forward(self, images: Tensor) -> Tensor:
        features = images * 1.0
        answers = self.layer(features)
        return (answers + (features.mul_(10) if self.inplace else features * 10)).flatten(1)


@pytest.mark.parametrize("rule", range_rules())
def test_an_input_that_is_overwritten_later_has_the_range_it_had(rule):
    grids = []
    for inplace in (False, True):
        torch.manual_seed(0)
        card = ModelCard("test", 4, (1, 2, 2), (0.0,), (1.0,))
        classifier = Classifier(Overwritten(inplace=inplace), card)
        quantize_layers(classifier.network, {"layer": (4, 4)})
        calibrate(classifier, [torch.rand(32, 1, 2, 2)], rule=rule)
        grids.append(quantized_layers(classifier.network)["layer"].input_grid)
    assert grids[0] == grids[1]
    assert grids[0].scale < 0.1


def test_float_activations_get_no_range():
    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    quantize_layers(network, {"0": (4, 32)})
    classifier = Classifier(network, ModelCard("test", 2, (1, 1, 1), (0.0,), (1.0,)))
    calibrate(classifier, [pixels(0.5)])
    assert quantized_layers(network)["0"].input_grid is None


HALFWAY = """
import torch
class Observer:
    def observe(self, activations): self.largest = activations.max().item()
    def range(self, *, bits, signed): return 0.0, self.largest / 2
def weight_shares(weight, kind): return torch.full((2, len(weight)), 0.5)
"""


def test_a_rule_is_one_file_in_the_folder(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"no --calibrate 'halfway'\. Known: .*minmax, mse"):
        Calibration(inputs="halfway")
    (tmp_path / "halfway.py").write_text(HALFWAY)
    monkeypatch.setattr(observers, "__path__", [*observers.__path__, str(tmp_path)])
    assert "halfway" in range_rules()
    assert Calibration(inputs="halfway", weights="halfway").inputs == "halfway"
    classifier = one_layer_classifier()
    calibrate(classifier, [pixels(0.2, 1.0)], rule="halfway")
    fit_weights(classifier, rule="halfway")
    layer = quantized_layers(classifier.network)["0"]
    assert layer.input_grid == InputGrid.covering(0.0, 0.5, bits=8)
    assert layer.weight_shares.tolist() == [[0.5, 0.5]] * 2


def test_least_error_gives_up_a_few_far_values_at_few_bits():
    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    quantize_layers(network, {"0": (8, 2)})
    classifier = Classifier(network, ModelCard("test", 2, (1, 1, 1), (0.0,), (1.0,)))
    random = torch.Generator().manual_seed(0)
    images = torch.randn(4000, 1, 1, 1, generator=random).abs()
    calibrate(classifier, [images], rule="mse")
    grid = quantized_layers(network)["0"].input_grid
    ends = [InputGrid.covering(0.0, high, bits=2) for high in np.linspace(0.2, 4, 300)]
    errors = [(each.quantized(images) - images).square().mean().item() for each in ends]
    best = ends[int(np.argmin(errors))]
    assert (grid.quantized(images) - images).square().mean().item() <= min(errors) * 1.02
    assert grid.scale == pytest.approx(best.scale, rel=0.1)
    assert grid.zero_point == 0


def distributions() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=random)
    return {
        "half-normal": normal.relu(),
        "normal": normal,
        "relu6": (4 * normal).clamp(0, 6),
        "silu": nn.functional.silu(2 * normal),
        "negative": -normal.abs(),
        "heavy tails": normal / torch.rand(20_000, generator=random).clamp_min(1e-3).sqrt(),
        "skewed": normal.exp(),
        "one outlier": torch.cat([normal, torch.tensor([100.0])]),
        "tiny": 1e-12 * normal,
        "constant": torch.full((20_000,), 0.3),
        "constant on a bin's edge": torch.full((20_000,), 0.75),
        "all zero": torch.zeros(20_000),
    }


def least_error(values: Tensor, *, bits: int, signed: bool) -> tuple[InputGrid, float]:
    """The best grid and its error among those whose ends are shares of the outermost values, each value counted."""

    def error(ends: tuple[float, float]) -> float:
        grid = InputGrid.covering(*ends, bits=bits, signed=signed)
        return (grid.quantized(values) - values).square().mean().item()

    low, high = (end.item() for end in values.aminmax())
    best = min([(share * low, share * high) for share in SHARES.tolist()], key=error)
    best = min([(best[0], share * high) for share in SHARES.tolist()], key=error)
    best = min([(share * low, best[1]) for share in SHARES.tolist()], key=error)
    return InputGrid.covering(*best, bits=bits, signed=signed), error(best)


@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, False), (4, True), (8, False), (8, True)])
@pytest.mark.parametrize("kind", distributions())
def test_a_histogram_finds_the_range_that_a_search_over_all_values_finds(kind, bits, signed):
    values = distributions()[kind]
    observer = mse.Observer()
    for part in values.split(4096):
        observer.observe(part)
    grid = InputGrid.covering(*observer.range(bits=bits, signed=signed), bits=bits, signed=signed)
    best, least = least_error(values, bits=bits, signed=signed)
    assert grid.scale == pytest.approx(best.scale, rel=0.0101)
    half_a_bin = values.abs().max().item() / mse.BINS  # Of the widest ones.
    assert (grid.quantized(values) - values).square().mean().item() <= 1.001 * least + half_a_bin**2


def test_a_histogram_does_not_depend_on_the_order_and_the_size_of_batches():
    values = torch.cat([distributions()[kind] for kind in ("tiny", "relu6", "one outlier", "heavy tails")])
    mixed = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]
    ranges = set()
    for parts in (values.split(len(values)), values.split(500), mixed.split(7001), values.flip(0).split(1000)):
        observer = mse.Observer()
        for part in parts:
            observer.observe(part)
        ranges.add(observer.range(bits=4, signed=False))
    assert len(ranges) == 1


@pytest.mark.parametrize("rule", range_rules())
def test_what_an_observer_remembers_does_not_grow_with_the_features(rule):
    observer = import_module(f"dfcompress.quantization.observers.{rule}").Observer()
    for _ in range(4):
        observer.observe(torch.rand(16, 8, 32, 32))
    tensors = [each for value in vars(observer).values() for each in (value if isinstance(value, list) else [value])]
    held = sum(each.untyped_storage().nbytes() for each in tensors if isinstance(each, Tensor))
    assert held <= 2 * mse.BINS * 8 + 1024


@pytest.mark.parametrize("rule", range_rules())
def test_what_a_later_layer_writes_over_a_layers_input_does_not_reach_its_range(rule):
    """Like a block that ends in `features.mul_(...)` on what its convolution was given."""

    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 1)

        def forward(self, features: Tensor) -> Tensor:
            output = self.layer(features)
            features.mul_(100)
            return output.mean((2, 3))

    network = Overwritten()
    quantize_layers(network, {"layer": (8, 8)})
    classifier = Classifier(network, ModelCard("test", 2, (1, 4, 4), (0.0,), (1.0,)))
    images = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    calibrate(classifier, [images], rule=rule)
    assert quantized_layers(network)["layer"].input_grid.ends()[1] < 1.01


def test_signed_ranges_have_zero_point_zero_and_reach_the_farther_end():
    classifier = one_layer_classifier(mean=0.5, std=0.25)
    calibrate(classifier, [pixels(0.0, 0.75)], signed=True)
    grid = quantized_layers(classifier.network)["0"].input_grid
    assert grid == InputGrid.covering(-2.0, 1.0, bits=8, signed=True)
    assert (grid.zero_point, grid.signed) == (0, True)
    assert grid.scale * 127 == pytest.approx(2.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_of_least_error_have_less_than_those_of_the_whole_range(bits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 6, 3))
    weight = network[0].weight.detach().clone()
    quantize_layers(network, {"0": (bits, 8)})
    classifier = Classifier(network, ModelCard("test", 2, (4, 5, 5), (0.0,) * 4, (1.0,) * 4))

    def errors() -> Tensor:
        return (quantized_layers(network)["0"].quantized_weight() - weight).square().flatten(1).sum(1)

    whole = errors()
    fit_weights(classifier, rule="mse")
    best = errors()
    assert (best <= whole).all()
    assert bits == 8 or best.sum() < 0.9 * whole.sum()
    for share in SHARES[::7]:
        quantized_layers(network)["0"].weight_shares.fill_(share)
        assert (best <= errors() + 1e-7).all()
    fit_weights(classifier, rule="minmax")
    assert torch.equal(errors(), whole)


@pytest.mark.parametrize("symmetric", [True, False])
def test_shares_of_a_large_layer_are_found_in_little_memory_and_are_those_of_all_rows(monkeypatch, symmetric):
    weight = torch.randn(64, 2 * mse.VALUES // 64, generator=torch.Generator().manual_seed(0))
    kind = WeightGrid.covering(weight.amin(1), weight.amax(1), bits=4, symmetric=symmetric)
    taken = count_bytes(lambda: mse.weight_shares(weight, kind))
    assert taken < 5 * weight.element_size() * mse.VALUES
    shares = mse.weight_shares(weight, kind)
    monkeypatch.setattr(mse, "VALUES", weight.numel())
    assert torch.equal(shares, mse.weight_shares(weight, kind))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_weights_of_least_error_are_as_good_as_every_zero_point_and_scale_tried(bits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 6, 3))
    with torch.no_grad():
        network[0].weight[1].abs_()
        network[0].weight[2].mul_(0.2)[0, 0, 0] = 1.0
    rows = network[0].weight.detach().flatten(1).clone()
    quantize_layers(network, {"0": (bits, 8)}, asymmetric=[bits])
    classifier = Classifier(network, ModelCard("test", 2, (4, 5, 5), (0.0,) * 4, (1.0,) * 4))
    fit_weights(classifier, rule="mse")
    found = (quantized_layers(network)["0"].quantized_weight().flatten(1) - rows).square().sum(1)
    best = torch.full((6,), torch.inf)
    for zero_point in range(2**bits):
        for share in torch.linspace(0.01, 2.0, 200):
            scale = (share * rows.abs().amax(1) / (2**bits - 1))[:, None]
            multiples = (rows / scale).round().clamp(-zero_point, 2**bits - 1 - zero_point)
            best = torch.minimum(best, (multiples * scale - rows).square().sum(1))
    assert (found <= 1.2 * best).all()
    assert found.sum() <= 1.02 * best.sum()


def test_no_images_are_refused():
    with pytest.raises(BadInput, match="no images to calibrate on"):
        calibrate(one_layer_classifier(), [])


@pytest.mark.parametrize("rule", range_rules())
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_range_that_is_not_finite_is_refused(rule, bad):
    with pytest.raises(BadInput, match=f"layer 0 ranges from .*{bad}"):
        calibrate(one_layer_classifier(), [pixels(0.5, float(bad)), pixels(0.1, 0.2)], rule=rule)


def test_images_of_224_pixels_take_one_batch_and_small_ones_sixteen():
    assert [usual_steps((3, side, side)) for side in (28, 32, 64, 96, 224, 600)] == [16, 16, 16, 7, 1, 1]


def released_classifier(path: Path) -> Classifier:
    from dfcompress.models.checkpoint import load

    return load(path)


def images_and_labels(path: Path) -> tuple[Tensor, Tensor]:
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["images"]).float() / 255, torch.from_numpy(arrays["labels"]).long()


def quantized_and_calibrated(float_classifier: Classifier, bits: tuple[int, int], images: Tensor) -> Classifier:
    classifier = copy.deepcopy(float_classifier)
    first, *inner, last = layers_of(classifier).quantizable
    quantize_layers(classifier.network, {first: (8, 8), last: (8, 8)} | dict.fromkeys(inner, bits))
    calibrate(classifier, images.split(80))
    freeze(classifier.network)
    return classifier.frozen()


@torch.no_grad()
def correct(classifier: Classifier, images: Tensor, labels: Tensor) -> int:
    return int((classifier(images).argmax(1) == labels).sum())


def test_eight_bits_keep_a_released_resnet20_within_one_point(resnet20_file, cifar10_train_file, cifar10_test_file):
    images, _ = images_and_labels(cifar10_train_file)
    classifier = quantized_and_calibrated(released_classifier(resnet20_file), (8, 8), images[::6][:160])
    assert correct(classifier, *images_and_labels(cifar10_test_file)) == pytest.approx(776, abs=8)


def test_four_bits_without_fine_tuning_cost_a_released_resnet20_a_few_points(
    resnet20_file, cifar10_train_file, cifar10_test_file
):
    images, _ = images_and_labels(cifar10_train_file)
    classifier = quantized_and_calibrated(released_classifier(resnet20_file), (4, 4), images[::6][:160])
    assert 720 <= correct(classifier, *images_and_labels(cifar10_test_file)) < 768


@torch.no_grad()
def test_a_packed_resnet20_is_a_seventh_in_bytes_and_the_same_to_the_bit(resnet20_file, cifar10_train_file):
    images, _ = images_and_labels(cifar10_train_file)
    original = released_classifier(resnet20_file)
    classifier = quantized_and_calibrated(original, (4, 4), images[:160])
    float_bytes = sum(tensor.nbytes for tensor in original.network.state_dict().values())
    tensors, quantization = pack_network(classifier.network)
    unpack_network(original.network, tensors, quantization)
    assert torch.equal(original(images[:64]), classifier(images[:64]))
    assert sum(tensor.nbytes for tensor in tensors.values()) / float_bytes < 0.14


def test_zeros_that_come_first_change_no_range():
    """Of activations below the outermost bin of a reach of 1, which they once made."""
    values = 2e-4 * torch.rand(64, 100, generator=torch.Generator().manual_seed(0))
    ranges = []
    for before in ([], [torch.zeros(1, 100)]):
        observer = mse.Observer()
        for part in [*before, values]:
            observer.observe(part)
        ranges.append(observer.range(bits=8, signed=False))
    assert ranges[0][1] == ranges[1][1]
    assert ranges[0][1] == pytest.approx(2e-4, rel=0.05)
