"""Cards of three input sizes, and functions that write images into files of every kind and read them back."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.models.card import CIFAR_MEAN, CIFAR_STD, MNIST_MEAN, MNIST_STD, ModelCard

CIFAR = ModelCard("any", 10, (3, 32, 32), CIFAR_MEAN, CIFAR_STD)
MNIST = ModelCard("any", 10, (1, 32, 32), MNIST_MEAN, MNIST_STD)
GREY = ModelCard("any", 10, (1, 8, 8), MNIST_MEAN, MNIST_STD)


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
