"""The state dict is found in mappings, modules and instances; what belongs to unknown classes is refused by name."""

from __future__ import annotations

import collections

import pytest
import torch
import torchvision
from saved_files import FORMATS, WEIGHTS, Mapping, imported_stranger, same
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.safe_reading import read


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    yield from imported_stranger(tmp_path, monkeypatch)


def test_weights_in_a_mapping_of_its_own_class_are_read(tmp_path):
    torch.save(Mapping(epoch=3, model=collections.defaultdict(None, WEIGHTS)), tmp_path / "net.pt")
    assert same(read(tmp_path / "net.pt").tensors, WEIGHTS)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_a_pickled_wrapper_of_torch_is_read_as_data(wrapper, tmp_path):
    network = torchvision.models.resnet18(num_classes=7)
    torch.save(wrapper(network).cpu(), tmp_path / "net.pt")  # `DataParallel` moves it to a GPU if there is one.
    expected = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    found = read(tmp_path / "net.pt").tensors
    assert same({name.removeprefix("module."): tensor for name, tensor in found.items()}, expected)


def test_buffers_that_a_module_does_not_save_are_left_out(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    network.register_buffer("passing", torch.ones(2, 2), persistent=False)
    torch.save(network, tmp_path / "net.pt")
    assert sorted(read(tmp_path / "net.pt").tensors) == ["0.bias", "0.weight"]


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_children_that_share_children_end_in_a_message(form, tmp_path):
    """Sixty modules, of which a state_dict would have 2**60 names."""
    module: nn.Module = nn.Conv2d(1, 1, 1)
    for _ in range(60):
        module = nn.Sequential(module, module)
    torch.save({"model": module, "net": module}, tmp_path / "net.pt", **FORMATS[form])
    with pytest.raises(BadInput, match="names more than 100,000 modules"):
        read(tmp_path / "net.pt")


def test_a_module_in_two_places_has_both_names(tmp_path):
    layer = nn.Conv2d(1, 1, 1)
    torch.save(nn.Sequential(layer, layer), tmp_path / "net.pt")
    assert sorted(read(tmp_path / "net.pt").tensors) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_a_loss_of_a_class_not_known_does_not_hide_the_weights(stranger, tmp_path):
    torch.save({"my_net": WEIGHTS, "loss": stranger.Net()}, tmp_path / "net.pt")
    assert same(read(tmp_path / "net.pt").tensors, WEIGHTS)


def test_several_modules_of_classes_not_known_are_named(stranger, tmp_path):
    torch.save({"first": stranger.Net(), "second": stranger.Holder(stranger.Net())}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"\(stranger\.Holder, stranger\.Net\).*Ask its author"):
        read(tmp_path / "net.pt")


@pytest.mark.parametrize("key", ["a'b", 'a"; touch proof; "', "$(touch proof)", "`touch proof`", "a\x1b[2J"])
def test_no_line_is_made_of_a_key_that_a_shell_would_run(key, stranger, tmp_path):
    torch.save({key: stranger.Net()}, tmp_path / "net.pt")
    with pytest.raises(BadInput) as refused:
        read(tmp_path / "net.pt")
    assert refused.value.remedy == "Ask its author for the state_dict(), or for safetensors."
