"""Tensors are matched to the architecture that the user names, else to the file's, else to the recognised one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import seen_classifier
from safetensors.torch import save_file

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, quantize_layers
from dfcompress.models.safe_reading import CARD_KEY, QUANTIZATION_KEY, read
from dfcompress.models.saving import save
from dfcompress.training.student import make_student

sys.path.insert(0, str(Path(__file__).parent))
import factories
from factories import SPEC, written


@pytest.mark.parametrize(
    ("classes", "why"), [(10**12, "from 1 to 1,048,576"), (10**6, "is too small for"), (11, "not torch.float32")]
)
def test_a_packed_file_with_a_wrong_number_of_classes_is_refused(classes, why, tmp_path):
    classifier = seen_classifier()
    quantize_layers(classifier.network, {"fc1": (4, 32)})
    freeze(classifier.network)
    save(Classifier(classifier.network, ModelCard("lenet5_bn", classes, (1, 32, 32), (0.5,), (0.25,))), tmp_path)
    with pytest.raises(BadInput, match=why):
        load(tmp_path)


def test_an_architecture_of_torchvision_may_be_named_with_its_library(lenet_file):
    with pytest.raises(BadInput, match="is not resnet18"):
        load(lenet_file, arch="torchvision:resnet18")


FACTORY = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").touch()

def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
"""


