"""Architectures are recognised from names and shapes, and told apart."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import timm
import torch
import torchvision.models

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.models import architectures as room
from dfcompress.models.architecture import Architecture, tensors_of
from dfcompress.models.architectures import architectures, find, named, torchvision_models
from dfcompress.models.classifier import load_tensors
from dfcompress.models.recognition import fit_to, recognise
from dfcompress.models.safe_reading import read

NAMES = sorted(architectures())


def _file(name: str, *, classes: int, channels: int) -> dict[str, torch.Tensor]:
    """A file's tensors as recognition sees them, without memory."""
    shapes = tensors_of(named(name), classes, channels)
    return {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}


def test_every_network_of_the_issue_has_a_name():
    assert len(torchvision.models.list_models(module=torchvision.models)) >= 80
    assert set(torchvision.models.list_models(module=torchvision.models)) <= set(NAMES)
    assert {f"cifar_resnet{depth}" for depth in (18, 34, 50, 101, 152, 20, 32, 44, 56, 110)} <= set(NAMES)
    assert {"cifar_resnext50_32x4d", "cifar_wide_resnet50_2"} <= set(NAMES)
    assert {"wrn40_2", "wrn40_1", "wrn16_2", "wrn16_1", "wrn28_10"} <= set(NAMES)
    assert {"cifar_vgg11_bn", "cifar_vgg13_bn", "cifar_vgg16_bn"} <= set(NAMES)
    assert {"lenet5", "lenet5_half", "lenet5_bn", "lenet5_bn_half", "alexnet_half"} <= set(NAMES)
    assert {"hinton_mlp", "hinton_mlp_small"} <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_recognised_with_its_classes(name):
    channels = find(name).channels
    found = recognise(_file(name, classes=37, channels=channels), "file")
    assert (found.architecture.name, found.classes, found.channels) == (name, 37, channels)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("hinton")])
def test_every_network_with_a_convolution_takes_other_channels(name):
    found = recognise(_file(name, classes=10, channels=2), "file")
    assert (found.architecture.name, found.channels) == (name, 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_tensors_that_a_network_states_is_right(name):
    assert find(name).tensors in (None, len(tensors_of(find(name), 10, find(name).channels)))


def test_every_network_of_torchvision_has_its_name():
    """The table of names stands in for torchvision, which is imported only to build a network."""
    assert list(torchvision_models.TENSORS) == torchvision.models.list_models(module=torchvision.models)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet56", 853_018),
        ("cifar_resnet110", 1_727_962),
        ("cifar_resnet18", 11_173_962),
        ("wrn40_2", 2_243_546),
        ("wrn16_1", 175_066),
        ("wrn28_10", 36_479_194),
        ("lenet5", 61_706),
        ("hinton_mlp", 2_395_210),
        ("hinton_mlp_small", 1_276_810),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, parameters):
    network = find(name).make_empty(10, find(name).channels)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_the_shared_checkpoints_are_recognised_in_their_own_naming(resnet20_file, resnet44_file):
    for file, name in ((resnet20_file, "cifar_resnet20"), (resnet44_file, "cifar_resnet44")):
        found = recognise(read(file).tensors, str(file))
        assert (found.architecture.name, found.classes, found.channels) == (name, 10, 3)
        assert found.naming.mean == (0.485, 0.456, 0.406)


LIBRARIES_IMPORTED = """
import sys, dfcompress
assert dfcompress.load(sys.argv[1]).card.architecture == "cifar_resnet20"
print(sorted({"torchvision", "timm", "torch._dynamo"} & sys.modules.keys()))
"""


def test_a_network_of_ours_is_recognised_without_importing_others_and_a_compiler(resnet20_file):
    line = [sys.executable, "-c", LIBRARIES_IMPORTED, str(resnet20_file)]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_values_and_types_play_no_part(resnet20_file):
    tensors = {name: torch.zeros_like(tensor, dtype=torch.int8) for name, tensor in read(resnet20_file).tensors.items()}
    assert recognise(tensors, "file").architecture.name == "cifar_resnet20"


def test_the_order_of_the_tensors_plays_no_part():
    tensors = dict(sorted(_file("mobilenet_v2", classes=5, channels=3).items()))
    found = recognise(tensors, "file")
    assert (found.architecture.name, found.classes) == ("mobilenet_v2", 5)


