"""Weights that torchvision and timm released, given by name instead of as a file.

load("torchvision:resnet18")                            # the library's default weights, or .IMAGENET1K_V1
load("timm:resnet18.a1_in1k")

They are taken from the cache of their library, or fetched into it, and read like any untrusted file.
Their card comes from the library's configuration.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfcompress import console
from dfcompress.errors import BadInput, first_line
from dfcompress.models.architecture import tensors_of
from dfcompress.models.architectures import find, named
from dfcompress.models.safe_reading import PICKLED_WEIGHTS, WEIGHTS

TORCHVISION, TIMM = "torchvision:", "timm:"
# Both libraries write the first digits of a file's sha256 into its name.
HASH = re.compile(r"-([0-9a-f]{8,})\.")
MEGABYTE = 1e6


@dataclass(frozen=True)
class Released:
    """Released weights: their `name` in the library, the `file` in its cache, and the card fields `stated` by it."""

    name: str
    file: Path
    stated: dict[str, Any]


def is_released(checkpoint: Path) -> bool:
    """Whether a checkpoint's name has the form of a library's weights, and no file has that name."""
    return str(checkpoint).startswith((TORCHVISION, TIMM)) and not checkpoint.exists()


def released(spec: str) -> Released:
    """The weights that `torchvision:NAME`, `torchvision:NAME.WEIGHTS`, `timm:NAME` or `timm:NAME.TAG` names.

    They are fetched if the library's cache lacks them, with a notice of the source and the size.
    Raises `BadInput` for names that the library does not know, and if fetching fails.
    """
    if spec.startswith(TORCHVISION):
        return _of_torchvision(spec.removeprefix(TORCHVISION))
    return _of_timm(spec.removeprefix(TIMM))


def _of_torchvision(name: str) -> Released:
    import torchvision.models

    model, _, tag = name.partition(".")
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        raise BadInput(f"torchvision has no classification model {model!r}.", _near(model, known))
    choices = torchvision.models.get_model_weights(model)
    if tag and tag not in choices.__members__:
        raise BadInput(f"torchvision has no weights {tag!r} of {model}.", _near(tag, [*choices.__members__]))
    weights: Any = choices[tag] if tag else choices.DEFAULT
    transforms = weights.transforms()
    stated = {
        "architecture": model,
        "input_size": (3, *(2 * transforms.crop_size)[:2]),
        "class_names": weights.meta["categories"],
    }
    if find(model).mean is None:  # GoogLeNet and Inception take images normalised otherwise.
        stated |= {"mean": transforms.mean, "std": transforms.std}
    return Released(
        f"{model}.{weights.name}", _file_of_hub(weights.url, size=weights.meta.get("_file_size", 0)), stated
    )


def _of_timm(name: str) -> Released:
    model, _, tag = name.partition(".")
    architecture = named(TIMM + model)
    import timm
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{model}*") if each.partition(".")[0] == model]
    if not tags:
        raise BadInput(f"timm has released no weights of {model}.", f"Name a file, with --arch timm:{model}.")
    if tag and tag not in tags:
        raise BadInput(f"timm has no weights {tag!r} of {model}.", _near(tag, tags))
    config: Any = timm.get_pretrained_cfg(name)
    subset = infer_imagenet_subset(config.to_dict())
    stated = {
        "architecture": TIMM + model,
        "input_size": config.input_size,
        "mean": config.mean,
        "std": config.std,
        "class_names": ImageNetInfo(subset).label_descriptions() if subset else None,
    }
    values = sum(shape.numel() for shape in tensors_of(architecture, config.num_classes, config.input_size[0]).values())
    size = 4 * values / MEGABYTE
    if config.url and (found := _place_in_hub(config.url)).exists():
        file = found
    elif config.hf_hub_id:
        files = [config.hf_hub_filename] if config.hf_hub_filename else [WEIGHTS, PICKLED_WEIGHTS]
        file = _file_of_hugging_face(config.hf_hub_id, files, size)
    else:
        file = _file_of_hub(config.url, size)
    return Released(f"{model}.{config.tag}" if config.tag else model, file, stated)


def _place_in_hub(url: str) -> Path:
    """The path where torch.hub keeps the file from an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _file_of_hub(url: str, size: float) -> Path:
    """The file from an address in torch.hub's cache, fetched if it is missing; `size` in megabytes.

    Raises `BadInput` if fetching fails.
    """
    file = _place_in_hub(url)
    if file.exists():
        return file
    console.notice(f"Fetching {url}{_size(size)} into {file.parent}.")
    digits = HASH.search(file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # torch writes a temporary file beside it, checks the hash, and renames it.
        torch.hub.download_url_to_file(
            url, str(file), hash_prefix=digits[1] if digits else None, progress=sys.stderr.isatty()
        )
    except Exception as error:  # Whatever networks, proxies and disks do.
        raise BadInput(
            f"{url} cannot be fetched: {first_line(error)}.", f"Put the file into {file.parent} by other means."
        ) from None
    return file


def _file_of_hugging_face(repository: str, names: Sequence[str], size: float) -> Path:
    """The first of the named files in Hugging Face's cache, else the first one in the repository.

    Raises `BadInput` if fetching fails.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    console.notice(f"Fetching {repository}{_size(size)} into Hugging Face's cache.")
    why = ""
    for name in names:
        try:
            with _without_warnings("huggingface_hub"):
                return Path(hf_hub_download(repository, name))
        except Exception as error:  # Whatever networks, proxies and disks do.
            why = first_line(error)
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                break
    raise BadInput(
        f"{repository} cannot be fetched from Hugging Face: {why}.", "Name a file of these weights, with --arch."
    )


@contextmanager
def _without_warnings(library: str) -> Iterator[None]:
    """Within this context, keep a library from logging warnings, such as one for each attempt to download."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _size(megabytes: float) -> str:
    return f" ({megabytes:.0f} MB)" if megabytes else ""


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 3)
    return f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(known)}."
