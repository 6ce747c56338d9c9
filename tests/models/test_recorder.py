"""Two recorders, one trace: the fused one must agree with hooks on a released network."""

from __future__ import annotations

import odd_networks
import pytest
import torch
from torch import nn

from dfcompress.models.checkpoint import load
from dfcompress.models.recorder import FusedRecorder, HookRecorder
from dfcompress.models.statistics import statistics_layers
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import losses_of


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


@pytest.fixture(scope="module")
def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 32, 32, generator=random), torch.arange(32) % 10


def losses_and_gradient(recorder, batch):
    images, labels = batch[0].clone().requires_grad_(True), batch[1]
    losses = losses_of(choose("deepinversion", "paper-cifar10").build())
    total, values = losses(images, labels, recorder(images))
    return values[0], torch.autograd.grad(total, images)[0]


def test_hooks_see_every_batchnorm_of_resnet20(teacher, batch):
    recorder = HookRecorder(teacher.network, moments=True)
    assert len(recorder(batch[0]).layers) == 19


def test_hooks_are_removed_even_after_an_error(teacher, batch):
    with pytest.raises(RuntimeError):
        HookRecorder(teacher.network, moments=True)(batch[0][:, :1])
    assert not any(layer._forward_pre_hooks for layer in statistics_layers(teacher.network))


def test_without_moments_nothing_is_recorded(teacher, batch):
    assert FusedRecorder(teacher.network, moments=False)(batch[0]).layers == ()


def test_fused_recorder_gives_the_losses_and_gradients_of_the_hooks(teacher, batch):
    expected_values, expected_gradient = losses_and_gradient(HookRecorder(teacher.network, moments=True), batch)
    values, gradient = losses_and_gradient(FusedRecorder(teacher.network, moments=True), batch)
    torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-5)
    # Rounding moves a few activations across ReLU's kink, so single pixels differ; the gradient as a whole does not.
    assert (gradient - expected_gradient).norm() < 2e-3 * expected_gradient.norm()


def test_bf16_convolutions_keep_the_losses_within_one_percent(teacher, batch):
    expected, _ = losses_and_gradient(HookRecorder(teacher.network, moments=True), batch)
    recorder = FusedRecorder(teacher.network, moments=True, precision=torch.bfloat16)
    values, _ = losses_and_gradient(recorder, batch)
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-2)


def test_fused_recorder_leaves_the_network_as_it_was(teacher, batch):
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    classes = [type(module) for module in teacher.network.modules()]
    FusedRecorder(teacher.network, moments=True, precision=torch.bfloat16)(batch[0])
    assert [type(module) for module in teacher.network.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_batchnorms_that_do_more_than_normalise_keep_doing_it(precision):
    """timm's BatchNormAct2d holds the activation, and its convolutions are subclasses too."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    recorder = HookRecorder(network, moments=True)
    expected = recorder(images)
    recording = FusedRecorder(network, moments=True, precision=precision)(images)
    assert len(recording.layers) == len(expected.layers) > 40
    exact = {"rtol": 1e-4, "atol": 1e-5}
    loose = {"rtol": 0.1, "atol": 0.05 * expected.logits.abs().max().item()}
    torch.testing.assert_close(recording.logits, expected.logits, **(exact if precision == torch.float32 else loose))


def test_batchnorms_that_do_more_than_normalise_record_with_the_analytic_backward():
    pytest.importorskip("timm")
    network = odd_networks.trained("timm_subclasses")
    classes = {type(module).__name__ for module in FusedRecorder(network, moments=True).network.modules()}
    assert "_RecordingBatchNorm" in classes
    assert "BatchNormAct2d" not in classes
    found = []
    for make in (HookRecorder, FusedRecorder):
        images = torch.randn(4, *odd_networks.SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        recording = make(network, moments=True)(images)
        value = recording.logits.square().sum() + sum(
            layer.mean_error.square().sum() + layer.square_error.sum() for layer in recording.layers
        )
        found.append((value, *torch.autograd.grad(value, images)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


MIXED = ("attention", "transformer", "conv1d", "deconv", "prelu", "root_buffer", "relu6")


@pytest.mark.parametrize("name", MIXED)
def test_layers_that_take_no_mixture_of_types_run_in_bf16(name):
    """PReLU, transposed convolutions and attention have fp32 weights and get what a bf16 convolution gives."""
    network = odd_networks.trained(name)
    images = torch.randn(4, *odd_networks.SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    expected = network(images)
    logits = FusedRecorder(network, precision=torch.bfloat16)(images).logits
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert torch.autograd.grad(logits.sum(), images)[0].abs().sum() > 0


@pytest.mark.parametrize("make", [HookRecorder, FusedRecorder])
def test_outputs_are_those_before_an_activation_that_works_in_place(make):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).eval()
    images = torch.randn(4, 3, 2, 2)
    recorder = make(network, outputs=["1", "logits"])
    recording = recorder(images)
    hidden = network[1](images.flatten(1))
    assert (hidden < 0).any()
    torch.testing.assert_close(recording.outputs[0], hidden)
    torch.testing.assert_close(recording.outputs[1], network[3](hidden.relu()))
