"""The set on disk: what is written comes back, and what is damaged is named."""

from __future__ import annotations

import json

import pytest
import torch

from dfcompress.data.synthetic_set import SyntheticSet, as_float, as_stored
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard

CARD = ModelCard("own", 2, (1, 4, 4), (0.5,), (0.25,), ("a", "b")).to_json()


@pytest.fixture
def synthetic(tmp_path):
    made = SyntheticSet.create(tmp_path / "set", {"shards": [3, 2], "card": CARD})
    for shard, size in enumerate((3, 2)):
        images = torch.full((size, 1, 4, 4), 10 * shard, dtype=torch.uint8)
        made.write_shard(shard, images, torch.arange(size) + shard)
    return made


def test_what_is_written_comes_back(synthetic):
    again = SyntheticSet(synthetic.folder)
    assert len(again) == 5
    assert again.images.flatten(1)[:, 0].tolist() == [0, 0, 0, 10, 10]
    assert again.labels.tolist() == [0, 1, 2, 1, 2]
    assert again.class_names == ("a", "b")
    assert again.missing_shards() == []


def test_batches_are_shares_of_one_in_order(synthetic):
    images, labels = zip(*synthetic.batches(2), strict=True)
    assert [len(batch) for batch in images] == [2, 1, 2]
    assert torch.cat(labels).tolist() == [0, 1, 2, 1, 2]
    assert images[-1].max().item() == pytest.approx(10 / 255)


def test_a_missing_shard_is_named(synthetic):
    synthetic.shard_path(1).unlink()
    assert synthetic.missing_shards() == [1]
    with pytest.raises(BadInput, match=r"shard-00001.safetensors is missing.*--resume"):
        _ = synthetic.images


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_shard_is_named(synthetic, damage):
    path = synthetic.shard_path(0)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-5]
    else:
        content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"shard-00000.safetensors was cut short or altered"):
        synthetic.read_shard(0)


def test_a_folder_that_holds_no_set_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no dataset\.json"):
        SyntheticSet(tmp_path)


@pytest.mark.parametrize("text", ["not json", "{}", json.dumps({"schema": 99, "shards": []})])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(BadInput, match=r"dataset\.json"):
        SyntheticSet(tmp_path)


def test_storing_rounds_to_the_nearest_of_256_levels_or_keeps_half_precision():
    images = torch.tensor([0.0, 0.5, 1.0])
    assert as_stored(images, in_range=True).tolist() == [0, 128, 255]
    assert as_float(as_stored(images * 3, in_range=False)).tolist() == [0.0, 1.5, 3.0]
