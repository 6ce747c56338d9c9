"""What is saved comes back to the bit, with its card."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import seen_classifier

from dfcompress.models.architectures import architectures, find
from dfcompress.models.checkpoint import load
from dfcompress.models.fake_quantizers import freeze, is_quantized, quantizable_layers, quantize_layers
from dfcompress.models.saving import save, state_bytes, write_sidecar
from dfcompress.verbs.inspect import inspect


def test_a_saved_classifier_comes_back_to_the_bit_with_its_card(tmp_path):
    classifier = seen_classifier()
    save(classifier, tmp_path / "result")
    again = load(tmp_path / "result")
    images = torch.rand(4, 1, 32, 32)
    assert torch.equal(again(images), classifier(images))
    assert again.card.class_names == tuple("abcdefghij")
    assert (again.card.mean, again.card.std) == ((0.5,), (0.25,))
    assert again.card.origin["mean"] == "read"


def test_either_file_of_a_result_tells_the_card(tmp_path):
    save(seen_classifier(), tmp_path / "result")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "result" / "model.safetensors").read_bytes())
    assert load(alone).card.mean == (0.5,)
    config = json.loads((tmp_path / "result" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("lenet5_bn", 10)
    assert config["pretrained_cfg"]["mean"] == [0.5]
    assert config["pretrained_cfg"]["label_names"] == list("abcdefghij")


def test_a_quantized_classifier_comes_back_to_the_bit(tmp_path):
    classifier = seen_classifier("cifar_resnet20", (3, 32, 32))
    layers = [name for name, module in classifier.network.named_modules() if hasattr(module, "weight")]
    layers = [name for name in layers if "bn" not in name]
    quantize_layers(classifier.network, dict.fromkeys(quantizable_layers(classifier.network, layers), (4, 32)))
    freeze(classifier.network)
    save(classifier, tmp_path / "packed")
    again = load(tmp_path / "packed")
    images = torch.rand(4, 3, 32, 32)
    assert is_quantized(again.network)
    assert torch.equal(again(images), classifier(images))
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size < 0.17 * state_bytes(_float_resnet20())


def _float_resnet20() -> torch.nn.Module:
    return find("cifar_resnet20").make(10, 3)


def test_a_sidecar_written_and_corrected_is_read(lenet_file):
    sidecar = write_sidecar(load(lenet_file))
    assert sidecar.name == "lenet.card.json"
    values = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(values | {"mean": [0.25], "class_names": list("0123456789")}))
    card = load(lenet_file).card
    assert (card.mean, card.class_names, card.origin["mean"]) == ((0.25,), tuple("0123456789"), "read")
    assert load(lenet_file, mean=[0.75]).card.mean == (0.75,)


# One of each family whose smallest takes about a second.
SMALL = {
    "cifar_resnet18", "cifar_resnet20", "cifar_vgg11_bn", "efficientnet_b0", "hinton_mlp_small", "lenet5_bn",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5",
    "squeezenet1_1", "wrn16_1",
}  # fmt: skip

# More than 150 million parameters: `test_every_network_takes_the_tensors_of_its_file` has them without memory.
LARGE = {"convnext_large", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SMALL else [pytest.mark.slow, pytest.mark.release])
        for name in sorted(architectures().keys() - LARGE)
    ],
)
def test_every_architecture_is_saved_loaded_and_inspected(name, tmp_path):
    architecture = find(name)
    network = architecture.make(3, architecture.channels)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    del network
    found = inspect(tmp_path / "net.pt")
    assert (found.architecture, found.classes) == (name, 3)
    save(load(tmp_path / "net.pt"), tmp_path / "out")
    (tmp_path / "net.pt").unlink()
    assert inspect(tmp_path / "out").macs == found.macs


def test_a_quantized_mnasnet_comes_back_to_the_bit(tmp_path):
    """torchvision's MNASNets ask which version a state dict is of."""
    classifier = seen_classifier("mnasnet0_5", (3, 32, 32))
    quantize_layers(classifier.network, {"classifier.1": (4, 32)})
    freeze(classifier.network)
    save(classifier, tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load(tmp_path)(images), classifier(images))
