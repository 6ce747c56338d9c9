"""torchvision's classification models, and the small-image forms of its ResNets: 3×3 stem of stride 1, no max-pool."""

from __future__ import annotations

from functools import partial

from torch import nn

from dfcompress.models.architecture import Architecture, Naming

# The number of tensors in the state dict of each model, so that recognition neither builds eighty networks nor imports
# torchvision; a test compares the numbers with torchvision's models.
TENSORS: dict[str, int] = {
    "alexnet": 16,
    "convnext_base": 344,
    "convnext_large": 344,
    "convnext_small": 344,
    "convnext_tiny": 182,
    "densenet121": 606,
    "densenet161": 806,
    "densenet169": 846,
    "densenet201": 1006,
    "efficientnet_b0": 311,
    "efficientnet_b1": 439,
    "efficientnet_b2": 439,
    "efficientnet_b3": 496,
    "efficientnet_b4": 610,
    "efficientnet_b5": 738,
    "efficientnet_b6": 852,
    "efficientnet_b7": 1037,
    "efficientnet_v2_l": 1331,
    "efficientnet_v2_m": 963,
    "efficientnet_v2_s": 672,
    "googlenet": 287,
    "inception_v3": 472,
    "maxvit_t": 548,
    "mnasnet0_5": 262,
    "mnasnet0_75": 262,
    "mnasnet1_0": 262,
    "mnasnet1_3": 262,
    "mobilenet_v2": 262,
    "mobilenet_v3_large": 266,
    "mobilenet_v3_small": 210,
    "regnet_x_16gf": 357,
    "regnet_x_1_6gf": 297,
    "regnet_x_32gf": 372,
    "regnet_x_3_2gf": 402,
    "regnet_x_400mf": 357,
    "regnet_x_800mf": 267,
    "regnet_x_8gf": 372,
    "regnet_y_128gf": 540,
    "regnet_y_16gf": 369,
    "regnet_y_1_6gf": 540,
    "regnet_y_32gf": 407,
    "regnet_y_3_2gf": 426,
    "regnet_y_400mf": 331,
    "regnet_y_800mf": 293,
    "regnet_y_8gf": 350,
    "resnet101": 522,
    "resnet152": 777,
    "resnet18": 102,
    "resnet34": 182,
    "resnet50": 267,
    "resnext101_32x8d": 522,
    "resnext101_64x4d": 522,
    "resnext50_32x4d": 267,
    "shufflenet_v2_x0_5": 282,
    "shufflenet_v2_x1_0": 282,
    "shufflenet_v2_x1_5": 282,
    "shufflenet_v2_x2_0": 282,
    "squeezenet1_0": 52,
    "squeezenet1_1": 52,
    "swin_b": 353,
    "swin_s": 353,
    "swin_t": 185,
    "swin_v2_b": 449,
    "swin_v2_s": 449,
    "swin_v2_t": 233,
    "vgg11": 22,
    "vgg11_bn": 54,
    "vgg13": 26,
    "vgg13_bn": 66,
    "vgg16": 32,
    "vgg16_bn": 84,
    "vgg19": 38,
    "vgg19_bn": 102,
    "vit_b_16": 152,
    "vit_b_32": 152,
    "vit_h_14": 392,
    "vit_l_16": 296,
    "vit_l_32": 296,
    "wide_resnet101_2": 522,
    "wide_resnet50_2": 267,
}

# The image size in pixels of the models' training, where it is not 224.
SIZES = {
    "efficientnet_b1": 240, "efficientnet_b2": 288, "efficientnet_b3": 300, "efficientnet_b4": 380,
    "efficientnet_b5": 456, "efficientnet_b6": 528, "efficientnet_b7": 600, "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480, "efficientnet_v2_l": 480, "inception_v3": 299, "swin_v2_b": 256, "swin_v2_s": 256,
    "swin_v2_t": 256,
}  # fmt: skip

# torchvision builds these two with auxiliary heads; with their released weights they convert images normalised by
# ImageNet's values into (x − 0.5) / 0.5 themselves. Ours have no auxiliary heads and take (x − 0.5) / 0.5 directly.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_HALF = (0.5, 0.5, 0.5)

# The files that torchvision released for DenseNet have older names than its code.
EARLY_DENSENET = Naming(renames=((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),))


def _make(name: str, classes: int, channels: int) -> nn.Module:
    import torchvision.models

    options = {"aux_logits": False, "init_weights": False} if name in _WITH_AUXILIARY_HEADS else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    if channels != 3:
        _replace_stem(network, channels)
    return network


def _make_small(name: str, classes: int, channels: int) -> nn.Module:
    network = _make(name, classes, 3)
    network.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _replace_stem(network: nn.Module, channels: int) -> None:
    name, stem = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        stem.out_channels,
        stem.kernel_size,  # type: ignore[arg-type]  # of two numbers, which torch types as of any
        stem.stride,  # type: ignore[arg-type]
        stem.padding,  # type: ignore[arg-type]
        bias=stem.bias is not None,
    )
    network.set_submodule(name, new)


def _is_resnet(name: str) -> bool:
    return name.startswith(("resnet", "resnext", "wide_resnet"))


# Many small-image ResNets are released with the names of kuangliu/pytorch-cifar.
KUANGLIU = Naming(renames=((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")))


def _architecture(name: str) -> Architecture:
    auxiliary = name in _WITH_AUXILIARY_HEADS
    return Architecture(
        name,
        partial(_make, name),
        SIZES.get(name, 224),
        tensors=TENSORS[name],
        ignored=r"(aux\d|AuxLogits)\." if auxiliary else None,
        namings=(Naming(), EARLY_DENSENET) if name.startswith("densenet") else (Naming(),),
        mean=_HALF if auxiliary else None,
        std=_HALF if auxiliary else None,
        library="torchvision",
    )


def _small_architecture(name: str) -> Architecture:
    make = partial(_make_small, name)
    namings = (Naming(), KUANGLIU)
    return Architecture(f"cifar_{name}", make, 32, tensors=TENSORS[name], namings=namings, library="torchvision")


ARCHITECTURES = [
    *(_architecture(name) for name in TENSORS),
    *(_small_architecture(name) for name in TENSORS if _is_resnet(name)),
]
