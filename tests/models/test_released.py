"""torchvision's and timm's weights by name, from caches laid out as the libraries do; no test fetches anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models
from safetensors.torch import save_file

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find
from dfcompress.models.checkpoint import load
from dfcompress.models.released import is_released
from dfcompress.models.saving import write_sidecar

HUB_FILE = "squeezenet1_1-b8a52dc0.pth"
TINY = "test_efficientnet"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """torch.hub's cache, where nothing else is found."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def hugging_face(tmp_path, monkeypatch) -> Path:
    """Hugging Face's cache, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hf"


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr("dfcompress.console.notice", heard.append)
    return heard


def _squeezenet() -> torch.nn.Module:
    torch.manual_seed(0)
    return find("squeezenet1_1").build(1000, 3).eval()


def _cache_tiny(cache: Path) -> torch.nn.Module:
    """A small network of timm's in Hugging Face's cache, as if it had been fetched."""
    torch.manual_seed(0)
    network = timm.create_model(TINY, num_classes=1000).eval()
    repository = cache / f"models--timm--{TINY}.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abcd")
    (repository / "snapshots/0123abcd").mkdir(parents=True)
    save_file(network.state_dict(), repository / "snapshots/0123abcd/model.safetensors")
    return network


def test_torchvisions_weights_come_from_its_cache_with_what_it_states_of_them(hub, notices):
    network = _squeezenet()
    torch.save(network.state_dict(), hub / HUB_FILE)
    classifier = load("torchvision:squeezenet1_1")
    stated = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    assert classifier.name == "squeezenet1_1.IMAGENET1K_V1"
    assert classifier.card.architecture == "squeezenet1_1"
    assert classifier.card.class_names == tuple(stated.meta["categories"])
    assert (classifier.card.input_size, classifier.card.mean) == ((3, 224, 224), (0.485, 0.456, 0.406))
    assert {classifier.card.origin[each] for each in ("mean", "std", "input_size", "class_names")} == {"read"}
    assert notices == []
    images = torch.rand(1, 3, 256, 256)  # The library's transforms crop the middle.
    cropped = images[..., 16:240, 16:240].contiguous()
    assert torch.equal(classifier(cropped), network(stated.transforms()(images)))


def test_options_stand_over_what_the_library_states(hub):
    torch.save(_squeezenet().state_dict(), hub / HUB_FILE)
    card = load("torchvision:squeezenet1_1.IMAGENET1K_V1", mean=(0.5,) * 3, input_size=(3, 128, 128)).card
    assert (card.mean, card.input_size, card.origin["mean"]) == ((0.5,) * 3, (3, 128, 128), "given")


def test_networks_that_torchvision_lets_turn_their_images_keep_the_values_they_need(hub):
    torch.save(torchvision.models.googlenet(init_weights=False).state_dict(), hub / "googlenet-1378be20.pth")
    card = load("torchvision:googlenet").card
    assert (card.mean, card.std, card.input_size) == ((0.5,) * 3, (0.5,) * 3, (3, 224, 224))


@pytest.mark.parametrize("spec", [f"timm:{TINY}", f"timm:{TINY}.r160_in1k"])
def test_timms_weights_come_from_hugging_faces_cache_with_what_timm_states_of_them(spec, hugging_face, notices):
    network = _cache_tiny(hugging_face)
    classifier = load(spec)
    config = timm.get_pretrained_cfg(TINY)
    assert classifier.name == f"{TINY}.r160_in1k"
    assert classifier.card.architecture == f"timm:{TINY}"
    assert (classifier.card.input_size, classifier.card.mean) == (config.input_size, config.mean)
    assert classifier.card.class_names is not None
    assert classifier.card.class_names[0].startswith("tench")
    assert notices == []
    images = torch.rand(1, *config.input_size)
    assert torch.allclose(classifier(images), network(classifier.normalise(images)), atol=1e-5)


def test_timms_weights_may_lie_in_the_cache_of_torch_hub(hub, hugging_face):
    network = timm.create_model("lcnet_050", num_classes=1000)
    torch.save(network.state_dict(), hub / timm.get_pretrained_cfg("lcnet_050").url.rpartition("/")[2])
    assert load("timm:lcnet_050").card.architecture == "timm:lcnet_050"


def test_the_cache_is_read_safely_and_nothing_is_written_into_it(hub):
    torch.save({"state_dict": _squeezenet().state_dict(), "hook": os.getcwd}, hub / HUB_FILE)
    with pytest.raises(BadInput, match="pickled program"):
        load("torchvision:squeezenet1_1")
    torch.save(_squeezenet().state_dict(), hub / HUB_FILE)
    with pytest.raises(BadInput, match="was not read from a file"):
        write_sidecar(load("torchvision:squeezenet1_1"))
    assert [file.name for file in hub.iterdir()] == [HUB_FILE]


def test_what_is_not_there_is_fetched_with_one_line_and_refused_in_one_sentence(hub, notices, monkeypatch):
    def refuse(url, file, hash_prefix, progress):
        assert hash_prefix == "b8a52dc0"
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(BadInput, match=r"squeezenet1_1-b8a52dc0.pth cannot be fetched: .*no network"):
        load("torchvision:squeezenet1_1")
    assert len(notices) == 1
    assert "(5 MB)" in notices[0]


def test_what_is_fetched_is_loaded(hub, notices, monkeypatch):
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, file, **options: torch.save(_squeezenet().state_dict(), file)
    )
    assert load("torchvision:squeezenet1_1").card.classes == 1000


def test_hugging_face_without_a_network_ends_in_one_sentence(hugging_face, hub, notices):
    with pytest.raises(BadInput, match=r"timm/test_efficientnet\.r160_in1k cannot be fetched"):
        load(f"timm:{TINY}")
    assert len(notices) == 1
    assert "(1 MB)" in notices[0]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("torchvision:resnet19", "no classification model 'resnet19'. Did you mean resnet"),
        ("torchvision:resnet18.V7", "no weights 'V7' of resnet18"),
        ("timm:resnet19", "timm has no model 'resnet19'. Did you mean"),
        ("timm:resnet18.a7_in1k", "no weights 'a7_in1k' of resnet18. Did you mean a3_in1k"),
        ("timm:resnet50_gn.nope", "timm has no weights 'nope'"),
        ("timm:resnetblur18", "released no weights of resnetblur18"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(spec, told, hub, hugging_face):
    with pytest.raises(BadInput) as refused:
        load(spec)
    assert told in str(refused.value)


def test_a_file_of_such_a_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_released(Path("timm:resnet18"))
    Path("timm:resnet18").write_bytes(b"x")
    assert not is_released(Path("timm:resnet18"))


def test_the_command_line_takes_a_name_and_ends_with_2_where_it_cannot(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "dfcompress", "inspect", f"timm:{TINY}", "--json"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 2
    _cache_tiny(tmp_path / "hub")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["architecture"] == f"timm:{TINY}"
