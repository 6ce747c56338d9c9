"""The file: what is refused, and that it comes back as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dfcompress.errors import BadInput
from dfcompress.models.checkpoint import load
from dfcompress.models.saving import save
from dfcompress.synthesis.records.record_file import Description, Record, beside


@pytest.fixture
def file(lenet, tmp_path):
    about = Description("bn-equivalent", ("conv1",), 5, (1,) * 10, lenet.identity()["sha256"])
    tensors = {"pixels.mean": torch.zeros(1), "pixels.std": torch.ones(1)}
    tensors |= {"mean.conv1": torch.randn(6), "var.conv1": torch.ones(6)}
    Record(about, tensors).save(tmp_path / "x.records.safetensors")
    return tmp_path / "x.records.safetensors"


def test_a_record_comes_back_as_it_was(file, lenet):
    record = Record.load(file, lenet)
    assert record.about.kind == "bn-equivalent"
    assert record.about.layers == ("conv1",)
    assert torch.equal(record.tensors["mean.conv1"], load_file(file)["mean.conv1"])
    assert record.pixels[0].shape == (1, 1, 1)


def test_other_weights_are_refused(file, lenet, hinton, tmp_path):
    lenet.network.conv1.weight.data += 1
    save(lenet, tmp_path / "other")
    with pytest.raises(BadInput, match="recorded from other weights"):
        Record.load(file, load(tmp_path / "other"))
    with pytest.raises(BadInput, match="recorded from other weights"):
        Record.load(file, hinton)


def altered(file, change_about=None, change_tensors=None):
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["dfcompress"])
    tensors = load_file(file)
    (change_about or (lambda _: None))(about)
    (change_tensors or (lambda _: None))(tensors)
    save_file(tensors, file, metadata={"dfcompress": json.dumps(about)})


@pytest.mark.parametrize(
    ("about", "tensors", "message"),
    [
        (lambda a: a.update(schema=2), None, "schema 2"),
        (lambda a: a.update(kind="none"), None, "not an activation record"),
        (lambda a: a.pop("layers"), None, "not an activation record"),
        (lambda a: a.update(class_counts=[1, 2]), None, "cannot be"),
        (lambda a: a.update(surprise=1), None, "not an activation record"),
        (lambda a: a.update(temperature=0.0), None, "cannot be"),
        (None, lambda t: t.pop("pixels.mean"), "has nothing as pixels.mean"),
        (None, lambda t: t["mean.conv1"].fill_(torch.nan), "NaN"),
    ],
)
def test_a_damaged_description_is_refused(about, tensors, message, file, lenet):
    altered(file, about, tensors)
    with pytest.raises(BadInput, match=message):
        Record.load(file, lenet)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_what_is_no_record_is_refused(content, file, lenet, tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(BadInput, match="not an activation record"):
        Record.load(path, lenet)
    with pytest.raises(BadInput, match="is not a file"):
        Record.load(tmp_path / "nowhere", lenet)
    with pytest.raises(BadInput, match="is not a file"):
        Record.load(tmp_path, lenet)


def test_the_place_of_a_record_is_beside_its_checkpoint(tmp_path):
    assert beside(tmp_path / "model.pt").name == "model.records.safetensors"
    assert beside(tmp_path) == tmp_path / "model.records.safetensors"
