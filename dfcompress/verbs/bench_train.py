"""`bench train`: time one step of distillation against a plain PyTorch loop, optimisation by optimisation."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dfcompress.data.pool import Augmentation
from dfcompress.data.synthetic_set import as_stored
from dfcompress.errors import BadInput
from dfcompress.evaluation.timing import Bench, Step, interleaved, row
from dfcompress.machine.compiling import STEPS_BEFORE_CAPTURE, can_compile
from dfcompress.machine.device import precision_name, processor_name, resolve_device, resolve_precision
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.randomness import generator
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import Trainer
from dfcompress.training.objectives import Prediction, kd
from dfcompress.training.settings import Training
from dfcompress.training.student import make_student
from dfcompress.verbs._verb import verb

WORKERS = 2
BATCHES_IN_SET = 16
SHIFT = 4
TEMPERATURE = 4.0
WARM_UP = STEPS_BEFORE_CAPTURE + 2


@verb
def bench_train(
    checkpoint: str | Path | Classifier,
    *,
    student: str = "half",
    batch_size: int = 128,
    rounds: int = 7,
    compute: Compute = Compute(),
) -> Bench:
    """Time one step of distillation in several implementations, the rows of the result; their rounds are interleaved.

    `checkpoint`: the teacher. `student`: architecture of the student (`half`: the teacher's with half the channels).
    `batch_size`: number of images, at least 2. `rounds`: number of timed steps of each row. `compute`: device,
    precision, compilation and seed. The images are noise.

    - `plain`: a loop written by hand: a DataLoader with two workers reads, shifts and mirrors PNG files; fp32; the
      teacher runs in every step, and the loss is read back.
    - `+pool`: the `Trainer` in fp32, eager, with images stored and augmented on the device.
    - `+compiled`: the same compiled, and on CUDA replayed as one graph. `+bf16`: the same in bf16, where this is the
      precision.
    - `+cached`: the last row without augmentation; the teacher's outputs are computed once for each image.

    Raises `BadInput` where the student does not fit the teacher, images have neither 1 nor 3 channels, or the batch has
    one image.
    """
    teacher = as_classifier(checkpoint)
    if teacher.card.input_size[0] not in (1, 3):
        raise BadInput("The plain loop reads PNG files, grey or in colour.", "Give a model for such images.")
    if batch_size < 2:
        raise BadInput("Batches of one image cannot train BatchNorm.", "Use --batch-size 2 or more.")
    student_model, _ = make_student(student, teacher.card, seed=compute.seed)
    target = resolve_device(compute.device)
    precision = precision_name(resolve_precision(compute.precision, target))
    compiled = compute.compile != "off" and can_compile(target)
    size = (BATCHES_IN_SET * batch_size, *teacher.card.input_size)
    images = as_stored(torch.rand(size, generator=generator("noise", compute.seed)), in_range=True)

    fastest = replace(compute, precision="fp32", compile="off")
    rows = {"+pool": fastest}
    if compiled:
        rows["+compiled"] = fastest = replace(fastest, compile="on")
    if precision != "fp32":
        rows["+" + precision] = fastest = replace(fastest, precision=precision)
    # Enough steps that caching the teacher's outputs pays.
    changing = Training(
        steps=10**6, lr=0.1, batch_size=batch_size, augmentation=Augmentation(shift=SHIFT, flip=True)
    ).suiting(teacher.card.input_size)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = stack.enter_context(closing(_files(images, folder, batch_size)))
        steps: dict[str, Step] = {"plain": _plain(teacher, student_model, files, changing, target)}
        for name, way in rows.items():
            steps[name] = _ours(stack, teacher, student_model, images, changing, way)
        steps["+cached"] = _ours(
            stack, teacher, student_model, images, replace(changing, augmentation=Augmentation()), fastest
        )
        times = interleaved(steps, rounds=rounds, warm_up=WARM_UP, target=target)
    measured = [row(name, seconds, batch_size) for name, seconds in times.items()]
    return Bench(measured, batch_size, rounds, processor_name(target))


def _ours(
    stack: ExitStack, teacher: Classifier, student: Classifier, images: Tensor, training: Training, compute: Compute
) -> Step:
    distiller = Distillation(copy.deepcopy(teacher), [kd(TEMPERATURE)])
    trainer = Trainer(copy.deepcopy(student), distiller, training, compute=compute, alone=True)
    return stack.enter_context(trainer.ready(images)).take


def _plain(
    teacher: Classifier, student: Classifier, batches: Iterator[Tensor], training: Training, target: torch.device
) -> Step:
    """A training loop on image files, as one writes it by hand."""
    student, teacher = copy.deepcopy(student).to(target).train(), copy.deepcopy(teacher).to(target).eval()
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=True,
    )
    objective = kd(TEMPERATURE)

    def step() -> float:
        shown = next(batches).to(target)
        with torch.no_grad():
            teacher_logits = teacher(shown)
        loss = objective.value(Prediction(student(shown)), Prediction(teacher_logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _files(images: Tensor, folder: Path, batch_size: int) -> Generator[Tensor]:
    """Endless batches of PNG files, read and augmented by torchvision."""
    (folder / "images").mkdir()
    channels, *size = images.shape[1:]
    for number, image in enumerate(images):
        pixels = image.permute(1, 2, 0).squeeze(2).numpy() if channels == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    changes = [v2.ToImage(), v2.RandomCrop(size, padding=SHIFT)]
    changes += [v2.RandomHorizontalFlip()] if channels > 1 else []  # The Trainer does not mirror grey images either.
    colours = [v2.Grayscale()] if channels == 1 else []
    files = ImageFolder(folder, v2.Compose([*changes, *colours, v2.ToDtype(torch.float32, scale=True)]))
    loader = DataLoader(files, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True)
    while True:
        for shown, _ in loader:
            yield shown