def test_a_resnet_with_a_small_stem_is_told_from_the_large_one():
    tensors = _file("resnet18", classes=100, channels=3)
    assert recognise(tensors, "file").architecture.name == "resnet18"
    tensors["conv1.weight"] = torch.empty(64, 3, 3, 3)
    assert recognise(tensors, "file").architecture.name == "cifar_resnet18"


@pytest.mark.parametrize(
    ("name", "pattern", "released"),
    [
        ("cifar_resnet18", r"downsample", "shortcut"),
        ("cifar_resnet18", r"^fc", "linear"),
        ("densenet121", r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),
    ],
)
def test_other_names_of_released_files_are_known(name, pattern, released):
    tensors = _file(name, classes=10, channels=3)
    renamed = {re.sub(pattern, released, tensor): value for tensor, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    assert recognise(renamed, "file").architecture.name == name


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name):
    options = {"init_weights": False, "aux_logits": True}
    with torch.device("meta"):
        released = torchvision.models.get_model(name, weights=None, **options)
    state = {key: value for key, value in released.state_dict().items() if not key.endswith("num_batches_tracked")}
    found = recognise(state, "file")
    assert found.architecture.name == name
    assert not any("aux" in key.lower() for key in found.tensors)


def test_a_changed_shape_names_the_nearest_network_and_the_tensor():
    tensors = _file("resnet34", classes=10, channels=3)
    tensors["layer2.0.conv1.weight"] = torch.empty(96, 64, 3, 3)
    with pytest.raises(BadInput) as refused:
        recognise(tensors, "net.pt")
    assert "nearest is resnet34" in refused.value.problem
    assert "layer2.0.conv1.weight is 96x64x3x3, expected 128x64x3x3" in refused.value.problem


def test_a_missing_and_a_foreign_tensor_are_named():
    tensors = _file("lenet5", classes=10, channels=1)
    tensors["conv9.weight"] = tensors.pop("conv2.weight")
    with pytest.raises(BadInput) as refused:
        recognise(tensors, "net.pt")
    assert "conv2.weight 16x6x5x5 is missing" in refused.value.problem
    assert "conv9.weight 16x6x5x5 is not in it" in refused.value.problem


def _behind(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _body(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("fc.")}


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    """What the user is told."""
    told: list[str] = []
    monkeypatch.setattr(console, "notice", told.append)
    return told


@pytest.fixture
def resnet18() -> dict[str, torch.Tensor]:
    """The tensors of torchvision's ResNet-18 of seven classes."""
    return _file("resnet18", classes=7, channels=3)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "model.module.backbone.", "1."]
)
def test_a_networks_prefix_is_found_whatever_it_is(prefix, resnet18, notices):
    found = recognise(_behind(prefix, resnet18), "file")
    assert (found.architecture.name, found.classes) == ("resnet18", 7)
    assert found.tensors.keys() == resnet18.keys()
    assert not notices


def test_a_wrapped_part_is_found():
    """DataParallel around the convolutions alone, as the ImageNet example of PyTorch trains AlexNet and VGG."""
    tensors = {
        name.replace("features.", "features.module."): value
        for name, value in _file("vgg11", classes=5, channels=3).items()
    }
    found = recognise(_behind("net.", tensors), "file")
    assert (found.architecture.name, found.classes) == ("vgg11", 5)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    "strays",
    [
        {"criterion.pos_weight": torch.ones(7)},
        {"criterion.weight": torch.ones(7)},
        {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        {"val_acc.correct": torch.tensor(3), "val_acc.confmat": torch.zeros(7, 7, dtype=torch.long)},
        {"best": torch.tensor(0.7)},
    ],
    ids=lambda strays: next(iter(strays)),
)
def test_tensors_beside_a_network_are_named_once_and_left_out(prefix, strays, resnet18, notices):
    found = recognise(_behind(prefix, resnet18) | strays, "net.pt")
    assert found.architecture.name == "resnet18"
    assert found.tensors.keys() == resnet18.keys()
    (told,) = notices
    assert told == f"net.pt: {', '.join(strays)} left out, because resnet18 has no such tensors."


def test_what_thop_leaves_in_every_module_is_left_out(resnet18, notices):
    counted = {f"{name.rpartition('.')[0]}.total_ops": torch.zeros(1) for name in resnet18}
    assert recognise(resnet18 | counted, "net.pt").architecture.name == "resnet18"
    assert notices == [
        "net.pt: conv1.total_ops, bn1.total_ops, layer1.0.conv1.total_ops, layer1.0.bn1.total_ops and 37 more "
        "left out, because resnet18 has no such tensors."
    ]


