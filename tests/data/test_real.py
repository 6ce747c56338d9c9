"""Every kind of image source gives the same images; whatever is wrong with one is said with its file."""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dfcompress import console
from dfcompress.data.batches import UNLABELLED
from dfcompress.data.real import ImageFolder, fit, open_images
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.models.card import CIFAR_MEAN, CIFAR_STD, MNIST_MEAN, MNIST_STD, ModelCard

CIFAR = ModelCard("any", 10, (3, 32, 32), CIFAR_MEAN, CIFAR_STD)
MNIST = ModelCard("any", 10, (1, 32, 32), MNIST_MEAN, MNIST_STD)
GREY = ModelCard("any", 10, (1, 8, 8), MNIST_MEAN, MNIST_STD)
DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture
def grey_images() -> tuple[np.ndarray, np.ndarray]:
    """20 grey images of 8x8, two a class, in order of the classes."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    return images, np.repeat(np.arange(10, dtype=np.uint8), 2)


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    np.savez(path, images=images, labels=labels)
    return path


def write_folder(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        (path / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / str(label) / f"{index:05d}.png")
    return path


def write_idx(path: Path, values: np.ndarray) -> Path:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_idx_pair(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, ending: str = "") -> Path:
    write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)
    return write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)


def write_set(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    card = ModelCard("any", 10, (1, *images.shape[1:]), MNIST_MEAN, MNIST_STD).to_json()
    synthetic = SyntheticSet.create(folder, {"card": card, "shards": [len(images)]})
    synthetic.write_shard(0, torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64)))
    return folder


def read(path: Path, card: ModelCard, batch_size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*open_images(path, card).batches(batch_size), strict=True)
    return torch.cat(images), torch.cat(labels)


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


@pytest.mark.parametrize(("channels", "wanted"), [(3, 4), (3, 2)])
def test_colours_that_no_rule_leads_to_are_refused_before_any_work(channels, wanted, tmp_path):
    images = np.zeros((4, channels, 32, 32), np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(4))
    with pytest.raises(BadInput, match=f"Images of {channels} channels cannot be shown to a model of {wanted}"):
        open_images(tmp_path / "images.npz", replace(CIFAR, input_size=(wanted, 32, 32)))


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


def test_a_named_images_file_takes_its_own_labels(tmp_path, grey_images):
    images, labels = grey_images
    write_idx_pair(tmp_path, "t10k", images, labels)
    train = write_idx_pair(tmp_path, "train", images[:6], labels[:6])
    assert len(open_images(train, GREY)) == 6


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


def test_images_of_the_right_size_stay_as_they_are():
    images = torch.rand(2, 3, 224, 224)
    assert torch.equal(fit(images, (3, 224, 224)), images)


def test_large_inputs_are_cut_from_the_centre_of_an_8_7_times_larger_image():
    """A 256x512 image: the shorter side becomes 256, the columns 144..368 remain."""
    columns = torch.arange(512.0).expand(1, 1, 256, 512)
    fitted = fit(columns, (1, 224, 224))
    assert torch.allclose(fitted[0, 0, 0], torch.arange(144.0, 368.0))


def test_a_photo_is_prepared_as_torchvision_prepares_it_to_one_step_of_a_byte(tmp_path, cifar10_test_file):
    with np.load(cifar10_test_file) as arrays:
        photo = Image.fromarray(arrays["images"][0].transpose(1, 2, 0)).resize((500, 375), Image.Resampling.BICUBIC)
    (tmp_path / "cat").mkdir()
    photo.save(tmp_path / "cat" / "photo.png")
    card = ModelCard("any", 1, (3, 224, 224), CIFAR_MEAN, CIFAR_STD)
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])(photo)
    assert (read(tmp_path, card)[0][0] - expected).abs().max() < 1.01 / 255


def test_small_inputs_take_the_whole_image():
    wide = torch.tensor([0.0, 1.0]).repeat_interleave(32).expand(1, 1, 32, 64)
    assert torch.allclose(fit(wide, (1, 32, 32))[0, 0, 0, [0, 31]], torch.tensor([0.0, 1.0]))


def test_colour_becomes_grey_by_luma():
    red_green_blue = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4)
    assert torch.allclose(fit(red_green_blue, (1, 4, 4))[:, 0, 0, 0], torch.tensor([0.299, 0.587, 0.114]))


def bad(tmp_path: Path, name: str, images: np.ndarray | None, labels: np.ndarray | None) -> Path:
    arrays = {key: value for key, value in (("images", images), ("labels", labels)) if value is not None}
    np.savez(tmp_path / name, **arrays)
    return tmp_path / name


ZEROS = np.zeros((4, 1, 8, 8), np.uint8)
LABELS = np.zeros(4, np.int64)


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


def test_a_synthetic_set_of_more_classes_is_refused(tmp_path, grey_images):
    folder = write_set(tmp_path / "set", *grey_images)
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["card"]["classes"] = 100
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="set has 100 classes, the model has 10"):
        open_images(folder, GREY)


def test_a_fitting_synthetic_set_is_handed_over_as_it_is(tmp_path, grey_images):
    assert isinstance(open_images(write_set(tmp_path / "set", *grey_images), GREY), SyntheticSet)
