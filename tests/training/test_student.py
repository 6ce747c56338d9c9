"""Students by name, at half the width, and from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from conftest import CIFAR
from torch import nn
from uneven_networks import uneven

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find, named, runs_code
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.resizing import half_of, widths_of
from dfcompress.models.saving import save
from dfcompress.models.stages import shared_stages, stage_outputs, stages_of
from dfcompress.training.student import make_student

HALVED = ["cifar_resnet20", "cifar_resnet18", "wrn16_2", "cifar_vgg11_bn", "mobilenet_v2", "lenet5", "hinton_mlp"]
CARD = ModelCard("cifar_resnet44", 7, (3, 32, 32), *CIFAR)


def card(name, classes=10):
    found = find(name)
    channels, size = found.channels, found.size if found.size <= 32 else 64
    return ModelCard(name, classes, (channels, size, size), (0.5,) * channels, (0.25,) * channels)


def widths(network):
    return [module.weight.shape[0] for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("resnet18", "cifar_resnet18"),
        ("vgg11_bn", "cifar_vgg11_bn"),
        ("cifar_resnet20", "cifar_resnet20"),
        ("wrn16_1", "wrn16_1"),
        ("mobilenet_v2", "mobilenet_v2"),
    ],
)
def test_a_student_fits_the_teachers_card(name, taken):
    student, what = make_student(name, CARD, seed=0)
    assert student(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert (student.card.architecture, student.card.classes, student.card.mean) == (taken, 7, CIFAR[0])
    assert taken in what
    assert ("3x3 stem" in what) == (taken != name)


def test_a_students_first_weights_depend_on_the_seed_alone():
    weights = [make_student("cifar_resnet20", CARD, seed=seed)[0].network.conv1.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_making_a_student_leaves_the_callers_randomness_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make_student("cifar_resnet20", CARD, seed=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("name", "message"), [("alexnet", "cannot take images of 3x32x32"), ("resnet19", "resnet18")])
def test_a_student_that_does_not_fit_is_refused(name, message):
    with pytest.raises(BadInput, match=message):
        make_student(name, CARD, seed=0)


@pytest.mark.parametrize("name", HALVED)
def test_half_has_half_the_channels_and_all_classes(name):
    whole, _ = make_student(name, card(name), seed=0)
    half, sentence = make_student("half", card(name), seed=0)
    assert half.card.architecture == f"half:{name}"
    assert f"half:{name}" in sentence
    *hidden, classes = widths(half.network)
    assert hidden == [(width + 1) // 2 for width in widths(whole.network)[:-1]]
    assert classes == 10


def test_a_network_that_counts_its_channels_itself_cannot_be_halved():
    with pytest.raises(BadInput, match="half:vit_b_16 does not fit the teacher: the code of vit_b_16 needs"):
        make_student("half", ModelCard("vit_b_16", 10, (3, 224, 224), (0.5,) * 3, (0.25,) * 3), seed=0)


def test_half_of_half_is_saved_and_read_without_being_named_again(tmp_path):
    student, _ = make_student("half:half:cifar_resnet20", card("cifar_resnet20"), seed=0)
    save(student, tmp_path)
    loaded = load(tmp_path)
    assert loaded.card.architecture == "half:half:cifar_resnet20"
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), student.eval()(images))


def test_half_of_uneven_widths_is_half_of_each(tmp_path):
    teacher = uneven("cifar_resnet20")
    student, sentence = make_student("half", teacher.card, seed=0)
    assert "each layer half as wide as the teacher's" in sentence
    assert widths_of(student.network) == half_of(teacher.network)
    assert student.card.architecture == "cifar_resnet20"
    save(student, tmp_path)
    assert load(tmp_path).card.widths == half_of(teacher.network)
    whole, _ = make_student("cifar_resnet20", teacher.card, seed=0)
    assert whole.card.widths is None
    assert whole.network.fc.in_features == 64


def test_only_a_users_own_factory_is_code():
    assert [runs_code(name) for name in ("resnet18", "half:resnet18", "timm:x", "half:timm:x")] == [False] * 4
    assert runs_code("net.py:make")
    assert runs_code("half:net.py:make")
    assert named("half:resnet18").name == "half:resnet18"


def test_a_student_starts_from_a_checkpoint(tmp_path):
    start, _ = make_student("lenet5_bn", card("lenet5_bn"), seed=7)
    save(start, tmp_path)
    student, sentence = make_student(None, card("lenet5_bn"), init=tmp_path, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    assert f"lenet5_bn from {tmp_path.name}" in sentence


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [("lenet5", 10, "holds lenet5_bn, not lenet5"), (None, 5, "for 10 classes of 1x32x32")],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, name, classes, message):
    save(make_student("lenet5_bn", card("lenet5_bn"), seed=7)[0], tmp_path)
    with pytest.raises(BadInput, match=message):
        make_student(name, card("lenet5_bn", classes), init=tmp_path, seed=0)


def test_without_a_name_and_a_checkpoint_there_is_no_student():
    with pytest.raises(BadInput, match="--student"):
        make_student(None, card("lenet5_bn"), seed=0)


def test_stages_are_the_last_features_of_each_resolution():
    student, _ = make_student("cifar_resnet20", card("cifar_resnet20"), seed=0)
    found = {size: (stage.module, stage.channels) for size, stage in stages_of(student).items()}
    assert found == {(32, 32): ("layer1", 16), (16, 16): ("layer2", 32), (8, 8): ("layer3", 64)}


def test_stages_of_two_networks_are_paired_by_resolution():
    teacher, _ = make_student("cifar_resnet20", card("cifar_resnet20"), seed=0)
    student, _ = make_student("wrn16_2", card("cifar_resnet20"), seed=0)
    assert [(own.channels, given.channels) for own, given in shared_stages(student, teacher)] == [
        (32, 16),
        (64, 32),
        (128, 64),
    ]
    mlp, _ = make_student("hinton_mlp", card("hinton_mlp"), seed=0)
    with pytest.raises(BadInput, match="no features of one resolution"):
        shared_stages(mlp, teacher)


def test_outputs_are_taken_inside_the_context_alone():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    classifier = Classifier(network, ModelCard("tiny", 2, (1, 8, 8), (0.5,), (0.25,)))
    with stage_outputs(classifier.network, ["0"]) as outputs:
        network(torch.ones(1, 1, 8, 8))
        (features,) = outputs.taken()
        assert features.shape == (1, 2, 6, 6)
    network(torch.ones(1, 1, 8, 8))
    assert outputs.outputs == {}
