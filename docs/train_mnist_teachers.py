"""How the MNIST teachers of docs/results were trained: 10 epochs, Adam 1e-3.

    python docs/train_mnist_teachers.py MNIST_FOLDER OUTPUT_FOLDER [[PREFIX:]ARCHITECTURE[-DIGITS] ...]

Lopes et al. 2017, section 4, batches of 64 as in their code. MNIST_FOLDER holds the four IDX files of MNIST, or of
Fashion-MNIST. `lenet5_bn-01234` is a teacher of five digits alone; `fashion:lenet5_bn` names its classes fashion-0 and
so on. HINTON (`hinton_mlp`) takes three minutes on two cores, LeNet-5 (`lenet5`, `lenet5_bn`) less than one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.data.image_source import Part
from dfcompress.data.real import open_images
from dfcompress.models.architectures import find
from dfcompress.models.card import MNIST_MEAN, MNIST_STD, ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save

EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 64, 1e-3
TEACHERS = ("hinton_mlp", "lenet5", "lenet5_bn")


def untrained(name: str, names: tuple[str, ...]) -> Classifier:
    """The architecture with its usual input, for classes of these names."""
    architecture = find(name)
    assert architecture.size is not None
    size, classes = (1, architecture.size, architecture.size), len(names)
    origin = dict.fromkeys(("architecture", "classes", "input_size", "mean", "std", "class_names"), "read")
    card = ModelCard(name, classes, size, MNIST_MEAN, MNIST_STD, names, origin)
    return Classifier(architecture.make(classes, 1), card)


def images_of(mnist: Path, part: Part, architecture: str, digits: list[int]) -> tuple[Tensor, Tensor]:
    """All images of these digits, in the size that the architecture takes, and their places among `digits`."""
    card = untrained(architecture, tuple("0123456789")).card
    images, labels = map(torch.cat, zip(*open_images(mnist, card, part=part).batches(1000), strict=True))
    chosen = torch.isin(labels, torch.tensor(digits))
    places = torch.full((10,), -1)
    places[digits] = torch.arange(len(digits))
    return images[chosen], places[labels[chosen]]


def train(classifier: Classifier, images: Tensor, labels: Tensor) -> None:
    """Plain cross-entropy; the last step's weights are kept."""
    optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
    with console.progress("epoch", EPOCHS) as progress:
        for epoch in range(EPOCHS):
            for chosen in torch.randperm(len(images)).split(BATCH_SIZE):
                loss = F.cross_entropy(classifier(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            progress.update(epoch + 1, loss=loss.item())


def main(mnist: Path, output: Path, specs: list[str]) -> None:
    """Train, save, and count the right answers on the test images of these digits."""
    console.configure(console.NORMAL)
    for spec in specs or TEACHERS:
        before, colon, name = spec.rpartition(":")
        prefix = f"{before}-" if colon else ""
        architecture, _, of = name.partition("-")
        digits = [int(digit) for digit in of or "0123456789"]
        images, labels = images_of(mnist, "train", architecture, digits)
        torch.manual_seed(0)
        classifier = untrained(architecture, tuple(f"{prefix}{digit}" for digit in digits))
        train(classifier, images, labels)
        save(classifier.frozen(), output / f"{prefix}{name}")
        images, labels = images_of(mnist, "test", architecture, digits)
        with torch.no_grad():
            right = (classifier(images).argmax(1) == labels).sum()
        console.result(f"{output / f'{prefix}{name}'}: {right} of {len(labels)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
