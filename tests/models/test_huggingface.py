"""Folders that `save_pretrained` of transformers writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find
from dfcompress.models.checkpoint import load, save
from dfcompress.training.student import make_student

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
NAMES = ("cat", "dog", "cow")


def _written(kind: str, folder: Path) -> torch.nn.Module:
    """A small network of that kind, its BatchNorms with statistics, saved with its processor."""
    import transformers

    given = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    small = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], **given}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    crop = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
    configs = {
        "ResNet": transformers.ResNetConfig(embedding_size=8, layer_type="basic", **small),
        "RegNet": transformers.RegNetConfig(embedding_size=8, groups_width=8, **small),
        "ConvNext": transformers.ConvNextConfig(**small),
        "MobileNetV2": transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=64, **given),
        "MobileViT": transformers.MobileViTConfig(
            image_size=64, hidden_sizes=[16] * 3, neck_hidden_sizes=[8] * 6 + [16], num_attention_heads=2, **given
        ),
    }
    processors = {
        "MobileNetV2": transformers.MobileNetV2ImageProcessor(**crop),
        "MobileViT": transformers.MobileViTImageProcessor(**crop),
    }
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForImageClassification")(configs[kind])
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # All batches count alike, and the statistics that it begins with do not.
        for _ in range(3):
            network.train()(torch.rand(4, 3, 64, 64))
    network.save_pretrained(folder)
    usual = transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, **imagenet)
    processors.get(kind, usual).save_pretrained(folder)
    return network.eval()


@needs_transformers
@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("ResNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("RegNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("ConvNext", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("MobileNetV2", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("MobileViT", (0, 0, 0), (1, 1, 1)),
    ],
)
def test_a_folder_is_read_with_its_processor_and_saved_and_read_again(kind, mean, std, tmp_path):
    network = _written(kind, tmp_path / "hub")
    classifier = load(tmp_path / "hub")
    card = classifier.card
    assert (card.input_size, card.classes, card.class_names) == ((3, 64, 64), 3, NAMES)
    assert (card.mean, card.std) == (mean, std)
    images = torch.rand(2, 3, 64, 64)
    # MobileViT's processor hands over blue, green, red.
    given = images.flip(1) if kind == "MobileViT" else images
    with torch.no_grad():
        expected = network(classifier.normalise(given)).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(classifier(images), expected, rtol=1e-4, atol=1e-5)
    save(classifier, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(again(images), classifier(images))
    assert again.card.class_names == NAMES


@needs_transformers
def test_students_are_built_from_a_folders_config_and_others_from_their_own_names(tmp_path):
    _written("ResNet", tmp_path)
    card = load(tmp_path).card
    half, _ = make_student("half", card, seed=0)
    assert half.card.config == card.config
    save(half, tmp_path / "half")
    assert load(tmp_path / "half").card.architecture == "half:transformers:resnet"
    other, _ = make_student("cifar_resnet20", card, seed=0)
    assert other.card.config is None


@needs_transformers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["ResNetModel"]}, "holds ResNetModel, which is no image classifier"),
        ({"model_type": "no_such_type"}, "transformers does not take its config"),
        ({"depths": "many"}, "transformers"),
        ({"hidden_sizes": [8, 16, 16, 32]}, "is not transformers:resnet"),
    ],
)
def test_a_folder_that_transformers_cannot_build_is_refused(change, message, tmp_path):
    _written("ResNet", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=message):
        load(tmp_path)


@needs_transformers
def test_code_in_a_folder_is_not_run(tmp_path):
    _written("ResNet", tmp_path)
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Net: pass\n"
    (tmp_path / "net.py").write_text(code)
    auto = {"AutoConfig": "net.Net", "AutoModelForImageClassification": "net.Net", "AutoImageProcessor": "net.Net"}
    for file in ("config.json", "preprocessor_config.json"):
        values = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(values | {"auto_map": auto}))
    assert load(tmp_path).card.architecture == "transformers:resnet"
    assert not list(tmp_path.rglob("ran"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder whose config is one of transformers."""
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = find("lenet5").make(10, 1).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_without_transformers_the_message_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="is a model of Hugging Face's transformers, which is not installed") as refused:
        load(folder)
    assert refused.value.remedy == "Install it with: pip install 'dfcompress[transformers]'."


def test_a_folder_of_an_architecture_that_was_named_needs_no_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load(folder, arch="lenet5").card.architecture == "lenet5"
