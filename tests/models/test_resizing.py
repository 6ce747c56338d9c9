"""A network of other widths is built from its card, saved and read again, in float and quantized; hostile widths are
refused.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from uneven_networks import UNEVEN, images, uneven

from dfcompress.cli import run
from dfcompress.errors import BadInput
from dfcompress.models.architectures import named
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, is_quantized, quantize_layers, quantized_layers
from dfcompress.models.grids import InputGrid
from dfcompress.models.resizing import half_of, resized, widths_of
from dfcompress.models.saving import save


def quantized(classifier: Classifier) -> Classifier:
    """All layers at 4 bits, on any grids."""
    layers = [name for name, module in classifier.network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    quantize_layers(classifier.network, dict.fromkeys(layers, (4, 4)))
    for layer in quantized_layers(classifier.network).values():
        layer.input_grid = InputGrid.covering(-2, 2, bits=4)
    freeze(classifier.network)
    return classifier


@pytest.mark.parametrize("change", [lambda classifier: classifier, quantized], ids=["float", "4w4a"])
@pytest.mark.parametrize("name", UNEVEN)
@torch.no_grad()
def test_uneven_widths_are_saved_and_read_again_to_the_bit(name, change, tmp_path):
    classifier = change(uneven(name))
    save(classifier, tmp_path)
    loaded = load(tmp_path)
    shown = images(classifier.card.input_size[0])
    assert torch.equal(loaded(shown), classifier(shown))
    assert loaded.card.widths == classifier.card.widths == widths_of(loaded.network)
    assert is_quantized(loaded.network) == is_quantized(classifier.network)
    assert json.loads((tmp_path / "config.json").read_text())["widths"].keys() == loaded.card.widths.keys()


def test_the_widths_of_a_network_are_those_of_its_layers():
    norms = [nn.BatchNorm2d(6), nn.GroupNorm(3, 6), nn.LayerNorm(6), nn.LayerNorm([6, 2])]
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *norms, nn.ConvTranspose2d(6, 4, 2), nn.Linear(4, 2))
    found = {"0": (3, 6), "2": (6, 6), "3": (6, 6), "4": (6, 6), "6": (6, 4), "7": (4, 2)}
    assert widths_of(network) == found
    assert half_of(network) == {"0": (3, 3), "2": (3, 3), "3": (3, 3), "4": (3, 3), "6": (3, 2), "7": (2, 2)}
    images = torch.rand(2, 3, 5, 5)
    resized(network, half_of(network))
    assert widths_of(network) == half_of(resized(network, found))
    assert network[1](network[0](images)).shape == (2, 6, 3, 3)


def test_half_is_a_table_of_widths():
    whole = named("lenet5_bn").make(10, 1)
    assert widths_of(named("half:lenet5_bn").make(10, 1)) == half_of(whole) != widths_of(whole)
    twin = resized(named("lenet5_bn").make(10, 1), widths_of(named("lenet5_bn_half").make(10, 1)))
    assert [each.shape for each in twin.parameters()] == [
        each.shape for each in named("lenet5_bn_half").make(10, 1).parameters()
    ]


def test_a_depthwise_layer_keeps_one_filter_a_channel_and_a_grouped_one_its_groups():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, groups=4))
    resized(network, {"0": (4, 4), "1": (4, 8)})
    assert [layer.groups for layer in network] == [4, 4]
    assert network(torch.rand(1, 4, 3, 3)).shape == (1, 8, 1, 1)


def test_a_factory_of_the_users_own_is_built_with_other_widths(tmp_path):
    factory = tmp_path / "net.py"
    factory.write_text("from torchvision.models import resnet18\ndef make(): return resnet18(num_classes=7)\n")
    arch = f"{factory}:make"
    card = replace(uneven("cifar_resnet20").card, architecture=arch, classes=7, widths=None)
    widths = {"layer4.1.conv1": (512, 30), "layer4.1.bn1": (30, 30), "layer4.1.conv2": (30, 512)}
    classifier = Classifier(named(arch, widths=widths).build(7, 3), replace(card, widths=widths)).frozen()
    for folder, model in (("float", classifier), ("quantized", quantized(classifier))):
        save(model, tmp_path / folder)
        loaded = load(tmp_path / folder, arch=arch)
        assert loaded.network.layer4[1].conv1.out_channels == 30
        assert loaded.card.widths == widths
        with pytest.raises(BadInput, match="Give the same --arch again"):
            load(tmp_path / folder)


def test_one_name_opens_a_network_and_its_half(tmp_path):
    factory = tmp_path / "net.py"
    factory.write_text("from torchvision.models import resnet18\ndef make(): return resnet18(num_classes=7)\n")
    arch = f"{factory}:make"
    card = replace(uneven("cifar_resnet20").card, architecture=f"half:{arch}", classes=7, widths=None)
    half = Classifier(named(card.architecture).build(7, 3), card).frozen()
    for folder, model in (("float", half), ("quantized", quantized(half))):
        save(model, tmp_path / folder)
        loaded = load(tmp_path / folder, arch=arch)
        assert loaded.card.architecture == f"half:{arch}"
        assert loaded.network.conv1.out_channels == 32


HOSTILE = {
    "negative": ({"conv1": [1, -5]}, "'conv1' are [1, -5]"),
    "zero": ({"conv1": [1, 0]}, "'conv1' are [1, 0]"),
    "no integer": ({"conv1": [1, 5.5]}, "'conv1' are [1, 5.5]"),
    "true": ({"conv1": [1, True]}, "'conv1' are [1, True]"),
    "one number": ({"conv1": 5}, "'conv1' are 5"),
    "a text": ("wide", "widths is 'wide'"),
    "beyond 64 bits": ({"conv1": [1, 2**62]}, f"'conv1' are [1, {2**62}]"),
    "huge": ({"fc2": [2**20, 2**20]}, None),
    "a huge norm": ({"bn1": [2**20, 2**20]}, None),
    "no layer": ({"conv9": [1, 5]}, "'conv9', which is not a layer"),
    "no widths": ({"relu1": [5, 5]}, "'relu1', which is not a layer"),
    "the network itself": ({"": [5, 5]}, "'', which is not a layer"),
    "an uneven norm": ({"bn1": [5, 6]}, "bn1 are 5 and 6, and a normalising layer has one"),
    "others than the tensors'": ({"conv2": [5, 12]}, None),
    "others than the neighbours'": ({"conv2": [7, 11]}, None),
}


@pytest.mark.parametrize("change", [lambda classifier: classifier, quantized], ids=["float", "4w4a"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_widths_are_bad_input(case, change, tmp_path, capsys):
    widths, message = HOSTILE[case]
    save(change(uneven("lenet5_bn")), tmp_path)
    card = json.loads((tmp_path / "config.json").read_text())["widths"]
    stated = {"widths": {**card, **widths} if isinstance(widths, dict) else widths}
    (tmp_path / "model.card.json").write_text(json.dumps(stated))
    assert run(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said) < 1500
    assert message is None or message in said


def test_widths_that_groups_cannot_share_are_bad_input():
    with pytest.raises(BadInput, match="6 and 10, which 4 groups cannot share"):
        resized(nn.Sequential(nn.Conv2d(8, 12, 1, groups=4)), {"0": (6, 10)})
