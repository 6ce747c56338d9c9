"""Read the user's images, all through one interface: an ImageFolder, an `.npz`, IDX files, the batches of CIFAR, or a
synthetic set.

    source = open_images("cifar10-test.npz", classifier.card)
    for images, labels in source.batches(256):
        ...

Every source returns float images `(N, C, H, W)` in [0, 1] with the size and the channels of the model's card.
"""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.data.batches import UNLABELLED
from dfcompress.data.cifar import is_cifar, read_cifar
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet, as_float
from dfcompress.errors import BadInput, listed
from dfcompress.models.card import ModelCard

Size = tuple[int, int, int]
Part = Literal["train", "test"]

KINDS = (
    "Give an ImageFolder, an .npz with `images` and `labels`, IDX files as MNIST has them, the batches of CIFAR, or a "
    "synthetic set."
)
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
IDX_IMAGES = re.compile(r"(?P<part>.*)images[-.]idx3-ubyte(\.gz)?")
IDX_UINT8 = 8
LARGEST_LABEL = np.iinfo(np.int64).max
CROPPED_FROM_PIXELS = 128
SHOWN = 12  # Names of classes in a message.
CROP_SHARE = 224 / 256  # the ImageNet evaluation of torchvision and timm
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L


class ImageSource(Protocol):
    """Labelled images in a fixed order, which can be read any number of times."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label, None if the source does not know them."""

    @property
    def labels(self) -> Tensor:
        """Labels `(N,)` of all images, int64."""

    @property
    def size(self) -> Size:
        """Channels, height, width of the stored images; for a folder of pictures, of the images in the batches."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images `(B, C, H, W)` in [0, 1] and int64 labels `(B,)`: the batches `first`, `first + every`, ..."""


