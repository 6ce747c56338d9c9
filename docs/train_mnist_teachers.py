"""How the teachers of "Activation records" in docs/results.md were trained: on MNIST, 10 epochs, Adam 1e-3.

    python docs/train_mnist_teachers.py MNIST_FOLDER OUTPUT_FOLDER [ARCHITECTURE ...]

Lopes et al. 2017, section 4, batches of 64 as in their code. MNIST_FOLDER holds the four IDX files. HINTON
(`hinton_mlp`) takes three minutes on two cores, LeNet-5 (`lenet5`, `lenet5_bn`) less than one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.data.real import open_images
from dfcompress.evaluation.evaluate import evaluate
from dfcompress.models.architectures import find
from dfcompress.models.card import MNIST_MEAN, MNIST_STD, ModelCard
from dfcompress.models.checkpoint import save
from dfcompress.models.classifier import Classifier

EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 64, 1e-3
TEACHERS = ("hinton_mlp", "lenet5", "lenet5_bn")
DIGITS = tuple(str(digit) for digit in range(10))


def untrained(name: str) -> Classifier:
    """The architecture with its usual input, for ten digits."""
    architecture = find(name)
    assert architecture.size is not None
    size = (1, architecture.size, architecture.size)
    origin = dict.fromkeys(("architecture", "classes", "input_size", "mean", "std", "class_names"), "read")
    return Classifier(architecture.make(10, 1), ModelCard(name, 10, size, MNIST_MEAN, MNIST_STD, DIGITS, origin))


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


def main(mnist: Path, output: Path, names: list[str]) -> None:
    """Train, save, and count the right answers on the test images."""
    console.configure(console.NORMAL)
    for name in names or TEACHERS:
        torch.manual_seed(0)
        classifier = untrained(name)
        batches = open_images(mnist, classifier.card, part="train").batches(1000)
        train(classifier, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
        save(classifier.frozen(), output / name)
        console.result_json(evaluate([output / name], data=mnist).to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
