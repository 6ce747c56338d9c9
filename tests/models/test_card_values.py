"""A card says how each of its values is known, and only values that fit are taken."""

from __future__ import annotations

import pytest
import torch
from conftest import CIFAR, IMAGENET

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find, named
from dfcompress.models.checkpoint import load


def test_each_value_says_how_it_is_known(resnet20_file, tmp_path):
    (tmp_path / "names").write_text("\n".join("abcdefghij"))
    card = load(resnet20_file, class_names=tmp_path / "names").card
    assert card.class_names == tuple("abcdefghij")
    assert card.origin == {
        "architecture": "recognised",
        "classes": "recognised",
        "input_size": "assumed",
        "mean": "recognised",
        "std": "recognised",
        "class_names": "given",
    }


@pytest.mark.parametrize(
    ("name", "classes", "channels", "input_size", "mean"),
    [
        ("resnet18", 1000, 3, (3, 224, 224), IMAGENET[0]),
        ("googlenet", 1000, 3, (3, 224, 224), (0.5, 0.5, 0.5)),
        ("cifar_resnet18", 100, 3, (3, 32, 32), CIFAR[0]),
        ("lenet5", 10, 1, (1, 32, 32), (0.1307,)),
        ("cifar_resnet20", 10, 5, (5, 32, 32), (0.5,) * 5),
    ],
)
def test_what_no_tensor_tells_is_assumed_as_is_usual(name, classes, channels, input_size, mean, tmp_path):
    torch.save(find(name).make(classes, channels).state_dict(), tmp_path / "net.pt")
    card = load(tmp_path / "net.pt").card
    assert (card.classes, card.input_size, card.mean) == (classes, input_size, mean)
    assert card.origin["input_size"] == card.origin["mean"] == "assumed"


@pytest.mark.parametrize("content", ["{", "[1]", '{"mean": "0.5"}', '{"input_size": [1, 32, -32]}', '{"std": [null]}'])
def test_a_damaged_sidecar_is_named(content, lenet_file):
    lenet_file.with_name("lenet.card.json").write_text(content)
    with pytest.raises(BadInput, match=r"lenet\.card\.json"):
        load(lenet_file)


def test_the_remedy_for_an_input_size_of_other_channels_can_be_pasted(lenet_file):
    with pytest.raises(BadInput) as refused:
        load(lenet_file, input_size=(3, 32, 32))
    assert refused.value.remedy == "Use --input-size 1x32x32."
    assert load(lenet_file, input_size=(1, 32, 32)).card.input_size == (1, 32, 32)


def test_what_a_librarys_configuration_alone_states_is_said_to_be_assumed(tmp_path, monkeypatch):
    heard: list[str] = []
    monkeypatch.setattr("dfcompress.console.notice", heard.append)
    torch.save(find("squeezenet1_1").build(5, 3).state_dict(), tmp_path / "net.pt")
    load(tmp_path / "net.pt")
    assert heard == [
        f"{tmp_path}/net.pt: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --input-size 3x224x224 assumed, "
        "as is usual for squeezenet1_1; give what it was trained with."
    ]
    heard.clear()
    card = load(tmp_path / "net.pt", mean=IMAGENET[0], std=IMAGENET[1]).card
    assert (card.origin["mean"], card.origin["input_size"], heard) == ("given", "assumed", [])


def test_a_network_of_timm_is_recognised_with_what_timm_states_as_usual(tmp_path):
    torch.manual_seed(0)
    torch.save({"model": named("timm:test_vit").build(7, 3).state_dict()}, tmp_path / "net.pth")
    card = load(tmp_path / "net.pth").card
    assert (card.architecture, card.classes, card.input_size) == ("timm:test_vit", 7, (3, 160, 160))
    assert (card.mean, card.origin["mean"]) == ((0.5,) * 3, "assumed")
