"""Class folders are labels by name or in sorted order. An error names the folder or the picture."""

from __future__ import annotations

import numpy as np
import pytest
from image_files import GREY, write_folder
from PIL import Image

from dfcompress.data.image_folder import ImageFolder
from dfcompress.data.real import open_images
from dfcompress.errors import BadInput
from dfcompress.models.card import MNIST_MEAN, MNIST_STD, ModelCard

DIGITS = tuple(str(digit) for digit in range(10))


def test_class_folders_follow_the_names_of_the_card(tmp_path, grey_images):
    images, labels = grey_images
    card = ModelCard("any", 10, (1, 8, 8), MNIST_MEAN, MNIST_STD, class_names=DIGITS[::-1])
    source = open_images(write_folder(tmp_path / "folder", images, labels), card)
    assert source.class_names == DIGITS[::-1]
    assert next(source.batches(20))[1].tolist() == (9 - labels.astype(int)).tolist()


def test_class_folders_without_names_in_the_card_are_taken_in_sorted_order(tmp_path, grey_images):
    source = open_images(write_folder(tmp_path / "folder", *grey_images), GREY)
    assert source.class_names == DIGITS


def test_a_folder_of_pictures_can_be_read_twice(tmp_path, grey_images):
    source = open_images(write_folder(tmp_path / "folder", *grey_images), GREY)
    assert isinstance(source, ImageFolder)
    assert [len(labels) for _, labels in source.batches(8)] == [8, 8, 4]
    assert [len(labels) for _, labels in source.batches(20)] == [20]


def test_class_folders_without_pictures_are_refused(tmp_path):
    for digit in DIGITS:
        (tmp_path / digit).mkdir()
    with pytest.raises(BadInput, match="has class folders, but no pictures in them"):
        open_images(tmp_path, GREY)


def test_a_folder_that_is_no_class_of_the_model_is_named(tmp_path, grey_images):
    card = ModelCard("any", 10, (1, 8, 8), MNIST_MEAN, MNIST_STD, class_names=tuple("abcdefghij"))
    with pytest.raises(BadInput, match=r"folder/0 is none of the model's classes \(a, b, c, d, e, f, g, h, i, j\)"):
        open_images(write_folder(tmp_path / "folder", *grey_images), card)


def test_another_number_of_class_folders_needs_names(tmp_path, grey_images):
    images, labels = grey_images
    with pytest.raises(BadInput, match=r"has 9 class folders, the model has 10 classes .* --class-names FILE"):
        open_images(write_folder(tmp_path / "folder", images[:18], labels[:18]), GREY)


def test_a_broken_picture_is_named(tmp_path, grey_images):
    folder = write_folder(tmp_path / "folder", *grey_images)
    (folder / "3" / "00007.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"3/00007\.png cannot be decoded"):
        list(open_images(folder, GREY).batches(4))


def test_a_picture_cut_short_is_named(tmp_path, grey_images):
    folder = write_folder(tmp_path / "folder", *grey_images)
    picture = folder / "3" / "00007.png"
    picture.write_bytes(picture.read_bytes()[:-40])
    with pytest.raises(BadInput, match=r"3/00007\.png cannot be decoded"):
        list(open_images(folder, GREY).batches(4))


def test_what_macos_and_others_hide_in_folders_is_no_picture_and_no_class(tmp_path, grey_images):
    folder = write_folder(tmp_path / "folder", *grey_images)
    for hidden in ("3/._00007.png", "3/.thumbs/00007.png", "__MACOSX/3/00007.png", ".cache/00007.png"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_bytes(b"no picture")
    for labelled in (True, False):
        assert len(open_images(folder, GREY, labelled=labelled)) == 20


def test_a_16_bit_picture_is_refused_instead_of_clipped(tmp_path, grey_images):
    folder = write_folder(tmp_path / "folder", *grey_images)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "3" / "00007.png")
    with pytest.raises(BadInput, match=r"00007\.png has more than 8 bits a channel \(mode I;16\)"):
        list(open_images(folder, GREY).batches(4))
