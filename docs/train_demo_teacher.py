"""How the teacher in `dfcompress/demo_files` was made: LeNet-5 with BatchNorm, trained on MNIST's training images.

    python docs/train_demo_teacher.py MNIST_FOLDER OUTPUT_FOLDER

MNIST_FOLDER holds the four IDX files, unpacked; it takes about two minutes on one core. Everything was chosen
beforehand, the last step's weights are kept, and the test images are looked at once, at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.data.real import open_images
from dfcompress.models.architectures import find
from dfcompress.models.card import MNIST_MEAN, MNIST_STD, ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.verbs.evaluate import evaluate

EPOCHS = 15
BATCH_SIZE = 128
LEARNING_RATE = 0.1
ROTATION_RADIANS, ZOOM, SHIFT_PIXELS = 0.15, 0.1, 2

FIELDS = ("architecture", "classes", "input_size", "mean", "std", "class_names")
CARD = ModelCard(
    architecture="lenet5_bn",
    classes=10,
    input_size=(1, 32, 32),
    mean=MNIST_MEAN,
    std=MNIST_STD,
    class_names=tuple(str(digit) for digit in range(10)),
    origin=dict.fromkeys(FIELDS, "read"),
)


def train(images: Tensor, labels: Tensor) -> Classifier:
    """SGD with Nesterov momentum and one cycle of the learning rate on slightly moved images."""
    classifier = Classifier(find(CARD.architecture).make(CARD.classes, CARD.input_size[0]), CARD)
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    with console.progress("step", steps) as progress:
        for step in range(steps):
            chosen = _epoch_order(step, len(images))
            loss = F.cross_entropy(classifier(moved(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(step + 1, loss=loss.item())
    return classifier.frozen()


def _epoch_order(step: int, count: int) -> Tensor:
    """The images of a step: every image at most once an epoch."""
    epoch, batch = divmod(step, count // BATCH_SIZE)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    return order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]


def moved(images: Tensor) -> Tensor:
    """Each image `(N, 1, 32, 32)` rotated, zoomed and shifted a little by its own amounts."""
    angle, zoom, right, down = (2 * torch.rand(4, len(images)) - 1).unbind()
    angle, zoom = angle * ROTATION_RADIANS, 1 + zoom * ZOOM
    right, down = (offset * 2 * SHIFT_PIXELS / images.shape[-1] for offset in (right, down))
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    rows = [torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main(mnist: Path, output: Path) -> None:
    """Train, save, and count the right answers on the test images."""
    console.configure(console.NORMAL)
    torch.manual_seed(0)
    batches = open_images(mnist / "train-images-idx3-ubyte", CARD).batches(1000)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    save(train(images, labels), output)
    console.result_json(evaluate([output], data=mnist).to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
