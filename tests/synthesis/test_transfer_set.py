"""The transfer set: labels stay beside images, and images stay as they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from largest_float import LargestFloat

import dfcompress
from dfcompress.data.synthetic_set import SyntheticSet, as_float
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.synthesis import transfer_set
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.transfer_set import TransferSetSource

DEMO = Path(dfcompress.__file__).parent / "demo_files"
COMPUTE = Compute(device="cpu", precision="fp32", compile="off", seed=1)


@pytest.fixture
def teacher():
    return load(DEMO)


def test_labels_of_a_synthetic_set_stay_beside_their_images(teacher, tmp_path):
    asked = Synthesis(images=48, settings={"steps": 1, "batch_size": 16}, classes=("2", "7"))
    gathered = TransferSetSource(teacher, None, asked, COMPUTE).gather(tmp_path)
    stored = SyntheticSet(tmp_path / "synthetic")
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(stored.images, stored.labels, strict=True)}
    images = torch.cat([gathered.train, gathered.held_out])
    found = torch.cat([gathered.train_labels, gathered.held_out_labels])
    assert [labels[image.numpy().tobytes()] for image in images] == found.tolist()
    assert set(found.tolist()) == {2, 7}
    assert (len(gathered.train), len(gathered.held_out)) == (45, 3)


def test_labels_of_real_images_are_theirs(teacher, tmp_path):
    """Each image's pixels are its label."""
    labels = np.arange(64) % 10
    images = np.broadcast_to(labels[:, None, None, None], (64, 1, 32, 32)).astype(np.uint8)
    np.savez(tmp_path / "real.npz", images=images, labels=labels)
    gathered = TransferSetSource(teacher, tmp_path / "real.npz", Synthesis(), COMPUTE).gather(tmp_path)
    assert gathered.train.dtype == torch.uint8
    assert gathered.train[:, 0, 0, 0].tolist() == gathered.train_labels.tolist()


def test_images_outside_of_the_pixels_range_stay_so_at_another_size(tmp_path):
    card = ModelCard("x", 10, (1, 16, 16), (0.5,), (0.25,)).to_json()
    bright = SyntheticSet.create(tmp_path / "bright", {"shards": [16], "card": card})
    bright.write_shard(0, torch.full((16, 1, 16, 16), 1.75).half(), torch.arange(16) % 10)
    gathered = TransferSetSource(load(DEMO), tmp_path / "bright", Synthesis(), COMPUTE).gather(tmp_path)
    assert gathered.train.shape[1:] == (1, 32, 32)
    assert gathered.train.dtype == torch.float16
    assert gathered.train.float().mean() == 1.75


def test_a_gathered_set_is_never_in_float_as_a_whole(tmp_path, monkeypatch):
    """Sets of bytes stay bytes; beside one of float16 they become float16, a few images at a time."""
    monkeypatch.setattr("dfcompress.data.synthetic_set.FILLED", 2)
    size = (3, 224, 224)
    card = {"card": ModelCard("x", 10, size, (0.5,) * 3, (0.25,) * 3).to_json()}
    kinds = {"bytes": torch.randint(0, 256, (4, *size), dtype=torch.uint8), "halves": torch.rand(4, *size).half()}
    sets = {name: SyntheticSet.create(tmp_path / name, {"shards": [4, 4], **card}) for name in kinds}
    for name, images in kinds.items():
        for shard in range(2):
            sets[name].write_shard(shard, images, torch.arange(4) + 4 * shard)
    with LargestFloat() as seen:
        images, labels = transfer_set._gathered([sets["bytes"]])
    assert (images.dtype, seen.elements, labels.tolist()) == (torch.uint8, 0, list(range(8)))
    with LargestFloat() as seen:
        images, _ = transfer_set._gathered([sets["bytes"], sets["halves"]])
    assert images.dtype == torch.float16
    assert 0 < seen.elements <= 2 * 3 * 224 * 224
    expected = torch.cat([as_float(kinds[name]).half() for name in ("bytes", "bytes", "halves", "halves")])
    assert torch.equal(images, expected)