def test_body_and_head_have_prefixes_of_their_own(resnet18, notices):
    head = {name: value for name, value in resnet18.items() if name.startswith("fc.")}
    found = recognise(_behind("backbone.", _body(resnet18)) | _behind("head.", head), "file")
    assert (found.architecture.name, found.classes) == ("resnet18", 7)
    assert not notices


def test_a_head_of_another_name_is_taken_with_a_notice(resnet18, notices):
    head = {"classifier.1.weight": torch.empty(3, 512), "classifier.1.bias": torch.empty(3)}
    found = recognise(_behind("backbone.", _body(resnet18)) | head, "net.pt")
    assert (found.architecture.name, found.classes) == ("resnet18", 3)
    assert found.tensors["fc.weight"].shape == (3, 512)
    assert notices == [
        "net.pt: classifier.1.weight taken for fc.weight, classifier.1.bias taken for fc.bias of resnet18."
    ]


def test_a_head_of_several_layers_is_another_network(resnet18):
    head = {"head.0.weight": torch.empty(256, 512), "head.2.weight": torch.empty(7, 256)}
    with pytest.raises(
        BadInput, match=r"nearest is resnet18, which has 100 of its 102 tensors: fc\.weight .* is missing"
    ):
        recognise(_behind("backbone.", _body(resnet18)) | head, "net.pt")


def test_a_layer_beside_the_network_is_left_out_only_where_the_network_is_named(resnet18, notices):
    tensors = _behind("backbone.", resnet18) | {"head.weight": torch.empty(3, 7), "head.bias": torch.empty(3)}
    with pytest.raises(BadInput, match=r"holds resnet18 and layers beside it: head\.weight, head\.bias") as refused:
        recognise(tensors, "net.pt")
    assert "--arch resnet18 to use that part alone" in refused.value.remedy
    found = fit_to(find("resnet18"), tensors, "net.pt")
    assert found.tensors.keys() == resnet18.keys()
    assert notices == ["net.pt: head.weight, head.bias left out, because resnet18 has no such tensors."]


def test_two_sets_of_weights_are_refused_and_one_under_two_names_is_taken():
    one = {name: torch.rand(shape) for name, shape in tensors_of(find("lenet5"), 10, 1).items()}
    other = {name: torch.rand(shape) for name, shape in tensors_of(find("lenet5"), 10, 1).items()}
    with pytest.raises(BadInput, match=r"lenet5 twice, with different weights: under 'model\.' and under 'ema\.'"):
        recognise(_behind("model.", one) | _behind("ema.", other), "net.pt")
    found = recognise(_behind("model.", one) | _behind("net.", one), "net.pt")
    assert torch.equal(found.tensors["fc3.weight"], one["fc3.weight"])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_part_of_a_deeper_network_is_no_match(prefix):
    """Every tensor of ResNet-18 is in ResNet-34, of the same shape."""
    deeper = _behind(prefix, _file("resnet34", classes=7, channels=3))
    assert recognise(deeper, "file").architecture.name == "resnet34"
    assert fit_to(find("resnet18"), deeper, "file") is None


@pytest.mark.parametrize("more", ["layer1.0.alpha", "layer2.1.se.fc.weight", "layer5.0.conv1.weight"])
def test_a_network_with_more_tensors_is_another_one(more, resnet18):
    tensors = resnet18 | {more: torch.empty(64, 64)}
    assert fit_to(find("resnet18"), tensors, "file") is None
    with pytest.raises(BadInput, match=rf"nearest is resnet18, which has 102 of its 103 tensors: {more} 64x64 is not"):
        recognise(tensors, "net.pt")


def test_a_missing_tensor_is_not_taken_from_another_place(resnet18):
    """The stem's BatchNorm has the names and shapes of the one in every block of the first stage."""
    tensors = {name: value for name, value in resnet18.items() if not name.startswith("bn1.")}
    with pytest.raises(
        BadInput, match=r"nearest is resnet18, which has 98 of its 98 tensors: bn1\.weight 64 is missing"
    ):
        recognise(tensors, "net.pt")


def test_a_network_that_has_nothing_in_common_with_any_is_not_compared():
    with pytest.raises(BadInput, match=r"too little in common with any: it begins with a\.weight 3x4, b\.scale 9"):
        recognise({"a.weight": torch.empty(3, 4), "b.scale": torch.empty(9)}, "net.pt")


