"""Read CIFAR-10 and CIFAR-100 as published for Python: pickles, read as data, so that nothing in them is called.

The folders are `cifar-10-batches-py` and `cifar-100-python` of https://www.cs.toronto.edu/~kriz/cifar.html, which
`torchvision.datasets` downloads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfcompress.errors import BadInput, first_line, printable
from dfcompress.models.pickle_machine import Instance, Machine

SHAPE = (3, 32, 32)
# The files of CIFAR-10 and of CIFAR-100 by part, keyed by the file with the class names.
FILES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "batches.meta": {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "meta": {"train": ("train",), "test": ("test",)},
}


def is_cifar(folder: Path) -> bool:
    """Whether a folder holds CIFAR-10 or CIFAR-100: the file with its class names and at least one file of images."""
    return _parts(folder) is not None


def read_cifar(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images `(N, 3, 32, 32)` of a part and their labels `(N,)`; of CIFAR-100 the fine labels.

    `part` is "train" or "test", and `is_cifar(folder)` must be true. Raises `BadInput` for files that are missing or
    damaged, or that are no batch of CIFAR.
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
        # Any error of a parser on foreign bytes means that the file is damaged.
        problem = f"{type(error).__name__}: {printable(first_line(error))}"
        raise BadInput(f"{file} is not a batch of CIFAR ({problem}).", "Download it again.") from None
    return images, labels


def _bytes_of(array: Instance) -> bytes:
    """The values of a numpy array: the last item of its state, which is a string if Python 2 wrote the file."""
    state: Any = array.state
    values: str | bytes = state[-1]
    return values.encode("latin1") if isinstance(values, str) else values
