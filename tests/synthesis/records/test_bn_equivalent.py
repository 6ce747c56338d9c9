"""Recorded statistics of channels count exactly as those of BatchNorms do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find
from dfcompress.models.card import CIFAR_MEAN, CIFAR_STD, ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import FusedRecorder, HookRecorder
from dfcompress.models.trace import traces
from dfcompress.synthesis.losses import bn_distance, bn_divergence
from dfcompress.synthesis.records.bn_equivalent import StatisticsAccumulator, with_statistics
from dfcompress.synthesis.records.record_file import Description, Record


def described(layers, tensors):
    return Record(Description("bn-equivalent", tuple(layers), 64, (6,) * 10, ""), tensors)


@pytest.fixture
def twins():
    """VGG with BatchNorm, and the same without, which knows by a record what the BatchNorms of the other know."""
    torch.manual_seed(0)
    card = ModelCard("cifar_vgg11_bn", 10, (3, 32, 32), CIFAR_MEAN, CIFAR_STD)
    with_bn = Classifier(find("cifar_vgg11_bn").make(10, 3), card)
    with_bn.train()
    with_bn(torch.rand(64, 3, 32, 32))
    with_bn.frozen()
    without = Classifier(find("cifar_vgg11_bn").make(10, 3), card)
    without.network.load_state_dict(with_bn.network.state_dict())
    layers, tensors = [], {}
    for name, module in with_bn.network.features.named_children():
        if isinstance(module, nn.BatchNorm2d):
            layer = f"features.{int(name) - 1}"
            layers.append(layer)
            tensors |= {f"mean.{layer}": module.running_mean, f"var.{layer}": module.running_var}
            # What the BatchNorm does, as a plain convolution of every channel on its own.
            plain = nn.Conv2d(module.num_features, module.num_features, 1, groups=module.num_features)
            scale = module.weight * (module.running_var + module.eps).rsqrt()
            plain.weight.data = scale.view(-1, 1, 1, 1).detach()
            plain.bias.data = (module.bias - scale * module.running_mean).detach()
            without.network.features[int(name)] = plain
    return with_bn, with_statistics(without.frozen(), described(layers, tensors))


@pytest.mark.parametrize("loss", [bn_distance(), bn_divergence()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("fused", [False, True])
def test_losses_and_gradients_are_those_of_the_twin_with_batchnorm(twins, loss, fused):
    found = []
    for teacher in twins:
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        recorder = (FusedRecorder if fused else HookRecorder)(teacher.network, moments=True)
        (trace,) = traces(images, torch.zeros(8, dtype=torch.long), recorder(images))
        value = loss.value(trace)
        found.append((value, *torch.autograd.grad(value, images)))
    (value, gradient), (other_value, other_gradient) = found
    torch.testing.assert_close(other_value, value, rtol=1e-4, atol=1e-5)
    assert (other_gradient - gradient).norm() < 1e-3 * gradient.norm()


def test_the_twin_answers_as_before_and_keeps_its_identity(lenet):
    layers = ["conv1", "fc1"]
    tensors = {"mean.conv1": torch.zeros(6), "var.conv1": torch.ones(6)}
    tensors |= {"mean.fc1": torch.zeros(120), "var.fc1": torch.ones(120)}
    knowing = with_statistics(lenet, described(layers, tensors))
    images = torch.rand(4, 1, 32, 32)
    assert torch.equal(knowing(images), lenet(images))
    assert knowing.identity() == lenet.identity()
    assert "conv1.weight" in lenet.network.state_dict()


@pytest.mark.parametrize(("layer", "shape", "over"), [("conv1", (6, 28, 28), (0, 2, 3)), ("fc1", (120,), (0,))])
def test_what_is_kept_are_moments_over_images_and_positions(layer, shape, over, lenet):
    outputs = torch.randn(50, *shape)
    accumulator = StatisticsAccumulator(lenet.network, {layer: outputs[:1]})
    for part in outputs.split(20):
        accumulator.update([part], torch.zeros(len(part)), torch.arange(len(part)))
    tensors = accumulator.tensors()
    torch.testing.assert_close(tensors[f"mean.{layer}"], outputs.mean(over), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tensors[f"var.{layer}"], outputs.var(over), rtol=1e-4, atol=1e-6)
    assert accumulator.bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_channels_of_token_networks_are_last():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(2), nn.Linear(16, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(15, 2))
    card = ModelCard("tokens", 2, (3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    teacher = Classifier(network, card).frozen()
    outputs = torch.randn(7, 3, 5)
    accumulator = StatisticsAccumulator(network, {"1": outputs[:1]})
    accumulator.update([outputs], torch.zeros(7), torch.arange(7))
    tensors = accumulator.tensors()
    torch.testing.assert_close(tensors["mean.1"], outputs.mean((0, 1)))
    knowing = with_statistics(teacher, described(["1"], tensors))
    recorder = HookRecorder(knowing.network, moments=True)
    (layer,) = recorder(torch.randn(6, 3, 4, 4)).layers
    assert layer.mean_error.shape == (6, 5)


def test_a_channel_that_is_always_the_same_breaks_nothing(lenet):
    tensors = {"mean.conv1": torch.zeros(6), "var.conv1": torch.zeros(6)}
    knowing = with_statistics(lenet, described(["conv1"], tensors))
    images = torch.randn(4, 1, 32, 32, requires_grad=True)
    recorder = HookRecorder(knowing.network, moments=True)
    (trace,) = traces(images, torch.zeros(4, dtype=torch.long), recorder(images))
    (gradient,) = torch.autograd.grad(bn_divergence().value(trace), images)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("layers", "tensors", "message"),
    [
        (["conv9"], {}, "knows a layer 'conv9'"),
        (["conv1"], {"mean.conv1": torch.zeros(6)}, "has nothing as var.conv1"),
        (["conv1"], {"mean.conv1": torch.zeros(5), "var.conv1": torch.ones(5)}, r"\(5,\) as mean.conv1"),
    ],
)
def test_a_record_that_does_not_fit_the_network_is_refused(layers, tensors, message, lenet):
    with pytest.raises(BadInput, match=message):
        with_statistics(lenet, described(layers, tensors))


class Transformer(nn.Module):
    """torch's own layer reads the weights of its linear layers; the convolution has two names."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.stem = nn.Sequential(self.patches, nn.ReLU())
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        return self.head(self.block(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


def test_a_layer_that_knows_is_found_under_all_names_and_still_has_its_weights():
    teacher = Classifier(Transformer(), ModelCard("test", 10, (3, 8, 8), (0.5,) * 3, (0.3,) * 3)).frozen()
    widths = {"patches": 16, "block.linear1": 32, "head": 10}
    tensors = {f"{part}.{layer}": torch.ones(width) for layer, width in widths.items() for part in ("mean", "var")}
    informed = with_statistics(teacher, described(widths, tensors))
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(informed(images), teacher(images), atol=1e-5)
        assert len(HookRecorder(informed.network, moments=True)(images).layers) == 3
