"""What a layer computes decides what it counts as, not the name of its class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.models.bn_folding import fold_batchnorms
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import can_be_quantized, quantize_layers, quantized_layers
from dfcompress.models.plain_layers import after_normalising, plain_kind
from dfcompress.models.uses import unused_weights

timm_layers = pytest.importorskip("timm.layers")


def card(size: int = 8) -> ModelCard:
    return ModelCard("test", 4, (3, size, size), (0.4,) * 3, (0.3,) * 3)


class Inherited(nn.Conv2d):
    """Adds a method and computes the same."""

    def describe(self) -> str:
        return "mine"


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Scaled(nn.Linear):
    """Computes the same as a linear layer only until its scale is trained."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


class Clamped(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-6, 6))


class Limited(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-500, 500))


class Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input * 255).round() / 255)


def patched(layer: nn.Module) -> nn.Module:
    """With a `forward` of its own."""
    inherited = layer.forward
    layer.forward = lambda input: 2 * inherited(input)
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda layer, given, output: 2 * output)
    return layer


def prehooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda layer, given: (2 * given[0],))
    return layer


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d),
        (nn.Linear(4, 6, bias=False), nn.Linear),
        (timm_layers.Linear(4, 6), nn.Linear),
        (Inherited(4, 6, 3, dilation=2, padding=1), nn.Conv2d),
        (timm_layers.Conv2dSame(4, 6, 1), nn.Conv2d),
        (timm_layers.Conv2dSame(4, 6, 3, stride=2), None),
        (timm_layers.ScaledStdConv2d(4, 6, 3), None),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), None),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), None),
        (Doubled(4, 6), None),
        (Scaled(4, 6), None),
        (Clamped(4, 6, 3), None),
        (Limited(4, 6), None),
        (Rounded(4, 6), None),
        (patched(nn.Linear(4, 6)), None),
        (hooked(nn.Conv2d(4, 6, 3)), None),
        (prehooked(nn.Linear(4, 6)), None),
        (nn.ConvTranspose2d(4, 6, 3), None),
        (nn.Conv1d(4, 6, 3), None),
        (nn.BatchNorm2d(4), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_counts_as_what_it_computes(layer, kind):
    assert plain_kind(layer) is kind
    assert can_be_quantized(layer) == (kind is not None)


def test_looking_at_a_layer_leaves_it_as_it_was():
    layer = timm_layers.BatchNormAct2d(4).train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert after_normalising(layer) is not None
    assert layer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_subclass_that_computes_the_same_is_quantized_to_the_same_numbers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), timm_layers.Linear(12, 4))
    twin = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    twin.load_state_dict(network.state_dict())
    features = torch.rand(5, 3, 2, 2)
    for each in (network, twin):
        quantize_layers(each, {"1": (4, 4)})
    assert torch.equal(network(features), twin(features))
    assert list(quantized_layers(network)) == ["1"]


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Rectified(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Saturated(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-50, 50)


class WithLiteralEps(nn.BatchNorm2d):
    """Does not use the eps it states."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


def of_large_variance(norm: nn.Module) -> nn.Module:
    norm.running_var.fill_(1000.0)
    return norm


def of_no_weight(norm: nn.Module) -> nn.Module:
    nn.init.zeros_(norm.weight)
    return norm


@pytest.mark.parametrize(
    ("norm", "after"),
    [
        (nn.BatchNorm2d(4), nn.Identity),
        (nn.BatchNorm1d(4, affine=False), nn.Identity),
        (nn.SyncBatchNorm(4), nn.Identity),
        (timm_layers.BatchNormAct2d(4), nn.Sequential),
        (timm_layers.BatchNormAct2d(4, act_layer=nn.ReLU6), nn.Sequential),
        (nn.BatchNorm2d(4, track_running_stats=False), None),
        (Shifted(4), None),
        (Rectified(4), None),
        (Saturated(4), None),
        (of_no_weight(Rectified(4)), None),
        (of_large_variance(WithLiteralEps(4)), None),
        (patched(nn.BatchNorm2d(4)), None),
        (hooked(nn.BatchNorm2d(4)), None),
        (prehooked(timm_layers.BatchNormAct2d(4)), None),
        (nn.GroupNorm(2, 4), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_stays_behind_a_batchnorm_is_known_or_it_is_left_alone(norm, after):
    found = after_normalising(norm.eval())
    assert found is None if after is None else isinstance(found, after)


@pytest.mark.parametrize("norm", [timm_layers.BatchNormAct2d, nn.SyncBatchNorm])
def test_batchnorms_of_other_classes_are_folded_and_no_answer_changes(norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm(6), nn.Conv2d(6, 4, 3), norm(4), nn.Flatten())
    for each in (network[1], network[3]):
        nn.init.normal_(each.running_mean)
        nn.init.uniform_(each.running_var, 0.5, 2.0)
        nn.init.normal_(each.weight)
    classifier, images = Classifier(network, card()).frozen(), torch.rand(5, 3, 8, 8)
    before = classifier(images)
    assert fold_batchnorms(classifier) == ["1", "3"]
    assert not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in classifier.modules())
    torch.testing.assert_close(classifier(images), before, rtol=1e-4, atol=1e-4)


class WithSpare(nn.Module):
    """`auxiliary` runs in training alone, `attention` is used without being called, `scale` belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.auxiliary = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.pair = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.forgotten = nn.Parameter(torch.zeros(7))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        if self.training:
            self.auxiliary(features)
        tokens = features.flatten(2).transpose(1, 2)
        return self.pair[0](self.attention(tokens, tokens, tokens)[0].mean(1)) * self.scale


def test_weights_that_no_operation_takes_are_named_by_their_largest_module_with_their_bytes():
    assert unused_weights(Classifier(WithSpare(), card())) == {
        "forgotten": 4 * 7,
        "auxiliary": 4 * (5 * 4 + 5 + 5 + 5),
        "pair.1": 4 * (16 + 4),
    }
