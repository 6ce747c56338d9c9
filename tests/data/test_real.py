"""Every kind of image source gives the same images. What is no image data or does not fit the model is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from image_files import CIFAR, GREY, MNIST, read, write_folder, write_idx, write_idx_pair, write_npz, write_set

from dfcompress import console
from dfcompress.data.batches import UNLABELLED
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput


def test_every_kind_of_source_gives_the_same_images_and_labels(tmp_path, grey_images):
    images, labels = grey_images
    sources = [
        write_npz(tmp_path / "nchw.npz", images[:, None], labels),
        write_npz(tmp_path / "nhwc.npz", images[..., None], labels),
        write_folder(tmp_path / "folder", images, labels),
        write_idx_pair(tmp_path / "idx", "t10k", images, labels),
        write_idx_pair(tmp_path / "packed", "t10k", images, labels, ".gz").parent,
        write_idx_pair(tmp_path / "torchvision" / "raw", "t10k", images, labels).parent.parent,
        write_set(tmp_path / "set", images, labels),
    ]
    for source in sources:
        read_images, read_labels = read(source, GREY)
        assert torch.equal(read_images, torch.from_numpy(images[:, None]).float() / 255), source
        assert read_labels.tolist() == labels.tolist(), source
        assert len(open_images(source, GREY)) == 20


def test_every_kind_of_source_is_resized_and_coloured_alike(tmp_path, grey_images):
    images, labels = grey_images
    expected, _ = read(write_npz(tmp_path / "nchw.npz", images[:, None], labels), CIFAR)
    assert expected.shape == (20, 3, 32, 32)
    for source in (
        write_folder(tmp_path / "folder", images, labels),
        write_idx_pair(tmp_path / "idx", "t10k", images, labels),
        write_set(tmp_path / "set", images, labels),
    ):
        assert torch.allclose(read(source, CIFAR)[0], expected, atol=1e-6), source


def test_the_test_part_of_mnist_has_10000_images_fitted_to_32_pixels(mnist_folder):
    images, labels = next(open_images(mnist_folder, MNIST).batches(1000))
    assert len(open_images(mnist_folder, MNIST)) == 10_000
    assert images.shape == (1000, 1, 32, 32)
    assert (images.min(), images.max()) == (0, 1)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_taking_the_test_part_and_fitting_are_said_in_one_line_each(mnist_folder, capsys):
    console.configure(console.NORMAL)
    open_images(mnist_folder, MNIST)
    console.configure(console.QUIET)
    part, fitting = capsys.readouterr().err.splitlines()
    assert part.endswith("holds 2 sets; the test images are taken: t10k-images-idx3-ubyte")
    assert fitting.endswith("images of 1x28x28 are fitted to the model's 1x32x32.")


def test_images_whose_labels_do_not_count_need_none(tmp_path, grey_images):
    images, labels = grey_images
    write_idx(tmp_path / "idx" / "t10k-images-idx3-ubyte", images)
    np.savez(tmp_path / "alone.npz", images=images[:, None])
    write_npz(tmp_path / "other.npz", images[:, None], labels + 50)
    write_folder(tmp_path / "flat", images, np.zeros_like(labels))
    for place in ("idx", "alone.npz", "other.npz", "flat/0"):
        with pytest.raises(BadInput):
            open_images(tmp_path / place, GREY)
        shown, given = next(open_images(tmp_path / place, GREY, labelled=False).batches(20))
        assert torch.equal(shown, torch.from_numpy(images)[:, None] / 255)
        assert set(given.tolist()) == {UNLABELLED}


def test_what_is_missing_or_no_image_data_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    for name, found in (
        ("nowhere", "nowhere does not exist"),
        ("table.csv", "table.csv is not image data"),
        ("empty", "empty holds no class folders"),
    ):
        with pytest.raises(BadInput, match=f"{found}.*Give an ImageFolder, an .npz"):
            open_images(tmp_path / name, GREY)


def test_a_synthetic_set_of_more_classes_is_refused(tmp_path, grey_images):
    folder = write_set(tmp_path / "set", *grey_images)
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["card"]["classes"] = 100
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="set has 100 classes, the model has 10"):
        open_images(folder, GREY)


def test_a_fitting_synthetic_set_is_handed_over_as_it_is(tmp_path, grey_images):
    assert isinstance(open_images(write_set(tmp_path / "set", *grey_images), GREY), SyntheticSet)
