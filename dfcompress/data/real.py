"""Read the user's images, all through one interface: an ImageFolder, an `.npz`, IDX files, the batches of CIFAR, or a
synthetic set.

    source = open_images("cifar10-test.npz", classifier.card)
    for images, labels in source.batches(256):
        ...

Every source returns float images `(N, C, H, W)` in [0, 1] with the size and the channels of the model's card.
"""

from __future__ import annotations

from pathlib import Path

from dfcompress import console
from dfcompress.data.arrays import IDX_IMAGES, checked, idx_files, read_idx, read_npz
from dfcompress.data.cifar import is_cifar, read_cifar
from dfcompress.data.fitted import Fitted, tell_fitting
from dfcompress.data.image_folder import ImageFolder, class_folders
from dfcompress.data.image_source import KINDS, ImageSource, Part, Size
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard


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
    tell_fitting(path, size, card.input_size)
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
    return tuple(folder.name for folder in class_folders(path)) or None


def _is_folder_of_pictures(path: Path) -> bool:
    return path.is_dir() and not (path / MANIFEST).exists() and not idx_files(path) and not is_cifar(path)


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
        arrays = checked(path, images, labels if labelled else None, KINDS)
    elif path.is_dir() or IDX_IMAGES.fullmatch(path.name):
        arrays = read_idx(path, part, labelled=labelled)
    elif path.suffix == ".npz":
        arrays = read_npz(path, labelled=labelled)
    else:
        raise BadInput(f"{path} is not image data.", KINDS)
    if (highest := int(arrays.labels.max())) >= card.classes:
        raise BadInput(f"{path} has the label {highest}, the model has {card.classes} classes.", "Give other images.")
    return arrays, arrays.size
