"""A file becomes the classifier that was released, and one that was made in Python is prepared like it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CIFAR, IMAGENET

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier, load, load_saved
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, is_quantized, quantize_layers
from dfcompress.models.saving import save
from dfcompress.quantization.calibration import Calibration
from dfcompress.verbs.inspect import inspect
from dfcompress.verbs.quantize import quantize

sys.path.insert(0, str(Path(__file__).parent))
import factories
from factories import SPEC, written


def _correct(classifier: Classifier, file: Path) -> int:
    with np.load(file) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    with torch.no_grad():
        return sum(
            int((classifier(batch.float() / 255).argmax(1) == truth).sum())
            for batch, truth in zip(images.split(256), labels.split(256), strict=True)
        )


def test_resnet20_is_right_on_776_of_846(resnet20_file, cifar10_test_file):
    classifier = load(resnet20_file)
    assert _correct(classifier, cifar10_test_file) == 776
    assert (classifier.card.architecture, classifier.card.classes) == ("cifar_resnet20", 10)
    assert (classifier.card.mean, classifier.card.std) == IMAGENET


def test_resnet44_is_right_on_793_of_846(resnet44_file, cifar10_test_file):
    classifier = load(resnet44_file)
    assert _correct(classifier, cifar10_test_file) == 793
    assert classifier.card.architecture == "cifar_resnet44"


def test_with_cifars_own_mean_and_std_resnet20_is_right_on_777(resnet20_file, cifar10_test_file):
    classifier = load(resnet20_file, mean=CIFAR[0], std=CIFAR[1])
    assert _correct(classifier, cifar10_test_file) == 777
    assert classifier.card.origin["mean"] == "given"


def test_loading_gives_a_frozen_fp32_network_in_evaluation_mode(lenet_file):
    classifier = load(lenet_file)
    assert not classifier.training
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in classifier.parameters())
    assert (classifier.name, len(classifier.sha256), classifier.path) == ("lenet", 64, lenet_file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.1, 0.2)}, "mean has 2 values for 1 channels"),
        ({"std": (0.0,)}, "std is (0.0,)"),
        ({"mean": (float("nan"),)}, "mean is (nan,)"),
        ({"input_size": (3, 32, 32)}, "does not fit weights of 1 channels"),
        ({"input_size": (1, 32)}, "input_size is (1, 32)"),
        ({"input_size": (1, 64, 64)}, "cannot take images of 1x64x64"),
        ({"arch": "lenet5"}, "is not lenet5"),
        ({"arch": "lenet"}, "no architecture 'lenet'"),
        ({"arch": "torchvision:resnet_18"}, "no architecture 'resnet_18'"),
        ({"arch": "net.py"}, "no architecture 'net.py'"),
        ({"arch": "no_such_file.py:make"}, "no_such_file.py does not exist"),
        ({"arch": "no_such_package:make"}, "no module 'no_such_package'"),
        ({"arch": "timm:no_such_model"}, "timm has no model 'no_such_model'"),
        ({"match_by_order": True}, "--match-by-order needs --arch"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, lenet_file):
    if "timm" in str(options):
        pytest.importorskip("timm")
    with pytest.raises(BadInput) as refused:
        load(lenet_file, **options)
    assert message in refused.value.problem


def test_class_names_of_another_number_are_refused(lenet_file, tmp_path):
    assert load(lenet_file, class_names=list("abcdefghij")).card.class_names == tuple("abcdefghij")
    (tmp_path / "names").write_text("cat\ndog\n")
    with pytest.raises(BadInput, match="2 class names for 10 classes"):
        load(lenet_file, class_names=tmp_path / "names")


def test_classes_and_channels_come_from_a_pass_and_not_from_the_order_of_definition(tmp_path):
    """The last weight defined is a convolution of 8 channels, the first of four dimensions a kernel of one channel."""
    path = written(factories.seen(factories.head_first()), tmp_path)
    classifier = load(path, arch=f"{SPEC}head_first", input_size=(3, 16, 16))
    assert (classifier.card.classes, len(classifier.card.mean)) == (7, 3)
    (tmp_path / "names").write_text("\n".join("abcdefg"))
    named = load(path, arch=f"{SPEC}head_first", input_size=(3, 16, 16), class_names=tmp_path / "names")
    assert named.card.class_names == tuple("abcdefg")


def test_a_number_of_classes_that_the_network_has_not_is_answered_with_the_one_it_has(tmp_path):
    path = written(factories.plain(), tmp_path)
    with pytest.raises(BadInput, match="has 10 outputs, not 4") as refused:
        load(path, arch=f"{SPEC}plain", input_size=(3, 16, 16), num_classes=4)
    assert "--num-classes 10" in refused.value.remedy
    assert load(path, arch=f"{SPEC}plain", input_size=(3, 16, 16), num_classes=10).card.classes == 10


OWN = ModelCard("my_net", 10, (3, 16, 16), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("form", ["plain", "weight_norm_parametrization", "softmax", "softmax_module"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_network_that_no_name_leads_to_is_saved_and_read_into_its_own_form(form, packed, tmp_path):
    classifier = as_classifier(Classifier(factories.seen(getattr(factories, form)()), OWN))
    if packed:
        quantize_layers(classifier.network, {"conv1": (8, 32), "fc": (4, 32)})
        freeze(classifier.network)
    save(classifier, tmp_path)
    again = load_saved(tmp_path, classifier)
    images = torch.rand(2, 3, 16, 16)
    assert again.network is not classifier.network
    assert is_quantized(again.network) == packed
    assert torch.equal(again(images), classifier(images))
    with pytest.raises(BadInput) as refused:
        load(tmp_path)
    assert "--arch file.py:factory" in refused.value.remedy
    assert torch.equal(load(tmp_path, arch=SPEC + form)(images), classifier(images))


def test_a_name_that_leads_to_another_network_is_not_believed(tmp_path):
    own = Classifier(factories.plain(), dataclasses.replace(OWN, architecture="resnet18")).frozen()
    save(own, tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_saved(tmp_path, own)(images), own(images))


@pytest.mark.parametrize(
    ("value", "what", "remedy"),
    [
        (factories.plain(), "A Net does not say what images it takes", "dfcompress.Classifier(module, dfcompress.Mod"),
        (factories.plain().state_dict(), "A OrderedDict is not a checkpoint", "torch.save(state_dict, 'net.pt')"),
        (7, "A int is not a checkpoint", "a path or a dfcompress.Classifier"),
    ],
)
def test_what_else_a_program_holds_is_answered_with_what_to_do(value, what, remedy):
    for verb in (load, as_classifier, inspect, quantize):
        with pytest.raises(BadInput, match=what) as refused:
            verb(value)
        assert remedy in refused.value.remedy


def test_a_card_that_does_not_fit_its_network_is_refused_before_any_work():
    with pytest.raises(BadInput, match="model: my_net has 10 outputs, not 9"):
        as_classifier(Classifier(factories.plain(), dataclasses.replace(OWN, classes=9)))


def test_a_card_without_classes_gets_the_number_that_the_network_has():
    given = Classifier(factories.plain(), dataclasses.replace(OWN, classes=0))
    assert (as_classifier(given).card.classes, given.card.classes) == (10, 0)


@pytest.mark.filterwarnings("ignore")  # torch says that TorchScript will go, in words that change
def test_a_torchscript_program_in_a_classifier_is_refused():
    program = torch.jit.trace(factories.plain().eval(), torch.rand(1, 3, 16, 16))
    with pytest.raises(BadInput, match="model is or holds a TorchScript program"):
        as_classifier(Classifier(program, OWN))


def test_a_loaded_classifier_whose_network_was_changed_is_looked_at_again(tmp_path):
    torch.save(factories.plain().state_dict(), tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=f"{SPEC}plain", input_size=(3, 16, 16))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(as_classifier(classifier)(images), classifier(images))
    classifier.network.last = torch.nn.Softmax(1)
    used = as_classifier(classifier)
    torch.testing.assert_close(used(images).softmax(1), classifier(images))
    classifier.network.last = torch.nn.Linear(10, 9)
    with pytest.raises(BadInput, match="has 9 outputs, not 10"):
        as_classifier(classifier)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_classifier_made_in_python_is_quantized_to_the_end(tmp_path):
    images = tmp_path / "images.npz"
    np.savez(images, images=np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16), np.uint8), labels=[0] * 32)
    given = Classifier(factories.seen(factories.weight_norm_hook()), OWN)
    calibration = Calibration(steps=1)
    done = quantize(given, data=images, output=tmp_path / "out", finetune="none", calibration=calibration)
    assert done.bytes_ratio < 0.9
    assert done.teachers[0].agreement > 0.5
    assert load(tmp_path / "out", arch=f"{SPEC}weight_norm_hook").card.classes == 10
