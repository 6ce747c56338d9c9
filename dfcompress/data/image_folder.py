"""Read an `ImageFolder`: pictures in one subfolder per class, or anywhere in a folder if labels are not wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dfcompress import console
from dfcompress.data.batches import UNLABELLED
from dfcompress.data.fitted import fit, tell_fitting
from dfcompress.data.image_source import KINDS, Size, is_hidden
from dfcompress.data.synthetic_set import as_float
from dfcompress.errors import BadInput, listed
from dfcompress.models.card import ModelCard

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SHOWN = 12  # Names of classes in a message.


class ImageFolder:
    """A folder with one subfolder of pictures per class; if not `labelled`, with pictures anywhere in it.

    Pictures are read when they are used, so memory does not grow with the set.
    Raises `BadInput` if the subfolders do not fit the card's classes, if there are no pictures, and, while reading, at
    the first picture that cannot be decoded.
    """

    def __init__(self, folder: Path, card: ModelCard, *, labelled: bool = True) -> None:
        self.size = card.input_size
        self.class_names: tuple[str, ...] | None = None
        self.files: list[Path] = []
        numbers: list[int] = []
        if labelled:
            folders = class_folders(folder)
            if not folders:
                raise BadInput(f"{folder} holds no class folders and no image data.", KINDS)
            names = self.class_names = card.class_names or _sorted_names(folder, folders, card.classes)
            for class_folder in folders:
                pictures = _pictures(class_folder)
                self.files += pictures
                numbers += [_label(class_folder, names)] * len(pictures)
        else:
            self.files = _pictures(folder)
            numbers = [UNLABELLED] * len(self.files)
        if not self.files:
            has = "has class folders, but no pictures in them" if labelled else "holds no pictures and no image data"
            raise BadInput(f"{folder} {has}.", f"Known: {' '.join(sorted(PICTURES))}")
        self.labels = torch.tensor(numbers)
        size = _shape(_read_picture(self.files[0]))
        if size != card.input_size:
            tell_fitting(self.files[0], size, card.input_size)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels, in order of the class folders; threads decode the next batch meanwhile."""
        starts = range(first * batch_size, len(self), every * batch_size)
        parts = [slice(start, start + batch_size) for start in starts]
        with ThreadPoolExecutor() as threads:
            decoding = threads.map(self._read, self.files[parts[0]] if parts else [])
            for part, following in pairwise([*parts, slice(0)]):
                decoded, decoding = decoding, threads.map(self._read, self.files[following])
                yield torch.stack(list(decoded)), self.labels[part]

    def decode_all(self) -> None:
        """Decode every picture once without keeping it; raises `BadInput` at one that cannot be decoded."""
        with ThreadPoolExecutor() as threads:
            deque(threads.map(lambda file: _shape(_read_picture(file)), self.files), maxlen=0)

    def _read(self, file: Path) -> Tensor:
        return fit(as_float(_read_picture(file))[None], self.size)[0]


def class_folders(folder: Path) -> list[Path]:
    """The subfolders that are not hidden, sorted."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def _pictures(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    return sorted(file for file in files if not any(map(is_hidden, file.relative_to(folder).parts)))


def _sorted_names(folder: Path, folders: list[Path], classes: int) -> tuple[str, ...]:
    names = tuple(class_folder.name for class_folder in folders)
    if len(names) != classes:
        raise BadInput(
            f"{folder} has {len(names)} class folders, the model has {classes} classes and no names for them.",
            "Give the class names in the model's order with --class-names FILE.",
        )
    console.notice(f"{folder}: class folders are taken in sorted order: {listed(names, SHOWN)}")
    return names


def _label(class_folder: Path, class_names: tuple[str, ...]) -> int:
    if class_folder.name not in class_names:
        raise BadInput(
            f"{class_folder} is none of the model's classes ({listed(class_names, SHOWN)}).",
            "Leave the folder out, rename it, or give the class names in the model's order with --class-names FILE.",
        )
    return class_names.index(class_folder.name)


def _read_picture(file: Path) -> Tensor:
    """A picture as uint8 `(1, H, W)` if it is grey, else `(3, H, W)`; raises `BadInput` if it cannot be decoded."""
    try:
        with Image.open(file) as picture:
            mode = picture.mode
            pixels = np.array(picture.convert("L" if mode in ("1", "L", "LA") else "RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"{file} cannot be decoded: {error}.", "Replace or remove it.") from None
    if mode.startswith(("I", "F")):
        raise BadInput(f"{file} has more than 8 bits a channel (mode {mode}).", "Convert it to 8 bits.")
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _shape(image: Tensor) -> Size:
    channels, height, width = image.shape
    return channels, height, width
