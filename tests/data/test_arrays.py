"""Whatever is wrong with an `.npz` or an IDX file is said with its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import GREY, write_idx_pair

from dfcompress.data.real import open_images
from dfcompress.errors import BadInput

ZEROS = np.zeros((4, 1, 8, 8), np.uint8)
LABELS = np.zeros(4, np.int64)


def bad(tmp_path: Path, name: str, images: np.ndarray | None, labels: np.ndarray | None) -> Path:
    arrays = {key: value for key, value in (("images", images), ("labels", labels)) if value is not None}
    np.savez(tmp_path / name, **arrays)
    return tmp_path / name


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (ZEROS, None, r"has no array `labels`, only \['images'\]"),
        (ZEROS.astype(np.float32), LABELS, r"`images` is float32 \(4, 1, 8, 8\)"),
        (ZEROS[:, 0], LABELS, r"`images` is uint8 \(4, 8, 8\)"),
        (np.zeros((4, 2, 8, 8), np.uint8), LABELS, r"`images` is uint8 \(4, 2, 8, 8\)"),
        (ZEROS, LABELS[:3], "has 4 images and 3 labels"),
        (ZEROS, LABELS.astype(float), r"`labels` is float64 \(4,\)"),
        (ZEROS, LABELS + 10, "has the label 10, the model has 10 classes"),
        (ZEROS, LABELS - 1, "has the label -1"),
        (ZEROS, np.full(4, 2**64 - 1, np.uint64), "has the label 18446744073709551615"),
        (ZEROS[:0], LABELS[:0], "holds no images"),
        (ZEROS[:, :, :0], LABELS, "holds no images"),
    ],
)
def test_an_npz_that_cannot_be_used_says_what_was_found(tmp_path, images, labels, found):
    with pytest.raises(BadInput, match=rf"bad\.npz.*{found}"):
        open_images(bad(tmp_path, "bad.npz", images, labels), GREY)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_a_broken_npz_is_refused(tmp_path, content):
    (tmp_path / "broken.npz").write_bytes(content)
    with pytest.raises(BadInput, match=r"broken\.npz is not a readable \.npz"):
        open_images(tmp_path / "broken.npz", GREY)


def test_an_npz_of_pickled_objects_is_refused_unopened(tmp_path):
    with pytest.raises(BadInput, match=r"objects\.npz is not a readable \.npz: Object arrays cannot be loaded"):
        open_images(bad(tmp_path, "objects.npz", np.array([print], dtype=object), LABELS), GREY)


def test_a_named_images_file_takes_its_own_labels(tmp_path, grey_images):
    images, labels = grey_images
    write_idx_pair(tmp_path, "t10k", images, labels)
    train = write_idx_pair(tmp_path, "train", images[:6], labels[:6])
    assert len(open_images(train, GREY)) == 6


def test_idx_files_that_do_not_fit_are_named(tmp_path, grey_images):
    images, labels = grey_images
    file = write_idx_pair(tmp_path, "t10k", images, labels)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadInput, match=r"t10k-images-idx3-ubyte says \(20, 8, 8\), but holds 1,275 values"):
        open_images(file, GREY)
    file.write_bytes(b"text")
    with pytest.raises(BadInput, match="t10k-images-idx3-ubyte starts with 74657874, not with 00000803"):
        open_images(file, GREY)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(BadInput, match=r"has no labels beside it\. Put t10k-labels-idx1-ubyte"):
        open_images(file, GREY)


def test_a_packed_idx_file_cut_short_is_named(tmp_path, grey_images):
    file = write_idx_pair(tmp_path, "t10k", *grey_images, ".gz")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"t10k-images-idx3-ubyte\.gz cannot be unpacked"):
        open_images(tmp_path, GREY)


def test_several_idx_sets_of_which_none_is_the_test_part_must_be_named(tmp_path, grey_images):
    write_idx_pair(tmp_path, "letters", *grey_images)
    write_idx_pair(tmp_path, "train", *grey_images)
    with pytest.raises(BadInput, match=r"holds several sets of images: .*letters-images-idx3-ubyte"):
        open_images(tmp_path, GREY)
