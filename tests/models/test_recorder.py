"""Two recorders, one trace: the fused one must agree with hooks on a released network."""

from __future__ import annotations

import odd_networks
import pytest
import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier, load
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import FusedRecorder, HookRecorder, require_outputs
from dfcompress.models.statistics import named_statistics_layers, statistics_layers
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import ChannelMeans, LayerOutput, Loss
from dfcompress.synthesis.objective import losses_of
from dfcompress.synthesis.recipe import Recipe, choose


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


@pytest.fixture(scope="module")
def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 32, 32, generator=random), torch.arange(32) % 10


def losses_and_gradient(recorder, batch):
    images, labels = batch[0].clone().requires_grad_(True), batch[1]
    losses = losses_of(choose("deepinversion", "paper-cifar10").recipe)
    total, values, _ = losses(images, labels, recorder(images))
    return values[0], torch.autograd.grad(total, images)[0]


def test_hooks_see_every_batchnorm_of_resnet20(teacher, batch):
    recorder = HookRecorder(teacher.network, moments=True)
    assert len(recorder(batch[0]).layers) == 19


def test_hooks_are_removed_even_after_an_error(teacher, batch):
    with pytest.raises(RuntimeError):
        HookRecorder(teacher.network, moments=True)(batch[0][:, :1])
    assert not any(layer._forward_pre_hooks for layer in statistics_layers(teacher.network))


@pytest.mark.parametrize("kind", [HookRecorder, FusedRecorder])
def test_rows_of_an_image_are_recorded_as_its_positions(kind):
    """LeViT's BatchNorms see a token a row; what they see of an image is what a BatchNorm over its positions sees."""
    network = odd_networks.trained("rows_of_tokens")
    images = torch.randn(3, *odd_networks.SIZE, generator=torch.Generator().manual_seed(0))
    tokens = []
    norm = network.get_submodule("between.module.norm")
    with torch.no_grad(), norm.register_forward_pre_hook(lambda module, given: tokens.append(given[0].clone())):
        network(images)
    positions = tokens[0].unflatten(0, (3, -1)) - norm.running_mean
    with torch.no_grad():
        layer = kind(network, moments=True)(images).layers[1]
    torch.testing.assert_close(layer.mean_error, positions.mean(1))
    torch.testing.assert_close(layer.square_error, positions.square().mean(1))


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


def with_statistics(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, its BatchNorms with the statistics of noise."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return network.eval()


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050", "regnety_002", "frozen mobilenetv2_050"]
)
def test_every_batchnorm_of_timms_families_is_fused_with_the_losses_and_gradients_of_the_hooks(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = with_statistics(timm.create_model(name.split()[-1], num_classes=10))
    if name.startswith("frozen"):
        network = timm.layers.norm_act.freeze_batch_norm_2d(network)
        card = ModelCard(name, 10, (3, 64, 64), (0.5,) * 3, (0.5,) * 3)
        network = as_classifier(Classifier(network, card)).frozen().network
    fused = FusedRecorder(network, moments=True)
    names = list(named_statistics_layers(network))
    assert len(names) > 15
    assert {type(fused.network.get_submodule(each)).__name__ for each in names} == {"_RecordingBatchNorm"}
    random = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 3, 64, 64, generator=random), torch.arange(4)
    expected, expected_gradient = losses_and_gradient(HookRecorder(network, moments=True), batch)
    values, gradient = losses_and_gradient(fused, batch)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert (gradient - expected_gradient).norm() < 5e-3 * expected_gradient.norm()


def test_group_norms_with_activations_stay_what_they_are():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    layer = timm.layers.GroupNormAct(8, 4)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    images = torch.randn(2, 3, 16, 16)
    fused = FusedRecorder(network, moments=True)
    recording = fused(images)
    assert type(fused.network[1]) is type(layer)
    assert recording.layers == ()
    torch.testing.assert_close(recording.logits, network(images))


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
    torch.testing.assert_close(recording.outputs["1"], hidden)
    torch.testing.assert_close(recording.outputs["logits"], network[3](hidden.relu()))


@pytest.mark.parametrize("layer", ["layer2.0.conv1", "layer2.0.bn1", "layer3", "fc"])
def test_a_loss_on_any_layer_has_the_value_and_gradient_of_the_hooks(teacher, batch, layer):
    """No record is needed; the channel means are those of the output."""
    recipe = Recipe(
        images=Pixels(),
        batch_size=32,
        losses=[
            Loss("loud", lambda trace: trace.outputs[layer].square().mean(), wants=[LayerOutput(layer)]),
            Loss("even", lambda trace: trace.channel_means[layer].var(1).sum(), wants=[ChannelMeans(layer)]),
        ],
    )
    found = []
    for make in (HookRecorder, FusedRecorder):
        images = batch[0].clone().requires_grad_(True)
        recording = make(teacher.network, outputs=[layer], channel_means=[layer])(images)
        total, values, _ = losses_of(recipe)(images, batch[1], recording)
        found.append((recording, values[0], torch.autograd.grad(total, images)[0]))
    (recording, values, gradient), (fused, fused_values, fused_gradient) = found
    torch.testing.assert_close(fused_values, values, rtol=1e-4, atol=1e-5)
    assert (fused_gradient - gradient).norm() < 2e-3 * gradient.norm()
    assert gradient.norm() > 0
    for each in (recording, fused):
        output = each.outputs[layer]
        means = output.mean((2, 3)) if output.dim() > 2 else output
        torch.testing.assert_close(each.channel_means[layer], means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [HookRecorder, FusedRecorder])
def test_channel_means_are_those_before_an_activation_that_works_in_place(make):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5, 2)).eval()
    images = torch.randn(4, 3, 2, 2)
    recording = make(network, channel_means=["0"])(images)
    torch.testing.assert_close(recording.channel_means["0"], network[0](images).mean((2, 3)))


@pytest.mark.parametrize("make", [HookRecorder, FusedRecorder])
@pytest.mark.parametrize("kind", ["outputs", "channel_means"])
def test_a_layer_that_is_not_there_is_refused_with_the_nearest_name(teacher, make, kind):
    with pytest.raises(BadInput, match=r"no layer 'layr3'\. Did you mean 'layer3'\?"):
        make(teacher.network, **{kind: ["layr3"]})


def test_the_output_of_a_layer_that_runs_twice_is_refused():
    twice = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 2, 2), twice, nn.Conv2d(2, 2, 1), twice, nn.Flatten(), nn.Linear(2, 5))
    classifier = Classifier(network.eval(), ModelCard("twice", 5, (3, 2, 2), (0.5,) * 3, (0.5,) * 3))
    require_outputs(classifier, ["0", "4", "logits"])
    with pytest.raises(BadInput, match=r"'1' cannot be recorded: it runs 2 times .*Name another layer"):
        require_outputs(classifier, ["1"])
