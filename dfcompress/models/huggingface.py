"""Folders of Hugging Face's transformers: `config.json`, weights, and `preprocessor_config.json`, as `save_pretrained`
writes them.

transformers builds the network from its own classes, and its image processor is run on three images to find the
normalisation. Code in a folder is never run, no other file is opened, and nothing is fetched: only classifiers and
their processors are built, from config values that cannot cause any of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput, first_line
from dfcompress.models.architecture import Architecture
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import counted_runs
from dfcompress.models.safe_reading import CONFIG, read_json

TRANSFORMERS = "transformers:"
PREPROCESSOR = "preprocessor_config.json"
# The model type that passes config values to timm.create_model, which can open any file and download.
WRAPPER = "timm_wrapper"
# Config values that do not describe the network but how to build it and where to find files: with them transformers
# would open files, download, or run code from the hub. A nested config has a `model_type`, too, possibly `WRAPPER`.
DROPPED = {
    *("auto_map", "custom_pipelines", "dtype", "torch_dtype", "quantization_config", "name_or_path", "_name_or_path"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
    *("backbone", "backbone_config", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone"),
    *("model_type", "model_args"),
}
UNNAMED = "LABEL_"
# Side in pixels of a square image that every known processor makes smaller.
PROBED = 640


def is_of_transformers(path: Path) -> bool:
    """Whether a folder's config is one of transformers (timm's states an `architecture`)."""
    config = read_json(path / CONFIG) if path.is_dir() else {}
    return "model_type" in config and "architecture" not in config


def card_of(path: Path) -> dict[str, Any]:
    """The fields of a model card that a folder states, as far as they are known.

    Raises `BadInput` if transformers is not installed or does not know the model, or if the model is no image
    classifier.
    """
    config = read_json(path / CONFIG)
    kinds = config.get("architectures") or []
    if kinds and not any(str(kind).endswith("ForImageClassification") for kind in kinds):
        raise BadInput(
            f"{path} holds {', '.join(map(str, kinds))}, which is not an image classifier.", "Name one that is."
        )
    built = _config(config, str(path))
    names = [str(name) for _, name in sorted(built.id2label.items())]
    size = getattr(built, "image_size", None)
    channels = getattr(built, "num_channels", 3)
    stated = {
        "architecture": TRANSFORMERS + str(config["model_type"]),
        "config": {"model_type": config["model_type"], **_kept(config)},
        "classes": built.num_labels,
        "class_names": None if all(name.startswith(UNNAMED) for name in names) else names,
        "input_size": (channels, size, size) if isinstance(size, int) else None,
    }
    return stated | _of_processor(path)


def _of_processor(path: Path) -> dict[str, Any]:
    """Input size, mean and std, measured on the image processor's outputs; empty if the folder has no processor."""
    if not (path / PREPROCESSOR).is_file():
        return {}
    black, white, red = _processed(path)
    std = 1 / (white - black).mean((1, 2))
    mean = -black.mean((1, 2)) * std
    if _are_turned(black, white, red):
        mean, std = mean.flip(0), std.flip(0)
    # Six digits, so that the fp32 value 0.48500003 becomes 0.485; adding 0 turns -0 into 0.
    mean, std = (tuple(round(value, 6) + 0 for value in values.tolist()) for values in (mean, std))
    return {"input_size": tuple(black.shape), "mean": mean, "std": std}


def architecture_of(name: str, config: Mapping[str, Any] | None) -> Architecture:
    """The architecture that transformers builds from a config; raises `BadInput` if there is no config."""
    if not config:
        raise BadInput(
            f"{name} has no config that it could be built from.", "Name the folder that save_pretrained wrote."
        )
    return Architecture(name, partial(_make, name, config), size=None, channels=config.get("num_channels", 3))


