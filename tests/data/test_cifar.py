"""The files of CIFAR, as Python 2 wrote them and as Python 3 does, and files that only look like them."""

from __future__ import annotations

import io
import os
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from dfcompress.data.cifar import FILES, is_cifar, read_cifar
from dfcompress.data.real import open_images
from dfcompress.errors import BadInput
from dfcompress.models.card import CIFAR_MEAN, CIFAR_STD, ModelCard

CARD = ModelCard("any", 100, (3, 32, 32), CIFAR_MEAN, CIFAR_STD)


class Python2(pickle._Pickler):
    """Writes strings, and the bytes of arrays, as `str` of Python 2."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    def save_str(self, value):
        self.save_bytes(value.encode())

    dispatch[bytes], dispatch[str] = save_bytes, save_str


def pickled(value: object, python: int) -> bytes:
    if python == 3:
        return pickle.dumps(value)
    file = io.BytesIO()
    Python2(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


@pytest.fixture(params=[2, 3])
def folders(request, tmp_path) -> dict[str, Path]:
    """Both sets with four images a file."""
    made = {}
    for name, labels, meta in [
        ("cifar-10-batches-py", "labels", "batches.meta"),
        ("cifar-100-python", "fine_labels", "meta"),
    ]:
        made[name] = tmp_path / name
        made[name].mkdir()
        (made[name] / meta).write_bytes(pickled({"label_names": ["airplane"]}, request.param))
        for file in [each for part in FILES[meta].values() for each in part]:
            pixels, classes = content(file)
            other = {"coarse_labels": [0, 0, 0, 0], "filenames": ["a.png"] * 4}
            (made[name] / file).write_bytes(pickled({"data": pixels, labels: classes, **other}, request.param))
    return made


def content(file: str) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(len(file) + ord(file[-1]))
    return generator.integers(0, 256, (4, 3072), dtype=np.uint8), generator.integers(0, 10, 4).tolist()


def test_both_sets_are_read_as_numpy_would_read_them(folders):
    for folder, parts in zip(folders.values(), FILES.values(), strict=True):
        assert is_cifar(folder)
        for part, files in parts.items():
            images, labels = read_cifar(folder, part)
            expected = [content(file) for file in files]
            assert images.shape == (4 * len(expected), 3, 32, 32)
            assert (images.reshape(-1, 3072) == np.concatenate([pixels for pixels, _ in expected])).all()
            assert labels.tolist() == [label for _, classes in expected for label in classes]


def test_they_are_images_as_all_others_are(folders):
    folder = folders["cifar-10-batches-py"]
    images, labels = next(open_images(folder, CARD).batches(4))
    assert labels.tolist() == content("test_batch")[1]
    assert (images.flatten(1).numpy() == content("test_batch")[0].astype(np.float32) / 255).all()
    assert len(open_images(folder, CARD, part="train")) == 20
    assert open_images(folder, CARD, labelled=False).labels.tolist() == [-1] * 4


def test_a_folder_of_classes_beside_a_file_called_meta_is_no_cifar(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "meta").write_text("about these pictures")
    assert not is_cifar(tmp_path)


def test_nothing_in_a_file_is_called(folders, tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    folder = folders["cifar-10-batches-py"]
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Program(), "labels": [1]}))
    with pytest.raises(BadInput, match="test_batch is not a batch of CIFAR"):
        open_images(folder, CARD)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"no pickle",
        pickle.dumps({"labels": [1]}),
        pickle.dumps([1]),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}),
    ],
)
def test_files_that_are_something_else_are_named(folders, file):
    folder = folders["cifar-100-python"]
    (folder / "test").write_bytes(file)
    with pytest.raises(BadInput, match=r"cifar-100-python/test is not a batch of CIFAR \(.+\)\. Download it again"):
        open_images(folder, CARD)
    (folder / "test").unlink()  # The training images are still there.
    with pytest.raises(BadInput, match="cifar-100-python/test is not a batch of CIFAR"):
        open_images(folder, CARD)
