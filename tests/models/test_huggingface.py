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
from dfcompress.models.checkpoint import load
from dfcompress.models.saving import save
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
        ({"architectures": ["ResNetModel"]}, "holds ResNetModel, which is not an image classifier"),
        ({"model_type": "no_such_type"}, "transformers has no image classifier of type 'no_such_type'"),
        ({"model_type": "detr"}, "transformers has no image classifier of type 'detr'"),
        ({"model_type": ["resnet"]}, "transformers does not take its config"),
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


TINY_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
}


@needs_transformers
@pytest.mark.parametrize("form", ["folder", "card"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "evil.pth"}},
            "model of timm that transformers wraps",
        ),
        (
            {"model_type": "timm_wrapper", "architecture": "hf-hub:some/one"},
            "model of timm that|made with --arch hf-hub",
        ),
        (
            {
                "model_type": "shieldgemma2",
                "text_config": TINY_TEXT,
                "vision_config": {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "evil.pth"}},
            },
            "is not transformers:shieldgemma2",
        ),
    ],
)
def test_a_config_does_not_let_timm_open_files_or_addresses(config, message, form, tmp_path, monkeypatch):
    """transformers hands the values of its wrapper, which may stand inside of another config, to timm.create_model."""
    timm = pytest.importorskip("timm")
    asked: list[object] = []
    monkeypatch.setattr(timm, "create_model", lambda *given, **named: asked.append((given, named)))
    path = tmp_path / "model.safetensors"
    if form == "folder":
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 10}))
        save_file({"a": torch.zeros(2, 2)}, path)
        path = tmp_path
    else:
        card = {"architecture": f"transformers:{config['model_type']}", "classes": 10, "input_size": [3, 224, 224]}
        card |= {"mean": [0.5] * 3, "std": [0.5] * 3, "config": config}
        save_file({"a": torch.zeros(2, 2)}, path, {"dfcompress": json.dumps(card)})
    with pytest.raises(BadInput, match=message):
        load(path)
    assert not asked


@needs_transformers
@pytest.mark.parametrize("place", ["preprocessor_config.json", "config.json"])
def test_a_processor_is_one_of_image_classifiers(place, tmp_path):
    """transformers takes any of its classes: OneFormer's processor opens a file or downloads it, a model loads itself.

    What a config.json says of processors is not asked; the usual one of its type is taken.
    """
    _written("ResNet", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    stated = json.loads((tmp_path / place).read_text())
    for name in ("OneFormerImageProcessor", "TimmWrapperModel", "TimmWrapperImageProcessor"):
        asked = {"image_processor_type": name, "class_info_file": str(tmp_path / "classes.json"), "pretrained_cfg": {}}
        (tmp_path / place).write_text(json.dumps(stated | asked))
        if place == "config.json":
            assert load(tmp_path).card.architecture == "transformers:resnet"
        else:
            with pytest.raises(BadInput, match=f"'{name}' is not an image processor of a classifier"):
                load(tmp_path)


@needs_transformers
@pytest.mark.parametrize("name", ["ConvNextImageProcessor", "ConvNextImageProcessorFast"])
@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
def test_a_processor_of_an_earlier_version_is_read(name, key, tmp_path):
    _written("ResNet", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    del values["image_processor_type"]
    named = name.replace("ImageProcessor", "FeatureExtractor") if key == "feature_extractor_type" else name
    path.write_text(json.dumps({**values, key: named}))
    assert load(tmp_path).card.mean == (0.485, 0.456, 0.406)


@needs_transformers
def test_a_config_does_not_choose_code_of_the_hub(tmp_path):
    """An implementation of attention that is named like a repository is downloaded and run."""
    _written("ResNet", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    asked = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config | asked))
    card = load(tmp_path).card
    assert card.config is not None
    assert card.config["model_type"] == "resnet"
    assert not asked.keys() & card.config.keys()


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
