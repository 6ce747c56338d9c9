"""`bench generator`: time one round of a generator and a student that train against each other, and the plain loop."""

from __future__ import annotations

import copy
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.batches import BatchSource
from dfcompress.data.pool import Augmentation
from dfcompress.errors import BadInput
from dfcompress.evaluation.timing import Bench, Step, interleaved, row
from dfcompress.machine.compiling import STEPS_BEFORE_CAPTURE, can_compile
from dfcompress.machine.device import is_cuda, precision_name, processor_name, resolve_device, resolve_precision
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.models.hooks import hook_inputs
from dfcompress.models.statistics import named_statistics_layers, require_statistics
from dfcompress.synthesis.live import LiveSource
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.spec import resolve
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import Trainer
from dfcompress.training.objectives import kd
from dfcompress.training.settings import Training
from dfcompress.training.student import make_student
from dfcompress.verbs._verb import verb

RECIPE, PRESET = "dfq", "paper-cifar10"
# Values of that preset.
STUDENT_STEPS, TEMPERATURE, LATENT = 10, 20.0, 256


@verb
def bench_generator(
    checkpoint: str | Path | Classifier,
    *,
    student: str = "half",
    batch_size: int = 256,
    rounds: int = 3,
    compute: Compute = Compute(),
) -> Bench:
    """Time one round of DFQ in several implementations, the rows of the result; their rounds are interleaved.

    A round is one step of the generator and ten steps of the student, each on new images. `checkpoint`: the teacher,
    with BatchNorm statistics. `student`: architecture of the student (`half`: the teacher's with half the channels).
    `batch_size`: number of images in a step, at least 2. `rounds`: number of timed rounds of each row. `compute`:
    device, precision, compilation and seed.

    - `published`: the loop of the published code, written from the formulas: forward hooks in every pass of the
      teacher, gradients of all weights, and convolutions of the generator's feature maps after upsampling.
    - `published-bf16`: the same under bf16 autocast.
    - `+live`: the round as `distill --recipe dfq` runs it, in fp32 and eager.
    - `ours`: the same in the requested precision, compiled where possible.

    Raises `BadInput` where the model has no BatchNorm statistics, the student does not fit, images have more than 64
    pixels a side or sides that are not multiples of 4, or the batch has one image.
    """
    teacher = as_classifier(checkpoint)
    require_statistics(teacher)
    _, height, width = teacher.card.input_size
    if height % 4 or width % 4 or not teacher.card.small:
        raise BadInput(
            f"The plain loop's generator does not make images of {height} × {width} pixels.",
            "Give a model for images of up to 64 pixels, their sides multiples of 4.",
        )
    if batch_size < 2:
        raise BadInput("Batches of one image cannot train BatchNorm.", "Use --batch-size 2 or more.")
    student_model, _ = make_student(student, teacher.card, seed=compute.seed)
    target = resolve_device(compute.device)
    precision = precision_name(resolve_precision(compute.precision, target))
    eager = compute.compile == "off" or not can_compile(target)
    with ExitStack() as stack:
        steps = {
            "published": _published(teacher, student_model, batch_size, target, torch.float32),
            "published-bf16": _published(teacher, student_model, batch_size, target, torch.bfloat16),
        }
        for name, way in (
            ("+live", replace(compute, precision="fp32", compile="off")),
            ("ours", replace(compute, precision=precision, compile="off" if eager else "on")),
        ):
            steps[name] = _ours(stack, teacher, student_model, batch_size, way)
        # Networks are compiled in the first round; the step of the generator is captured some rounds later.
        warm_up = STEPS_BEFORE_CAPTURE + 1 if is_cuda(target) else 1
        times = interleaved(steps, rounds=rounds, warm_up=warm_up, target=target)
    shown = batch_size * (1 + STUDENT_STEPS)
    measured = [row(name, seconds, shown) for name, seconds in times.items()]
    return Bench(measured, batch_size, rounds, processor_name(target))


def _ours(stack: ExitStack, teacher: Classifier, student: Classifier, batch_size: int, compute: Compute) -> Step:
    learning = copy.deepcopy(student)
    sizes = {"batch_size": batch_size, "student_batch_size": batch_size, "student_steps": STUDENT_STEPS}
    spec = resolve(copy.deepcopy(teacher), Synthesis(recipe=RECIPE, preset=PRESET, settings=sizes, images=batch_size))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    training = Training(steps=10**6, lr=0.1, batch_size=batch_size, augmentation=Augmentation())

    def pool(images: Tensor, labels: Tensor) -> BatchSource:
        return training.pool(images, labels=[labels], seed=compute.seed)

    source = LiveSource(spec, folder, compute, learning, batch_size=batch_size, pool=pool)
    trainer = Trainer(
        learning, Distillation(copy.deepcopy(teacher), [kd(TEMPERATURE)]), training, compute=compute, alone=True
    )
    steps = stack.enter_context(trainer.ready(source))

    def step() -> None:
        for _ in range(STUDENT_STEPS):
            steps.take()

    return step


def _published(
    teacher: Classifier, student: Classifier, batch_size: int, target: torch.device, precision: torch.dtype
) -> Step:
    """The published procedure, written anew; bf16 by autocast, as its users run it."""
    channels, height, width = teacher.card.input_size
    teacher, student = copy.deepcopy(teacher).to(target).eval(), copy.deepcopy(student).to(target).train()
    network = nn.Sequential(
        nn.Linear(LATENT, 128 * (height // 4) * (width // 4)),
        nn.Unflatten(1, (128, height // 4, width // 4)),
        nn.BatchNorm2d(128),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(128, 128, 3, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(128, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, channels, 3, padding=1),
        nn.Sigmoid(),
    ).to(target)
    of_generator = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.999))
    of_student = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    layers = named_statistics_layers(teacher.network)
    distances: list[Tensor] = []

    def record(name: str, features: Tensor) -> None:
        values = features.float().transpose(0, 1).flatten(1)
        mean, var = layers[name].get_buffer("running_mean"), layers[name].get_buffer("running_var")
        distances.append(torch.norm(mean - values.mean(1)) + torch.norm(var - values.var(1, correction=0)))

    hook_inputs(teacher.network, layers, record)

    def divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
        target, answer = (logits.float() / temperature for logits in (teacher_logits, student_logits))
        return F.kl_div(answer.log_softmax(1), target.softmax(1), reduction="batchmean") * temperature**2

    def step() -> None:
        low = torch.autocast(target.type, torch.bfloat16, enabled=precision == torch.bfloat16)
        distances.clear()
        with low:
            images = network(torch.randn(batch_size, LATENT, device=target))
            teacher_logits, student_logits = teacher(images), student(images)
        mean = teacher_logits.float().softmax(1).mean(0)
        balance = (mean * mean.log()).sum()
        certain = F.cross_entropy(teacher_logits.float(), teacher_logits.argmax(1))
        loss = torch.stack(distances).sum() + certain + 20.0 * balance - divergence(teacher_logits, student_logits, 1.0)
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        for _ in range(STUDENT_STEPS):
            distances.clear()
            with low:
                with torch.no_grad():
                    images = network(torch.randn(batch_size, LATENT, device=target))
                    teacher_logits = teacher(images)
                student_logits = student(images)
            of_student.zero_grad()
            divergence(teacher_logits, student_logits, TEMPERATURE).backward()
            of_student.step()

    return step
