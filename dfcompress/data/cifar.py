"""CIFAR-10 and CIFAR-100 as they are published for Python: pickles, read as data, with nothing in them called.

The folders `cifar-10-batches-py` and `cifar-100-python` of https://www.cs.toronto.edu/~kriz/cifar.html, which is what
`torchvision.datasets` downloads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfcompress.errors import BadInput, first_line, printable
from dfcompress.models.pickled import Instance, Machine

SHAPE = (3, 32, 32)
# By the file that names the classes, of CIFAR-10 and of CIFAR-100.
FILES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "batches.meta": {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "meta": {"train": ("train",), "test": ("test",)},
}


def is_cifar(folder: Path) -> bool:
    """Whether either set is in a folder: its names of classes, and a file of images at least."""
    return _parts(folder) is not None


def read_cifar(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images `(N, 3, 32, 32)` of a part, and their labels `(N,)`; CIFAR-100's are the fine ones.

    Raises `BadInput` for files that are missing, damaged or something else.
    """
    parts = _parts(folder)
    assert parts, "it was asked before whether they are there"
    images, labels = zip(*(_read(folder / name) for name in parts[part]), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _parts(folder: Path) -> Mapping[str, Sequence[str]] | None:
    for names, parts in FILES.items():
        if (folder / names).is_file() and any((folder / name).is_file() for part in parts.values() for name in part):
            return parts
    return None


def _read(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        with file.open("rb") as opened:
            content: Any = Machine(opened).load()
        labels = np.array(content["labels"] if "labels" in content else content["fine_labels"], np.int64)
        images = np.frombuffer(_bytes_of(content["data"]), np.uint8).reshape(len(labels), *SHAPE)
    except Exception as error:
        # Whatever a parser trips over in foreign bytes, the file is what is wrong.
        problem = f"{type(error).__name__}: {printable(first_line(error))}"
        raise BadInput(f"{file} is no batch of CIFAR ({problem}).", "Download it again.") from None
    return images, labels


def _bytes_of(array: Instance) -> bytes:
    """The values of an array of numpy: the last item of its state, a string of Python 2 where that wrote the file."""
    state: Any = array.state
    values: str | bytes = state[-1]
    return values.encode("latin1") if isinstance(values, str) else values