def open_images(path: str | Path, card: ModelCard, *, part: Part = "test", labelled: bool = True) -> ImageSource:
    """The labelled images at `path`, fitted to the model's input and checked against its classes.

    A folder with `dataset.json` is a synthetic set; a folder (or file) with `*-images-idx3-ubyte[.gz]` holds IDX files;
    a folder with the files of CIFAR holds its batches; any other folder has one subfolder per class. `part` selects
    the images of IDX files and CIFAR. Subfolders are matched to the card's class names if it has names, otherwise they
    are taken in sorted order.
    If `labelled` is False, labels are ignored: they may be missing or be those of other classes, and pictures may lie
    anywhere in a folder.
    Raises `BadInput`, naming the file and its content, if there are no images or they do not fit the model.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist.", KINDS)
    if _is_folder_of_pictures(path):
        return ImageFolder(path, card, labelled=labelled)
    source, size = _open_whole(path, card, part, labelled)
    if size == card.input_size:
        return source
    _tell_fitting(path, size, card.input_size)
    return Fitted(source, card.input_size)


def require_decodable(source: ImageSource) -> None:
    """Raise `BadInput` if a folder has a picture that cannot be decoded, so that the error comes before long work.

    Every picture is decoded, because only decoding finds a truncated JPEG. It takes 1.2 s of CPU time for 10,000 PNGs
    of 32 px, 1.4 s for 1,000 JPEGs of 500 px.
    """
    if isinstance(source, ImageFolder):
        source.decode_all()


def folder_names(path: str | Path) -> tuple[str, ...] | None:
    """The sorted names of the class folders at `path` if it is an `ImageFolder` with classes, else None."""
    path = Path(path)
    if not _is_folder_of_pictures(path):
        return None
    return tuple(folder.name for folder in _class_folders(path)) or None


def _is_folder_of_pictures(path: Path) -> bool:
    return path.is_dir() and not (path / MANIFEST).exists() and not _idx_files(path) and not is_cifar(path)


def _open_whole(path: Path, card: ModelCard, part: Part, labelled: bool) -> tuple[ImageSource, Size]:
    """A source whose stored images all have the same size, and this size; raises `BadInput` as `open_images`."""
    if path.is_dir() and (path / MANIFEST).exists():
        synthetic = SyntheticSet(path)
        made_for = ModelCard.from_json(synthetic.manifest["card"])
        if labelled and made_for.classes > card.classes:
            raise BadInput(
                f"{path} has {made_for.classes} classes, the model has {card.classes}.", "Give other images."
            )
        return synthetic, made_for.input_size
    if path.is_dir() and is_cifar(path):
        images, labels = read_cifar(path, part)
        console.notice(f"{path} holds two sets; the {part} images are taken.")
        arrays = _checked(path, images, labels if labelled else None, KINDS)
    elif path.is_dir() or IDX_IMAGES.fullmatch(path.name):
        arrays = read_idx(path, part, labelled=labelled)
    elif path.suffix == ".npz":
        arrays = read_npz(path, labelled=labelled)
    else:
        raise BadInput(f"{path} is not image data.", KINDS)
    if (highest := int(arrays.labels.max())) >= card.classes:
        raise BadInput(f"{path} has the label {highest}, the model has {card.classes} classes.", "Give other images.")
    return arrays, arrays.size


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


class Fitted:
    """Another source's images, converted to `input_size` (channels, height, width) by `fit`."""

    def __init__(self, source: ImageSource, input_size: Size) -> None:
        self.source, self.input_size = source, input_size

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """As the source has them."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Tensor:
        """As the source has them."""
        return self.source.labels

    @property
    def size(self) -> Size:
        """The size of the source's stored images."""
        return self.source.size

    def batches(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels, in the source's order."""
        for images, labels in self.source.batches(batch_size, first=first, every=every):
            yield fit(images, self.input_size), labels


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
            folders = _class_folders(folder)
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
            _tell_fitting(self.files[0], size, card.input_size)

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


def _pictures(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    return sorted(file for file in files if not any(map(_is_hidden, file.relative_to(folder).parts)))


def _class_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    """Whether a name is hidden or one that macOS adds to archives: `__MACOSX`, and `._cat.png` for `cat.png`."""
    return name.startswith(".") or name == "__MACOSX"


def fit(images: Tensor, input_size: Size) -> Tensor:
    """Float images `(N, C, H, W)` → `(N, *input_size)`, bilinear with antialiasing.

    Images of this size are not resized. For inputs of 128 px and more, images are resized to cover 8/7 of the input and
    the centre is cut out, as ImageNet models are evaluated; for smaller inputs the whole image is resized. Raises
    `BadInput` for channels that cannot be converted.
    """
    channels, height, width = input_size
    images = _recolour(images, channels)
    if images.shape[2:] == (height, width):
        return images
    if min(height, width) < CROPPED_FROM_PIXELS:
        return _resize(images, height, width)
    scale = max(height / images.shape[2], width / images.shape[3]) / CROP_SHARE
    larger = _resize(images, round(images.shape[2] * scale), round(images.shape[3] * scale))
    top, left = (larger.shape[2] - height) // 2, (larger.shape[3] - width) // 2
    return larger[:, :, top : top + height, left : left + width]


def reshaped(images: Tensor, input_size: Size) -> Tensor:
    """Float images `(N, C, H, W)` of one model → `(N, *input_size)` of another, bilinear with antialiasing.

    The whole image is resized, so nothing is cut off.
    """
    images = _recolour(images, input_size[0])
    return images if images.shape[2:] == input_size[1:] else _resize(images, *input_size[1:])


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def _recolour(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    require_colours(images.shape[1], channels)
    if channels == 1:
        return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    return images.expand(-1, channels, -1, -1)


def require_colours(channels: int, wanted: int) -> None:
    """Raise `BadInput` if images of `channels` channels cannot be converted to the `wanted` number of channels.

    Images of 1 channel can be converted to any number, images of 3 channels also to 1.
    """
    if channels != wanted and channels != 1 and (channels, wanted) != (3, 1):
        raise BadInput(f"Images of {channels} channels cannot be shown to a model of {wanted}.", "Use others.")


def _tell_fitting(path: Path, size: Size, input_size: Size) -> None:
    require_colours(size[0], input_size[0])
    before, after = ("x".join(map(str, shape)) for shape in (size, input_size))
    console.notice(f"{path}: images of {before} are fitted to the model's {after}.")


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
    return _checked(path, images, labels, form)


def read_idx(path: Path, part: Part = "test", *, labelled: bool = True) -> Arrays:
    """Read the file of images at `path`, or in that folder, where `part` selects one of several, and its labels.

    The labels are read from the file beside it; if `labelled` is False, they are `UNLABELLED`. Raises `BadInput` if a
    file is missing or damaged.
    """
    images_file = _choose_part(path, _idx_files(path), part) if path.is_dir() else path
    if not labelled:
        return _checked(images_file, _read_idx_file(images_file, 3)[:, None], None, KINDS)
    name = images_file.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [file for file in (images_file.with_name(name), images_file.with_name(f"{name}.gz")) if file.exists()]
    if not beside:
        raise BadInput(f"{images_file} has no labels beside it.", f"Put {name} or {name}.gz there.")
    return _checked(images_file, _read_idx_file(images_file, 3)[:, None], _read_idx_file(beside[0], 1), KINDS)


def _idx_files(folder: Path) -> dict[str, Path]:
    """The IDX files of images by part (`train-`, `t10k-`), in the folder, or in its folder `raw`, as of torchvision.

    An unpacked file takes precedence over its packed twin.
    """
    for place in (folder, folder / "raw"):
        files = sorted(file for file in place.iterdir() if not _is_hidden(file.name)) if place.is_dir() else []
        found = [(match["part"], file) for file in files if (match := IDX_IMAGES.fullmatch(file.name))]
        if found:
            return dict(reversed(found))
    return {}


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


def _checked(path: Path, images: NDArray[np.uint8], labels: NDArray[np.integer] | None, form: str) -> Arrays:
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
