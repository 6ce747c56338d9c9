"""A file becomes the classifier that was released, with a card that says how each value is known."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dfcompress.errors import BadInput
from dfcompress.models.architectures import architectures, find, named
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier, load, load_saved, save, state_bytes, write_sidecar
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, is_quantized, quantizable_layers, quantize_layers
from dfcompress.models.safe_reading import CARD_KEY, QUANTIZATION_KEY, read
from dfcompress.quantization.calibration import Calibration
from dfcompress.training.student import make_student
from dfcompress.verbs.inspect import inspect
from dfcompress.verbs.quantize import quantize

sys.path.insert(0, str(Path(__file__).parent))
import factories

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def _correct(classifier: Classifier, file: Path) -> int:
    with np.load(file) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    with torch.no_grad():
        return sum(
            int((classifier(batch.float() / 255).argmax(1) == truth).sum())
            for batch, truth in zip(images.split(256), labels.split(256), strict=True)
        )


def _classifier(name: str = "lenet5_bn", input_size: tuple[int, int, int] = (1, 32, 32)) -> Classifier:
    """A network with random weights whose BatchNorms have seen something."""
    channels = input_size[0]
    torch.manual_seed(0)
    network = find(name).make(10, channels)
    with torch.no_grad():
        network.train()(torch.rand(8, *input_size))
    card = ModelCard(name, 10, input_size, (0.5,) * channels, (0.25,) * channels, tuple("abcdefghij"))
    return Classifier(network, card).eval()


@pytest.fixture
def lenet_file(tmp_path) -> Path:
    torch.save(_classifier().network.state_dict(), tmp_path / "lenet.pt")
    return tmp_path / "lenet.pt"


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


def test_loading_gives_a_frozen_fp32_network_in_evaluation_mode(lenet_file):
    classifier = load(lenet_file)
    assert not classifier.training
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in classifier.parameters())
    assert (classifier.name, len(classifier.sha256), classifier.path) == ("lenet", 64, lenet_file)


def test_a_saved_classifier_comes_back_to_the_bit_with_its_card(tmp_path):
    classifier = _classifier()
    save(classifier, tmp_path / "result")
    again = load(tmp_path / "result")
    images = torch.rand(4, 1, 32, 32)
    assert torch.equal(again(images), classifier(images))
    assert again.card.class_names == tuple("abcdefghij")
    assert (again.card.mean, again.card.std) == ((0.5,), (0.25,))
    assert again.card.origin["mean"] == "read"


def test_either_file_of_a_result_tells_the_card(tmp_path):
    save(_classifier(), tmp_path / "result")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "result" / "model.safetensors").read_bytes())
    assert load(alone).card.mean == (0.5,)
    config = json.loads((tmp_path / "result" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("lenet5_bn", 10)
    assert config["pretrained_cfg"]["mean"] == [0.5]
    assert config["pretrained_cfg"]["label_names"] == list("abcdefghij")


def test_a_quantized_classifier_comes_back_to_the_bit(tmp_path):
    classifier = _classifier("cifar_resnet20", (3, 32, 32))
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


@pytest.mark.parametrize(
    ("classes", "why"), [(10**12, "from 1 to 1,048,576"), (10**6, "is too small for"), (11, "not torch.float32")]
)
def test_a_packed_file_with_a_wrong_number_of_classes_is_refused(classes, why, tmp_path):
    classifier = _classifier()
    quantize_layers(classifier.network, {"fc1": (4, 32)})
    freeze(classifier.network)
    save(Classifier(classifier.network, ModelCard("lenet5_bn", classes, (1, 32, 32), (0.5,), (0.25,))), tmp_path)
    with pytest.raises(BadInput, match=why):
        load(tmp_path)


def test_a_sidecar_written_and_corrected_is_read(lenet_file):
    sidecar = write_sidecar(load(lenet_file))
    assert sidecar.name == "lenet.card.json"
    values = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(values | {"mean": [0.25], "class_names": list("0123456789")}))
    card = load(lenet_file).card
    assert (card.mean, card.class_names, card.origin["mean"]) == ((0.25,), tuple("0123456789"), "read")
    assert load(lenet_file, mean=[0.75]).card.mean == (0.75,)


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


@pytest.mark.parametrize("content", ["{", "[1]", '{"mean": "0.5"}', '{"input_size": [1, 32, -32]}', '{"std": [null]}'])
def test_a_damaged_sidecar_is_named(content, lenet_file):
    lenet_file.with_name("lenet.card.json").write_text(content)
    with pytest.raises(BadInput, match=r"lenet\.card\.json"):
        load(lenet_file)


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
    classifier = _classifier()
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


SPEC = f"{factories.__file__}:"


def _written(network: torch.nn.Module, folder: Path) -> Path:
    torch.save(network.state_dict(), folder / "net.pt")
    return folder / "net.pt"


def test_classes_and_channels_come_from_a_pass_and_not_from_the_order_of_definition(tmp_path):
    """The last weight defined is a convolution of 8 channels, the first of four dimensions a kernel of one channel."""
    path = _written(factories.seen(factories.head_first()), tmp_path)
    classifier = load(path, arch=f"{SPEC}head_first", input_size=(3, 16, 16))
    assert (classifier.card.classes, len(classifier.card.mean)) == (7, 3)
    (tmp_path / "names").write_text("\n".join("abcdefg"))
    named = load(path, arch=f"{SPEC}head_first", input_size=(3, 16, 16), class_names=tmp_path / "names")
    assert named.card.class_names == tuple("abcdefg")


@pytest.mark.parametrize("factory", ["sized", "handing_on"])
def test_a_factory_that_takes_num_classes_gets_it(factory, tmp_path):
    path = _written(factories.sized(4), tmp_path)
    with pytest.raises(BadInput, match=r"fc\.weight is 4x8, expected 10x8") as refused:
        load(path, arch=SPEC + factory, input_size=(3, 16, 16))
    assert "--num-classes N says how many" in refused.value.remedy
    classifier = load(path, arch=SPEC + factory, input_size=(3, 16, 16), num_classes=4)
    assert (classifier.card.classes, classifier.card.origin["classes"]) == (4, "given")
    save(classifier, tmp_path / "out")
    assert load(tmp_path / "out", arch=SPEC + factory).card.classes == 4
    assert make_student(SPEC + factory, classifier.card, seed=0)[0].network.fc.out_features == 4


def test_a_number_of_classes_that_the_network_has_not_is_answered_with_the_one_it_has(tmp_path):
    path = _written(factories.plain(), tmp_path)
    with pytest.raises(BadInput, match="has 10 outputs, not 4") as refused:
        load(path, arch=f"{SPEC}plain", input_size=(3, 16, 16), num_classes=4)
    assert "--num-classes 10" in refused.value.remedy
    assert load(path, arch=f"{SPEC}plain", input_size=(3, 16, 16), num_classes=10).card.classes == 10


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_factory_whose_layers_have_no_shape_yet_is_told_to_give_them_one(tmp_path):
    path = _written(factories.plain(), tmp_path)
    with pytest.raises(BadInput, match=r"lazy gave a network whose 0\.weight has no shape yet") as refused:
        load(path, arch=f"{SPEC}lazy", input_size=(3, 16, 16))
    assert "show a batch of images to its lazy layers" in refused.value.remedy


@pytest.mark.parametrize("how", ["recognised", "stated", "named"])
def test_tensors_tell_the_classes_of_a_known_architecture_whatever_number_a_card_or_the_user_gives(how, tmp_path):
    path = _written(_classifier().network, tmp_path)
    card = {"classes": 7} | ({"architecture": "lenet5_bn"} if how == "stated" else {})
    (tmp_path / "net.card.json").write_text(json.dumps(card))
    arch = "lenet5_bn" if how == "named" else None
    assert load(path, arch=arch).card.classes == 10
    with pytest.raises(BadInput, match="lenet5_bn has 10 outputs, not 7") as refused:
        load(path, arch=arch, num_classes=7)
    assert "--num-classes 10" in refused.value.remedy


def test_names_of_a_users_own_network_may_begin_like_a_wrappers(tmp_path):
    path = _written(factories.within(), tmp_path)
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


def test_the_remedy_for_an_input_size_of_other_channels_can_be_pasted(lenet_file):
    with pytest.raises(BadInput) as refused:
        load(lenet_file, input_size=(3, 32, 32))
    assert refused.value.remedy == "Use --input-size 1x32x32."
    assert load(lenet_file, input_size=(1, 32, 32)).card.input_size == (1, 32, 32)


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
    classifier = _classifier("mnasnet0_5", (3, 32, 32))
    quantize_layers(classifier.network, {"classifier.1": (4, 32)})
    freeze(classifier.network)
    save(classifier, tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load(tmp_path)(images), classifier(images))


OWN = ModelCard("my_net", 10, (3, 16, 16), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("packed", [True, False])
def test_a_card_may_name_torchvision_as_arch_does(packed, tmp_path):
    made = _classifier()
    named = Classifier(made.network, dataclasses.replace(made.card, architecture="torchvision:lenet5_bn")).frozen()
    if packed:
        quantize_layers(named.network, {"conv1": (8, 32)})
        freeze(named.network)
    save(named, tmp_path)
    images = torch.rand(2, *named.card.input_size)
    assert torch.equal(load(tmp_path)(images), named(images))


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


CARD = ModelCard("cifar_resnet44", 7, (3, 32, 32), *CIFAR)


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
