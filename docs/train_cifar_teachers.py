"""How the CIFAR-10 teachers of docs/measure_cifar.py are trained: SGD 0.1 along a cosine, crops and flips.

    python docs/train_cifar_teachers.py CIFAR10_FOLDER OUTPUT_FOLDER [--epochs N] ARCHITECTURE[-CLASSES] ...

CIFAR10_FOLDER has `train` and `test`, a folder a class in each. `cifar_resnet18-01234` is a teacher of the first five
classes alone. Momentum 0.9, weight decay 5e-4, batches of 128, by default 200 epochs; the last step's weights are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import as_float, as_stored
from dfcompress.machine.device import has_cuda
from dfcompress.models.architectures import find
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 128, 0.1, 5e-4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
SIZE = (3, 32, 32)


def card_of(architecture: str, names: tuple[str, ...]) -> ModelCard:
    """The card of a teacher of these classes."""
    origin = dict.fromkeys(("architecture", "classes", "input_size", "mean", "std", "class_names"), "read")
    return ModelCard(architecture, len(names), SIZE, MEAN, STD, names, origin)


def images_of(folder: Path, names: tuple[str, ...], chosen: list[int]) -> tuple[Tensor, Tensor]:
    """All images of the chosen classes as uint8, and their places among `chosen`."""
    parts = list(open_images(folder, card_of("cifar_resnet18", names)).batches(1000))
    images = torch.cat([as_stored(some, in_range=True) for some, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    places = torch.full((len(names),), -1)
    places[chosen] = torch.arange(len(chosen))
    kept = torch.isin(labels, torch.tensor(chosen))
    return images[kept], places[labels[kept]]


def train(classifier: Classifier, images: Tensor, labels: Tensor, epochs: int, device: str) -> None:
    """Cross-entropy under bf16 autocast."""
    classifier.to(device).to(memory_format=torch.channels_last).train()
    augmentation = Augmentation(shift=4, flip=True)
    pool = ImagePool(images, labels=[labels], augmentation=augmentation, batch_size=BATCH_SIZE)
    pool.to(torch.device(device))
    steps = epochs * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with console.progress("step", steps) as progress:
        for step in range(steps):
            batch = pool.batch(step)
            with torch.autocast(device, torch.bfloat16):
                logits = classifier(batch.images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                progress.update(step, loss=loss.item())
    classifier.to("cpu").to(memory_format=torch.contiguous_format)


def main() -> None:
    """Train, save, and count the right answers on the test images of these classes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("teachers", nargs="+")
    parser.add_argument("--epochs", type=int, default=200)
    given = parser.parse_args()
    console.configure(console.NORMAL)
    device = "cuda" if has_cuda() else "cpu"
    names = tuple(sorted(folder.name for folder in (given.cifar10 / "train").iterdir()))
    for spec in given.teachers:
        architecture, _, of = spec.partition("-")
        chosen = [int(digit) for digit in of or "0123456789"]
        torch.manual_seed(0)
        card = card_of(architecture, tuple(names[number] for number in chosen))
        classifier = Classifier(find(architecture).make(len(chosen), SIZE[0]), card)
        train(classifier, *images_of(given.cifar10 / "train", names, chosen), given.epochs, device)
        save(classifier.frozen(), given.output / spec)
        images, labels = images_of(given.cifar10 / "test", names, chosen)
        classifier.to(device)
        with torch.no_grad():
            answers = [classifier(as_float(some.to(device))).argmax(1).cpu() for some in images.split(1000)]
        console.result(f"{given.output / spec}: {(torch.cat(answers) == labels).sum()} of {len(labels)}")


if __name__ == "__main__":
    main()
