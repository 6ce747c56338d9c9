"""Small networks and images for tests of records: random weights are as good as trained ones for arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfcompress.models.architectures import find
from dfcompress.models.card import MNIST_MEAN, MNIST_STD, ModelCard
from dfcompress.models.checkpoint import load, save
from dfcompress.models.classifier import Classifier

IMAGES = 300


def untrained(architecture, size, seed=0):
    torch.manual_seed(seed)
    card = ModelCard(architecture, 10, (1, size, size), MNIST_MEAN, MNIST_STD)
    return Classifier(find(architecture).make(10, 1), card).frozen()


@pytest.fixture(scope="session")
def lenet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lenet")
    save(untrained("lenet5", 32), folder)
    return folder


@pytest.fixture
def lenet(lenet_folder):
    """LeNet-5 without BatchNorm, from a file."""
    return load(lenet_folder)


@pytest.fixture
def hinton():
    """The MLP with dropout, 784-1200-1200-10."""
    return untrained("hinton_mlp", 28)


@pytest.fixture(scope="session")
def images_file(tmp_path_factory):
    """300 smooth random images, 30 a class."""
    random = np.random.default_rng(0)
    noise = torch.from_numpy(random.random((IMAGES, 1, 8, 8), dtype=np.float32))
    images = torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear")
    path = tmp_path_factory.mktemp("images") / "train.npz"
    np.savez(path, images=(images * 255).byte().numpy(), labels=np.arange(IMAGES) % 10)
    return path
