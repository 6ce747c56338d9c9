"""Which class each label of new images becomes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.verbs._new_images import open_new_images


def card(names=("cat", "dog")):
    return ModelCard("tiny", len(names or "ab"), (1, 8, 8), (0.5,), (0.25,), names)


def arrays(path, labels):
    np.savez(path, images=np.zeros((len(labels), 1, 8, 8), np.uint8), labels=np.array(labels))
    return path


def folder(path, *names):
    for number, name in enumerate(names):
        (path / name).mkdir(parents=True)
        Image.new("L", (8, 8), 50 * number).save(path / name / "a.png")
    return path


def test_folders_name_the_classes_and_known_names_stay_what_they_are(tmp_path):
    new = open_new_images(folder(tmp_path / "new", "ant", "dog", "bee"), card(), also_old=True)
    assert new.class_names == ("cat", "dog", "ant", "bee")
    assert new.labels.tolist() == [2, 3, 1]
    assert new.stored.shape == (3, 1, 8, 8)


def test_a_file_of_names_names_the_labels_or_orders_the_folders(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\nthree\n")
    new = open_new_images(arrays(tmp_path / "new.npz", [2, 0, 2]), card(), names_file=names)
    assert (new.class_names, new.labels.tolist()) == (("cat", "dog", "one", "three"), [3, 2, 3])
    new = open_new_images(folder(tmp_path / "new", "two", "one"), card(), names_file=names)
    assert (new.class_names, new.labels.tolist()) == (("cat", "dog", "one", "two"), [2, 3])


def test_labels_alone_are_names_beside_a_model_without_any(tmp_path):
    new = open_new_images(arrays(tmp_path / "new.npz", [5, 7]), card(None))
    assert (new.class_names, new.labels.tolist()) == (("0", "1", "5", "7"), [2, 3])


@pytest.mark.parametrize(
    ("names", "labels", "lines", "also_old", "message"),
    [
        (("cat", "dog"), [0, 1], "cat\nbee", False, "already knows 'cat'"),
        (None, [0, 1, 2], None, False, "already knows '0', '1'"),
        (("cat", "dog"), [0, 1], "cat\ndog", True, "no class that the model does not know"),
        (("cat", "dog"), [0, 2], "ant\nbee", False, "has the label 2, and there are 2 names"),
        (("cat", "dog"), [0, 1], "ant\nant", False, "has a name twice"),
        (("cat", "dog"), [2**40], None, True, None),
    ],
)
def test_what_fits_no_class_is_refused(names, labels, lines, also_old, message, tmp_path):
    """A label is never taken for a size: 2^40 is a name like others."""
    file = tmp_path / "names.txt"
    file.write_text(lines or "")
    data, given = arrays(tmp_path / "new.npz", labels), file if lines else None
    if message is None:
        labels = open_new_images(data, card(names), names_file=given, also_old=also_old).labels
        assert torch.equal(labels, torch.tensor([2]))
        return
    with pytest.raises(BadInput, match=message):
        open_new_images(data, card(names), names_file=given, also_old=also_old)
