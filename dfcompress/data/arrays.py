"""Read files that hold images as arrays, which are kept in memory: `.npz`, and IDX files as MNIST has them."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfcompress import console
from dfcompress.data.batches import UNLABELLED
from dfcompress.data.image_source import KINDS, Part, Size, is_hidden
from dfcompress.data.synthetic_set import as_float
from dfcompress.errors import BadInput

IDX_IMAGES = re.compile(r"(?P<part>.*)images[-.]idx3-ubyte(\.gz)?")
IDX_UINT8 = 8
LARGEST_LABEL = np.iinfo(np.int64).max


class Arrays:
    """uint8 images `(N, C, H, W)` and int64 labels `(N,)` held in memory."""

    class_names = None

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))

    @property
    def size(self) -> Size:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images `(B, C, H, W)` in [0, 1] and labels `(B,)`, in order."""
        parts = list(zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True))
        for images, labels in parts[first::every]:
            yield as_float(images).contiguous(), labels


def read_npz(path: Path, *, labelled: bool = True) -> Arrays:
    """Read `images`, uint8 `(N, C, H, W)` or `(N, H, W, C)` with 1 or 3 channels, and integer `labels` `(N,)`.

    If `labelled` is False, all labels are `UNLABELLED`. Raises `BadInput` if the file cannot be read or has another
    form.
    """
    form = "It must hold `images`, uint8 (N, C, H, W) or (N, H, W, C), and integer `labels` (N,)."
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = {"images", *(["labels"] if labelled else [])} - set(arrays.files)
            if missing:
                raise BadInput(f"{path} has no array `{min(missing)}`, only {sorted(arrays.files)}.", form)
            images = arrays["images"]
            labels = arrays["labels"] if labelled else None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a readable .npz: {error}.", form) from None
    if images.dtype != np.uint8 or images.ndim != 4 or not {images.shape[1], images.shape[3]} & {1, 3}:
        raise BadInput(f"{path}: `images` is {images.dtype} {images.shape}.", form)
    if images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return checked(path, images, labels, form)


def read_idx(path: Path, part: Part = "test", *, labelled: bool = True) -> Arrays:
    """Read the file of images at `path`, or in that folder, where `part` selects one of several, and its labels.

    The labels are read from the file beside it; if `labelled` is False, they are `UNLABELLED`. Raises `BadInput` if a
    file is missing or damaged.
    """
    images_file = _choose_part(path, idx_files(path), part) if path.is_dir() else path
    if not labelled:
        return checked(images_file, _read_idx_file(images_file, 3)[:, None], None, KINDS)
    name = images_file.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [file for file in (images_file.with_name(name), images_file.with_name(f"{name}.gz")) if file.exists()]
    if not beside:
        raise BadInput(f"{images_file} has no labels beside it.", f"Put {name} or {name}.gz there.")
    return checked(images_file, _read_idx_file(images_file, 3)[:, None], _read_idx_file(beside[0], 1), KINDS)


def idx_files(folder: Path) -> dict[str, Path]:
    """The IDX files of images by part (`train-`, `t10k-`), in the folder, or in its folder `raw`, as of torchvision.

    An unpacked file takes precedence over its packed twin.
    """
    for place in (folder, folder / "raw"):
        files = sorted(file for file in place.iterdir() if not is_hidden(file.name)) if place.is_dir() else []
        found = [(match["part"], file) for file in files if (match := IDX_IMAGES.fullmatch(file.name))]
        if found:
            return dict(reversed(found))
    return {}


def checked(path: Path, images: NDArray[np.uint8], labels: NDArray[np.integer] | None, form: str) -> Arrays:
    """The images `(N, C, H, W)` and their labels, which are all `UNLABELLED` if `labels` is None.

    Raises `BadInput`, naming `path`, if there are no images or the labels are not one integer from 0 for each image.
    `form` says what the file must hold.
    """
    if not images.size:
        raise BadInput(f"{path} holds no images.", form)
    if labels is None:
        return Arrays(images, np.full(len(images), UNLABELLED))
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise BadInput(f"{path}: `labels` is {labels.dtype} {labels.shape}.", form)
    if len(images) != len(labels):
        raise BadInput(f"{path} has {len(images)} images and {len(labels)} labels.", form)
    for label in (labels.min(), labels.max()):
        if not 0 <= label <= LARGEST_LABEL:
            raise BadInput(f"{path} has the label {label}.", "Labels count from 0.")
    return Arrays(images, labels)


def _choose_part(folder: Path, parts: dict[str, Path], part: Part) -> Path:
    names_of = {"test": ("t10k", "test"), "train": ("train",)}
    chosen = [name for name in parts if len(parts) == 1 or name.startswith(names_of[part])]
    if len(chosen) != 1:
        names = ", ".join(file.name for file in parts.values())
        raise BadInput(f"{folder} holds several sets of images: {names}.", "Name one of these files.")
    if len(parts) > 1:
        console.notice(f"{folder} holds {len(parts)} sets; the {part} images are taken: {parts[chosen[0]].name}")
    return parts[chosen[0]]


def _read_idx_file(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise BadInput(f"{path} cannot be unpacked: {error}.", "Download it again.") from None
    header = 4 * (1 + dimensions)
    if len(content) < header or content[:4] != bytes((0, 0, IDX_UINT8, dimensions)):
        raise BadInput(f"{path} starts with {content[:4].hex()}, not with 00000{IDX_UINT8}0{dimensions}.", KINDS)
    shape = tuple(int(number) for number in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - header != np.prod(shape):
        raise BadInput(f"{path} says {shape}, but holds {len(content) - header:,} values.", "Download it again.")
    return np.frombuffer(bytearray(content), np.uint8, offset=header).reshape(shape)
