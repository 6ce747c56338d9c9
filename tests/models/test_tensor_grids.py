"""Every tensor that integer kernels read or write has one grid, and the network computes as before but for those."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load_saved
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, in_float, quantize_layers, quantized_layers, tensor_grids
from dfcompress.models.grids import InputGrid
from dfcompress.models.saving import save
from dfcompress.models.tensor_grids import as_kernels_compute, quantize_tensors
from dfcompress.quantization.bits import layers_of
from dfcompress.quantization.ranges import calibrate, fit_weights


def classifier_of(network: nn.Module) -> Classifier:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    return Classifier(network, ModelCard("test", 4, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)).frozen()


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def placed(network: nn.Module) -> tuple[Classifier, list[str]]:
    """The float classifier with grids that nothing has calibrated, and the modules that were not traced."""
    classifier = classifier_of(network)
    as_kernels_compute(classifier)
    untraced = quantize_tensors(classifier, layers_of(classifier).quantizable)
    return classifier, untraced


def int8(network: nn.Module, *, rule: str = "minmax") -> Classifier:
    classifier, _ = placed(network)
    quantize_layers(classifier.network, dict.fromkeys(layers_of(classifier).quantizable, (8, 8)))
    fit_weights(classifier, rule="minmax")
    calibrate(classifier, [images()], rule=rule)
    freeze(classifier.network)
    return classifier


class Residual(nn.Module):
    """A residual block with one ReLU for both places, a pool, a concatenation and a product of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.gate = nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(pixels)))
        out = self.bn2(self.conv2(features))
        out += features
        out = F.max_pool2d(self.relu(out), 2)
        gated = out * torch.sigmoid(self.gate(out.mean((2, 3), keepdim=True)))
        joined = torch.cat([out, gated], 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(joined, 1), 1))


def names(classifier: Classifier) -> set[str]:
    return set(tensor_grids(classifier.network))


def test_a_grid_stands_behind_what_kernels_write_and_not_between_a_layer_and_its_activation_function():
    classifier, untraced = placed(Residual())
    assert untraced == []
    # Neither conv1 (ReLU cuts it off) nor the sum, nor the answer of fc.
    relus = {"relu", "relu_1"}
    assert names(classifier) == {
        *("pixels", *relus, "conv2", "max_pool2d", "mean", "gate", "sigmoid", "mul", "cat"),
        *("adaptive_avg_pool2d", "flatten"),
    }


def test_nothing_changes_before_calibration():
    expected = classifier_of(Residual())
    found, _ = placed(Residual())
    torch.testing.assert_close(found(images()), expected(images()))


def test_what_only_moves_values_shares_a_grid_with_what_it_takes():
    grids = tensor_grids(int8(Residual()).network)
    assert grids["relu_1"].input_grid == grids["max_pool2d"].input_grid == grids["cat"].input_grid
    assert grids["mul"].input_grid == grids["cat"].input_grid  # A concatenation has one scale.
    assert grids["adaptive_avg_pool2d"].input_grid == grids["flatten"].input_grid != grids["cat"].input_grid


def test_layers_have_the_grid_of_the_tensor_they_take():
    classifier = int8(Residual())
    layers, grids = quantized_layers(classifier.network), tensor_grids(classifier.network)
    assert layers["conv2"].input_grid == grids["relu"].input_grid
    assert layers["fc"].input_grid == grids["flatten"].input_grid


@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_answers_stay_close_and_come_back_in_float(rule):
    exact = classifier_of(Residual())
    classifier = int8(Residual(), rule=rule)
    answers, wanted = classifier(images()), exact(images())
    assert not torch.equal(answers, wanted)
    assert (answers - wanted).abs().max() < 0.1 * wanted.std()
    with in_float(classifier.network):
        torch.testing.assert_close(classifier(images()), wanted, atol=0.05 * wanted.std().item(), rtol=0)


def test_every_tensor_is_on_its_grid():
    classifier = int8(Residual())
    seen = {}
    for name, module in tensor_grids(classifier.network).items():
        module.register_forward_hook(lambda module, _, output, name=name: seen.update({name: (module, output)}))
    classifier(images())
    assert seen.keys() == names(classifier)
    for module, output in seen.values():
        grid = module.input_grid
        steps = (output / grid.scale + grid.zero_point).double()
        assert (steps - steps.round()).abs().max() < 1e-3
        assert steps.round().min() >= 0
        assert steps.round().max() <= 255


@pytest.mark.parametrize(
    ("cut", "bounds"),
    [(nn.ReLU6(), (0.0, 6.0)), (nn.ReLU(), (0.0, torch.inf)), (nn.Hardtanh(-2, 3), (-2.0, 3.0))],
)
def test_a_grid_ends_where_the_activation_function_cuts_off(cut, bounds):
    classifier, _ = placed(nn.Sequential(nn.Conv2d(3, 4, 1), cut, nn.Conv2d(4, 4, 8), nn.Flatten()))
    grids = tensor_grids(classifier.network)
    assert grids["_1"].bounds == bounds
    assert grids["input_1"].bounds == (-torch.inf, torch.inf)