def take_rgb(classifier: Classifier, path: Path) -> None:
    """If the folder's processor passes BGR images, change the network, in place, so that it takes RGB images.

    The input channels of the first convolution's weight are reversed. Raises `BadInput` if the first layer is not a
    convolution on the image's channels.
    """
    if not (path / PREPROCESSOR).is_file() or not _are_turned(*_processed(path)):
        return
    layers = [name for name, each in classifier.network.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    with counted_runs(classifier.network, layers) as runs:
        pass_once(classifier)
    stem = classifier.network.get_submodule(next(iter(runs))) if runs else None
    if not isinstance(stem, nn.Conv2d) or stem.weight.shape[1] != classifier.card.input_size[0]:
        raise BadInput(f"{path} takes images as BGR, and does not begin with a convolution.", "Turn its first layer.")
    stem.weight = nn.Parameter(stem.weight.detach().flip(1).contiguous(), stem.weight.requires_grad)


UPDATE = "Check its config.json, or install the version of transformers that wrote it."


def _make(name: str, values: Mapping[str, Any], classes: int, channels: int) -> nn.Module:
    config = _config(values, name)
    config.num_labels = classes
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    try:
        network: nn.Module = _transformers(name).AutoModelForImageClassification.from_config(
            config, trust_remote_code=False
        )
    except Exception as error:
        raise BadInput(f"{name}: transformers cannot build an image classifier: {first_line(error)}.", UPDATE) from None
    return network


def _config(values: Mapping[str, Any], where: str) -> Any:
    """transformers' own object for the values of a config.json; raises `BadInput` if it is not a classifier's."""
    transformers = _transformers(where)
    try:
        kind = values["model_type"]
        if kind == WRAPPER:
            raise BadInput(
                f"{where} is a model of timm that transformers wraps, whose config may open any file.",
                "Name its architecture with --arch timm:NAME.",
            )
        known = kind in transformers.CONFIG_MAPPING
        if not known or transformers.CONFIG_MAPPING[kind] not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise BadInput(f"{where}: transformers has no image classifier of type {kind!r}.", UPDATE)
        config = transformers.AutoConfig.for_model(kind, **_kept(values))
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{where}: transformers does not take its config: {first_line(error)}.", UPDATE) from None
    return config


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config, nested configs included, that describe the network."""
    return {
        name: _kept(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in DROPPED
    }


def _processed(path: Path) -> Tensor:
    """The outputs `(3, C, H, W)` of the folder's image processor for a black, a white and a red image."""
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0]], dtype=torch.uint8)
    images = [colour.view(3, 1, 1).expand(3, PROBED, PROBED).contiguous().numpy() for colour in colours]
    values, kind = read_json(path / PREPROCESSOR), str(read_json(path / CONFIG)["model_type"])
    try:
        processor = _processor_class(values, kind).from_dict(values)
        processed = processor(images, return_tensors="pt", input_data_format="channels_first")
        pixels: Tensor = processed["pixel_values"].float()
    except Exception as error:
        raise BadInput(f"{path / PREPROCESSOR} cannot be used: {first_line(error)}.", UPDATE) from None
    return pixels


def _processor_class(values: Mapping[str, Any], kind: str) -> Any:
    """The image processor class that the values name, else the default class for models of this kind.

    Raises `ValueError` if it is not an image processor of a classifier. AutoImageProcessor is not used because it would
    accept any class of transformers, including models and downloads.
    """
    auto = import_module("transformers.models.auto.image_processing_auto")
    models = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    usual = {
        model: list(names.values() if isinstance(names, dict) else names)
        for model, names in auto.IMAGE_PROCESSOR_MAPPING_NAMES.items()
        if model in models and model != WRAPPER
    }
    stated = values.get("image_processor_type") or values.get("feature_extractor_type") or usual[kind][0]
    name = stated.replace("FeatureExtractor", "ImageProcessor")
    for each in (name, name.removesuffix("Fast")):
        if any(each in names for names in usual.values()):
            return auto.get_image_processor_class_from_name(each)
    raise ValueError(f"{stated!r} is not an image processor of a classifier")


def _are_turned(black: Tensor, white: Tensor, red: Tensor) -> bool:
    """Whether a processor returns BGR: the first channel of its red image is then that of a black image."""
    return bool((red[0] - black[0]).abs().max() < (red[0] - white[0]).abs().max())


def _transformers(where: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise BadInput(
            f"{where} is a model of Hugging Face's transformers, which is not installed.",
            "Install it with: pip install 'dfcompress[transformers]'.",
        ) from None
    return transformers