def test_a_network_of_the_users_own_is_built_by_the_factory_named(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    from torch import nn

    own = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
    torch.save(own.state_dict(), tmp_path / "net.pt")
    spec = f"{tmp_path / 'net.py'}:make"
    with pytest.raises(BadInput, match=r"input size of .* is not known"):
        load(tmp_path / "net.pt", arch=spec)
    classifier = load(tmp_path / "net.pt", arch=spec, input_size=(1, 20, 20), mean=(0.0,), std=(1.0,))
    images = torch.rand(2, 1, 20, 20)
    assert torch.equal(classifier(images), own(images))
    assert classifier.card.classes == 7


@pytest.mark.parametrize("before", ["", "half:", "half:half:", "timm:", "torchvision:"])
@pytest.mark.parametrize("packed", [True, False])
def test_code_that_a_file_names_is_not_run_until_the_user_names_it(before, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net.py", "timm:net.py", "torchvision:net.py"):
        (tmp_path / name).write_text(FACTORY)
    card = ModelCard(f"{before}net.py:make", 7, (1, 20, 20), (0.0,), (1.0,)).to_json()
    metadata = {CARD_KEY: json.dumps(card)}
    if packed:
        metadata[QUANTIZATION_KEY] = json.dumps({"version": 2, "layers": {}})
    save_file({"0.weight": torch.zeros(4, 1, 3, 3), "3.bias": torch.zeros(7)}, "a.safetensors", metadata)
    with pytest.raises(BadInput, match="was made with --arch"):
        load("a.safetensors")
    assert not (tmp_path / "ran").exists()


def test_other_names_in_the_same_order_are_matched_on_request(tmp_path):
    classifier = seen_classifier()
    state = classifier.network.state_dict()
    torch.save({f"layer{i}.{name[-9:]}": value for i, (name, value) in enumerate(state.items())}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match="none of the known architectures"):
        load(tmp_path / "net.pt")
    # BatchNorm's counters have other names there, too, so only their shape tells them.
    plain = {f"t{i}": v for i, (n, v) in enumerate(state.items()) if "num_batches" not in n}
    torch.save(plain, tmp_path / "net.pt")
    again = load(tmp_path / "net.pt", arch="lenet5_bn", match_by_order=True, mean=(0.5,), std=(0.25,))
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(again(images), classifier(images))
    save(again, tmp_path / "result")  # It has the names, and stands in one line with the file that it came from.
    result = load(tmp_path / "result", arch="lenet5_bn", match_by_order=True)
    assert torch.equal(result(images), classifier(images))


def test_matching_by_order_checks_every_shape_and_the_number(tmp_path):
    state = list(find("lenet5").make(10, 1).state_dict().values())
    torch.save({f"t{i}": value for i, value in enumerate([*state[2:4], *state[:2], *state[4:]])}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"lenet5 has conv1\.weight .* there"):
        load(tmp_path / "a.pt", arch="lenet5", match_by_order=True)
    torch.save({f"t{i}": value for i, value in enumerate(state[:-1])}, tmp_path / "b.pt")
    with pytest.raises(BadInput, match="has 9 tensors, lenet5 10"):
        load(tmp_path / "b.pt", arch="lenet5", match_by_order=True)


def test_safetensors_keeps_no_order_to_match_by(tmp_path):
    save_file(find("lenet5").make(10, 1).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(BadInput, match="sorts its tensors by name"):
        load(tmp_path / "net.safetensors", arch="lenet5", match_by_order=True)


@pytest.mark.parametrize("factory", ["sized", "handing_on"])
def test_a_factory_that_takes_num_classes_gets_it(factory, tmp_path):
    path = written(factories.sized(4), tmp_path)
    with pytest.raises(BadInput, match=r"fc\.weight is 4x8, expected 10x8") as refused:
        load(path, arch=SPEC + factory, input_size=(3, 16, 16))
    assert "--num-classes N says how many" in refused.value.remedy
    classifier = load(path, arch=SPEC + factory, input_size=(3, 16, 16), num_classes=4)
    assert (classifier.card.classes, classifier.card.origin["classes"]) == (4, "given")
    save(classifier, tmp_path / "out")
    assert load(tmp_path / "out", arch=SPEC + factory).card.classes == 4
    assert make_student(SPEC + factory, classifier.card, seed=0)[0].network.fc.out_features == 4


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_factory_whose_layers_have_no_shape_yet_is_told_to_give_them_one(tmp_path):
    path = written(factories.plain(), tmp_path)
    with pytest.raises(BadInput, match=r"lazy gave a network whose 0\.weight has no shape yet") as refused:
        load(path, arch=f"{SPEC}lazy", input_size=(3, 16, 16))
    assert "show a batch of images to its lazy layers" in refused.value.remedy


@pytest.mark.parametrize("how", ["recognised", "stated", "named"])
def test_tensors_tell_the_classes_of_a_known_architecture_whatever_number_a_card_or_the_user_gives(how, tmp_path):
    path = written(seen_classifier().network, tmp_path)
    card = {"classes": 7} | ({"architecture": "lenet5_bn"} if how == "stated" else {})
    (tmp_path / "net.card.json").write_text(json.dumps(card))
    arch = "lenet5_bn" if how == "named" else None
    assert load(path, arch=arch).card.classes == 10
    with pytest.raises(BadInput, match="lenet5_bn has 10 outputs, not 7") as refused:
        load(path, arch=arch, num_classes=7)
    assert "--num-classes 10" in refused.value.remedy


def test_names_of_a_users_own_network_may_begin_like_a_wrappers(tmp_path):
    path = written(factories.within(), tmp_path)
    classifier = load(path, arch=f"{SPEC}within", input_size=(3, 16, 16))
    assert next(iter(classifier.network.state_dict())) == "model.module.conv1.weight"
    save(classifier, tmp_path / "out")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(load(tmp_path / "out", arch=f"{SPEC}within")(images), classifier(images))


def test_prefixes_are_taken_off_where_the_architecture_is_named(tmp_path):
    network = factories.seen(factories.plain())
    averaged = torch.optim.swa_utils.AveragedModel(network)
    wrapped = {f"model.{name}": value for name, value in averaged.state_dict().items()}
    torch.save({"state_dict": wrapped | {"criterion.pos_weight": torch.ones(10)}}, tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=f"{SPEC}plain", input_size=(3, 16, 16))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(classifier(images), network(classifier.normalise(images)))


def test_the_remedy_for_a_wrong_architecture_is_the_right_one(lenet_file, tmp_path):
    with pytest.raises(BadInput) as refused:
        load(lenet_file, arch="lenet5")
    assert refused.value.remedy == "It is lenet5_bn: leave --arch out, or name that."
    assert load(lenet_file, arch="lenet5_bn").card.architecture == load(lenet_file).card.architecture == "lenet5_bn"
    tensors = {f"t{i}.weight": value for i, value in enumerate(read(lenet_file).tensors.values())}
    torch.save(tensors, tmp_path / "renamed.pt")
    with pytest.raises(BadInput) as refused:
        load(tmp_path / "renamed.pt", arch="lenet5_bn")
    assert refused.value.remedy == "Where only the names differ, add --match-by-order."
    assert load(tmp_path / "renamed.pt", arch="lenet5_bn", match_by_order=True).card.classes == 10


@pytest.mark.parametrize("packed", [True, False])
def test_a_card_may_name_torchvision_as_arch_does(packed, tmp_path):
    made = seen_classifier()
    named = Classifier(made.network, dataclasses.replace(made.card, architecture="torchvision:lenet5_bn")).frozen()
    if packed:
        quantize_layers(named.network, {"conv1": (8, 32)})
        freeze(named.network)
    save(named, tmp_path)
    images = torch.rand(2, *named.card.input_size)
    assert torch.equal(load(tmp_path)(images), named(images))


@pytest.mark.parametrize("arch", [None, "resnet18"])
def test_a_file_without_the_last_layer_or_with_more_is_told_what_helps(arch, tmp_path):
    tensors = find("resnet18").make(10, 3).state_dict()
    more = tensors | {"layer5.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
    body = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    torch.save(body, tmp_path / "body.pt")
    torch.save(more, tmp_path / "more.pt")
    with pytest.raises(BadInput) as refused:
        load(tmp_path / "body.pt", arch=arch)
    assert "fc.weight 10x512 is missing" in refused.value.problem
    assert refused.value.remedy == "Use a file that has the last layer, too."
    assert ("the body of resnet18 without its last layer, so it is no" in refused.value.problem) == (arch is None)
    with pytest.raises(BadInput, match=r"layer5\.0\.conv1\.weight 8x8x3x3 is not in it") as refused:
        load(tmp_path / "more.pt", arch=arch)
    assert "name the whole network with --arch file.py:factory" in refused.value.remedy


def _timm_folder(folder: Path, name: str) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=5)
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 5,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 160, 160]},
        "label_names": list("abcde"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return network.eval()


@pytest.mark.parametrize(
    ("name", "taken"), [("resnet18", "resnet18"), ("mobilenetv3_small_050", "timm:mobilenetv3_small_050")]
)
def test_a_timm_folder_is_read_with_its_card(name, taken, tmp_path):
    network = _timm_folder(tmp_path / "hub", name)
    classifier = load(tmp_path / "hub")
    assert (classifier.card.architecture, classifier.card.classes) == (taken, 5)
    assert (classifier.card.mean, classifier.card.input_size) == ((0.1, 0.2, 0.3), (3, 160, 160))
    assert classifier.card.class_names == tuple("abcde")
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        expected = network(classifier.normalise(images))
    assert torch.allclose(classifier(images), expected, atol=1e-5)


def test_timms_names_are_taken_where_both_know_a_network_by_one_name(tmp_path):
    _timm_folder(tmp_path / "hub", "efficientnet_b0")
    assert load(tmp_path / "hub").card.architecture == "timm:efficientnet_b0"