def test_no_range_passes_its_bounds():
    """The rule of least squares may end beside the outermost value; a kernel needs a range inside ReLU6's."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 8), nn.Flatten())
    with torch.no_grad():
        network[0].weight.mul_(40)
    low, high = tensor_grids(int8(network, rule="mse").network)["_1"].input_grid.ends()
    assert low == 0
    assert high <= 6 * (1 + 1e-6)


def test_the_bias_is_whole_steps_of_both_scales_and_a_dead_channels_fits_32_bits():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with torch.no_grad():
        network[0].weight[1] = 0
        network[0].bias.copy_(torch.tensor([0.3, 5.0, -0.2, 0.1]))
    layer = quantized_layers(int8(network).network)["0"]
    assert layer.integer_bias().abs().max() <= 2**29 + 1
    torch.testing.assert_close((layer.integer_bias() * layer.bias_scale()).float(), layer.bias.detach())
    assert layer.bias[1].item() == pytest.approx(5.0)
    before = layer.bias.clone()
    layer.round_bias()
    assert torch.equal(layer.bias, before)


class Branching(nn.Module):
    """What torch.fx cannot trace, around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(features) if features.sum() > 0 else self.conv(features * 2)


def test_inside_what_cannot_be_traced_layers_keep_grids_of_their_own():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Branching()), nn.Conv2d(4, 4, 8), nn.Flatten())
    _, untraced = placed(copy.deepcopy(network))
    assert untraced == ["1.0"]
    classifier = int8(network)
    assert quantized_layers(classifier.network)["1.0.conv"].input_grid is not None
    assert names(classifier) == {"input_1", "_0", "_1_0"}


def test_a_network_that_cannot_be_traced_at_all_is_refused_with_the_other_placement():
    class Whole(Branching):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(torch.cat([features, features[:, :1]], 1)).mean((2, 3))

    with pytest.raises(BadInput, match=r"torch\.fx cannot trace a Whole"):
        placed(Whole())


def test_a_layer_that_runs_twice_takes_one_scale():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(256, 4)

        def forward(self, features: Tensor) -> Tensor:
            return self.fc(self.again(self.again(self.stem(features))).flatten(1))

    grids = tensor_grids(int8(Twice()).network)
    assert grids["stem"].input_grid == grids["again"].input_grid


def test_a_signed_grid_has_no_zero_point():
    classifier, _ = placed(Residual())
    quantize_layers(classifier.network, dict.fromkeys(layers_of(classifier).quantizable, (8, 8)))
    calibrate(classifier, [images()], signed=True)
    assert all(grid.input_grid.signed for grid in tensor_grids(classifier.network).values())
    assert isinstance(tensor_grids(classifier.network)["cat"].input_grid, InputGrid)


class Shuffled(nn.Module):
    """Halves that are put together again with their channels in another order, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 1), nn.Linear(256, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        one, other = self.stem(pixels).chunk(2, dim=1)
        joined = torch.cat([one, self.branch(other)], 1)
        batch, channels, height, width = joined.size()
        shuffled = joined.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return self.fc(shuffled.view(batch, -1))


def test_a_channel_shuffle_carries_one_grid_through():
    grids = tensor_grids(int8(Shuffled()).network)
    assert len({grids[name].input_grid for name in ("stem", "getitem", "branch", "cat", "contiguous", "view_1")}) == 1


def test_a_network_that_no_name_leads_to_is_read_into_its_own_form(tmp_path):
    classifier = int8(Residual())
    save(classifier, tmp_path)
    assert torch.equal(load_saved(tmp_path, classifier)(images()), classifier(images()))


def test_what_works_in_place_keeps_its_answer():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(256, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            features = self.conv(pixels)
            F.relu_(features)  # Nothing takes what it returns.
            return self.fc(features.flatten(1))

    exact, (found, _) = classifier_of(InPlace()), placed(InPlace())
    found.load_state_dict(exact.state_dict())
    torch.testing.assert_close(found(images()), exact(images()))


def test_what_was_written_in_place_has_a_range_of_its_own():
    """A sum a hundred times as large as what it overwrites, and a ReLU: nothing takes what either returns."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.relu, self.last = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 8)
            self.small.weight.data /= 100

        def forward(self, pixels: Tensor) -> Tensor:
            features = self.small(pixels)
            features.add_(self.large(pixels))
            self.relu(features)
            return self.last(features).flatten(1)

    network = Overwriting()
    exact, found = classifier_of(copy.deepcopy(network)), int8(network)
    assert quantized_layers(found.network)["last"].input_grid == tensor_grids(found.network)["relu"].input_grid
    wanted = exact(images())
    assert (found(images()) - wanted).abs().max() < 0.1 * wanted.std()


def test_arguments_with_a_usual_value_are_no_hindrance():
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(256, 4)

        def forward(self, pixels=None, is_feat=False, scale=None, factors=(2.0, 3.0)) -> Tensor:
            features = self.conv(pixels)
            if is_feat or scale is not None:
                return features
            return self.fc(features.flatten(1)) * factors[1]

    expected, (found, untraced) = classifier_of(Choosing()), placed(Choosing())
    assert untraced == []
    assert names(found) == {"pixels", "conv", "flatten"}
    found.load_state_dict(expected.state_dict())
    torch.testing.assert_close(found(images()), expected(images()))
    assert [node.name for node in found.network.graph.nodes if node.op == "placeholder"] == ["pixels", "factors"]


def test_a_graph_that_answers_otherwise_is_refused():
    class Counting(nn.Module):
        """torch.fx sees a constant where each pass has another number."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.passes = nn.Linear(192, 4), 0

        def forward(self, pixels: Tensor) -> Tensor:
            self.passes += 1
            return self.fc(pixels.flatten(1)) * self.passes

    with pytest.raises(BadInput, match="answers otherwise"):
        placed(Counting())