def test_where_several_fit_they_are_named(monkeypatch):
    lenet = find("lenet5")
    twin = Architecture("lenet5_twin", lenet.make, 28, channels=1)
    monkeypatch.setattr("dfcompress.models.recognition.architectures", lambda: {"a": lenet, "b": twin})
    with pytest.raises(BadInput, match="several architectures: lenet5, lenet5_twin") as refused:
        recognise(_file("lenet5", classes=10, channels=1), "net.pt")
    assert "--arch lenet5" in refused.value.remedy


@pytest.mark.parametrize("name", NAMES)
def test_every_network_takes_the_tensors_of_its_file(name):
    """torchvision's MNASNets ask which version a state dict is of."""
    architecture = find(name)
    fit = fit_to(architecture, _file(name, classes=5, channels=architecture.channels), "file")
    network = architecture.make_empty(5, architecture.channels)
    load_tensors(network, fit.tensors, assign=True)
    assert {key: value.shape for key, value in fit.tensors.items()}.items() <= {
        key: value.shape for key, value in network.state_dict().items()
    }.items()


# A network of each of 27 families. iformer has a part called `module`, tresnet a stem of 16 channels for each of the
# image, pit a table of positions of four dimensions, and swinv2_cr computes with its parameters when it is built.
TIMM = [
    "beit_base_patch16_224", "coat_tiny", "convit_tiny", "convnext_atto", "cspresnet50", "dla34", "dpn68",
    "edgenext_xx_small", "efficientformer_l1", "efficientvit_b0", "fastvit_t8", "ghostnet_050", "hardcorenas_a",
    "hrnet_w18_small", "iformer_s", "inception_v4", "levit_128s", "mixer_s32_224", "mobilevit_xxs", "nfnet_f0",
    "pit_ti_224", "regnetx_002", "repvgg_a0", "swinv2_cr_tiny_ns_224", "tf_efficientnet_lite0", "tresnet_m",
    "vit_tiny_r_s16_p8_224",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_are_recognised_with_their_classes_and_channels(name):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    file = _file(f"timm:{name}", classes=37, channels=3)
    where = f"{name}.pth" if name.startswith("tf_") else "net.pth"
    found = recognise(file, where)
    assert (found.architecture.name, found.classes) == (f"timm:{name}", 37)


@pytest.mark.release
@pytest.mark.parametrize("name", timm.list_models())
def test_every_network_of_timm_is_recognised_by_a_file_of_its_name(name):
    found = recognise(_file(f"timm:{name}", classes=37, channels=3), f"{name}-0123abcd.pth")
    assert found.architecture.name in (name, f"timm:{name}")
    assert found.classes == 37


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.module.backbone."])
def test_a_network_of_timm_is_found_behind_a_prefix_with_another_stem_and_beside_a_loss(prefix):
    file = {f"{prefix}{name}": tensor for name, tensor in _file("timm:ghostnet_050", classes=9, channels=2).items()}
    found = recognise({**file, "criterion.weight": torch.empty(9)}, "net.pth")
    assert (found.architecture.name, found.classes, found.channels) == ("timm:ghostnet_050", 9, 2)


def test_body_and_new_head_of_a_network_of_timm_have_places_of_their_own(notices):
    file = _file("timm:ghostnet_050", classes=9, channels=3)
    moved = {
        name.replace("classifier.", "head.") if "classifier" in name else f"body.{name}": file[name] for name in file
    }
    found = recognise(moved, "net.pth")
    assert (found.architecture.name, found.classes) == ("timm:ghostnet_050", 9)
    assert "head.weight taken for classifier.weight" in notices[0]


def test_a_body_of_timm_without_its_last_layer_is_no_classifier():
    file = _file("timm:ghostnet_050", classes=9, channels=3)
    with pytest.raises(BadInput, match="body of timm:ghostnet_050 without its last layer"):
        recognise({name: tensor for name, tensor in file.items() if "classifier" not in name}, "net.pth")


@pytest.mark.parametrize(
    ("where", "architecture"),
    [
        ("tf_efficientnet_b0_aa-827b6e33.pth", "timm:tf_efficientnet_b0"),
        ("efficientnet_b0.pth", "timm:efficientnet_b0"),
        ("mine/efficientnet_b0-tuned/best.ckpt", "timm:efficientnet_b0"),
        ("models--timm--tf_efficientnet_b0.aa_in1k/snapshots/75c1/model.safetensors", "timm:tf_efficientnet_b0"),
        ("efficientnet_b0/tf_efficientnet_b0.pt", "timm:tf_efficientnet_b0"),
    ],
)
def test_the_name_of_a_file_or_folder_decides_between_networks_of_the_same_tensors(where, architecture):
    assert recognise(_file("timm:tf_efficientnet_b0", classes=10, channels=3), where).architecture.name == architecture


@pytest.mark.parametrize("where", ["best.pth", "my_efficientnet_b01.pth"])
def test_networks_of_the_same_tensors_that_compute_differently_are_refused_by_name(where):
    with pytest.raises(BadInput, match=r"differently: timm:.*b0, timm:.*b0") as refused:
        recognise(_file("timm:efficientnet_b0", classes=10, channels=3), where)
    assert "--arch timm:" in refused.value.remedy


def test_networks_that_compute_the_same_are_one_and_the_file_may_say_which():
    file = _file("timm:deit_tiny_patch16_224", classes=10, channels=3)
    assert recognise(file, "net.pth").architecture.name == "timm:vit_tiny_patch16_224"
    assert recognise(file, "deit_tiny_patch16_224-a1311bcf.pth").architecture.name == "timm:deit_tiny_patch16_224"


def test_torchvisions_network_stands_before_its_variants_and_says_so(notices):
    file = _file("resnet50", classes=10, channels=3)
    assert recognise(file, "net.pth").architecture.name == "resnet50"
    assert "taken for resnet50. The tensors fit timm:resnetaa50 and timm:resnetblur50 as well" in notices.pop()
    assert recognise({f"model.{name}": file[name] for name in file}, "net.pth").architecture.name == "resnet50"
    assert "taken for resnet50" in notices.pop()
    assert not notices
    assert recognise(file, "resnet50-11ad3fa6.pth").architecture.name == "resnet50"
    assert recognise(file, "resnetblur50-84f4748f.pth").architecture.name == "timm:resnetblur50"
    assert not notices
    assert recognise(_file("resnet18", classes=10, channels=3), "net.pth").architecture.name == "resnet18"
    assert not notices


def test_other_names_of_shapes_in_a_known_order_are_proposed_with_the_line_to_type():
    file = _file("timm:ghostnet_050", classes=9, channels=3)
    with pytest.raises(BadInput, match="in order are those of timm:ghostnet_050") as refused:
        recognise({f"layers.{place}": tensor for place, tensor in enumerate(file.values())}, "net.pth")
    assert "--arch timm:ghostnet_050 --match-by-order" in refused.value.remedy


def test_of_several_in_order_those_of_tensorflow_come_first_where_the_names_are_its_ports():
    shapes = [*_file("timm:efficientnet_lite0", classes=1000, channels=3).values()]
    for stem, first in (("_conv_stem.weight", "timm:tf_efficientnet_lite0"), ("0.weight", "timm:efficientnet_lite0")):
        file = dict(zip([stem, *(f"layers.{place}" for place in range(1, len(shapes)))], shapes, strict=True))
        with pytest.raises(BadInput, match=f"are those of {first} and of") as refused:
            recognise(file, "net.pth")
        assert f"--arch {first} --match-by-order" in refused.value.remedy


@pytest.mark.parametrize(("installed", "told"), [(False, "is not installed"), (True, "does not know")])
def test_a_missing_or_older_timm_is_named_with_the_network(installed, told, monkeypatch):
    file = _file("timm:ghostnet_050", classes=9, channels=3)
    if installed:
        monkeypatch.setattr(timm, "is_model", lambda name: False)
    else:
        monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match=f"holds weights of timm's ghostnet_050.*{told}") as refused:
        recognise(file, "net.pth")
    assert refused.value.remedy.startswith("Install")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(BadInput, match="cifar_resnet20"):
        find("cifar_resent20")


def test_another_package_adds_networks_through_its_entry_point(monkeypatch):
    class Point:
        @staticmethod
        def load() -> list[Architecture]:
            return [Architecture("their_net", find("lenet5").make, 32, channels=1)]

    monkeypatch.setattr(room.metadata, "entry_points", lambda group: [Point] if "dfcompress" in group else [])
    assert "their_net" in room.architectures.__wrapped__()
