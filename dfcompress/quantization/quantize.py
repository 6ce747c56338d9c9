"""`quantize`: a checkpoint in, a few-bit model out.

dfcompress.quantize("resnet20.pt", bits="4w4a")
dfcompress.quantize("resnet20.pt", bits="8w8a", data="images", training=None)
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from dfcompress.data.pool import Augmentation
from dfcompress.data.real import open_images
from dfcompress.device import Compute, resolve_device
from dfcompress.evaluation.result import Compressed, finished_before, hand_back, measured_on, same_classes
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, quantize_layers
from dfcompress.quantization.bits import bits_per_layer, parse_bits
from dfcompress.quantization.ranges import calibrate
from dfcompress.run import running
from dfcompress.synthesis.invert import learner
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.supply import ImageSupply, in_batches
from dfcompress.training.loop import Trainer, require_trainable
from dfcompress.training.objectives import kd
from dfcompress.training.settings import Training
from dfcompress.training.teaching import Distillation

FINETUNING = Training(
    steps=400,
    lr=0.01,
    batch_size=256,
    weight_decay=1e-4,
    freeze_batchnorm=True,
    augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
)
CALIBRATION_IMAGES = 1024


def quantize(
    checkpoint: str | Path | Classifier,
    *,
    bits: str = "4w4a",
    first_last_bits: int = 8,
    data: str | Path | None = None,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    training: Training | None = FINETUNING,
    temperature: float = 4.0,
    compute: Compute = Compute(),
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Compressed:
    """Quantize, calibrate and fine-tune a model on images made from itself (Haroush 2020, section 4).

    `bits` are those of weights and activations, `first_last_bits` those of the first and the last layer.
    Ranges are calibrated on up to 1,024 images and then frozen, as BatchNorm's statistics are; fine-tuning distills the
    float model into the quantized one, or is left out where `training` is None.
    `data` is a synthetic set, or real images; without it a set is made first and kept in `<output>/synthetic`.
    The folder `output` (default: `<checkpoint>-quantize`) holds the packed model (`model.safetensors`, `config.json`),
    `metrics.jsonl` and `run.json`. `eval_data` are real images that only report.
    Raises `BadInput` where the model, the bits or the data cannot be used.
    """
    teacher = as_classifier(checkpoint)
    student = copy.deepcopy(teacher)
    quantize_layers(student.network, bits_per_layer(teacher, parse_bits(bits), first_last_bits=first_last_bits))
    objectives = [kd(temperature)]
    supply = ImageSupply(
        teacher, data, synthesis, compute, learner=lambda recipe: learner(teacher, recipe, None, compute)
    )
    if training:
        require_trainable(student, training, compute, [len(supply)])
    options = {
        "teacher": teacher.identity(),
        "bits": bits,
        "first_last_bits": first_last_bits,
        "temperature": temperature,
        "data": data,
        "synthesis": supply.origin(),
        "training": asdict(training) if training else None,
        **asdict(compute),
    }
    if eval_data is not None:
        open_images(eval_data, teacher.card)  # A wrong path should not cost an hour of work.
    measure = measured_on(eval_data, teacher, compute.device)
    folder = Path(output or f"{teacher.name}-quantize")
    inputs = [teacher.path, data, eval_data, *supply.inputs]
    with running("quantize", folder, options, inputs=inputs, resume=resume, overwrite=overwrite) as run:
        if result := finished_before(run, student, measure):
            return result
        images = supply.gather(run.folder)
        target = resolve_device(compute.device)
        few = islice(in_batches(images.train), CALIBRATION_IMAGES // 256)
        calibrate(student.to(target), (batch.to(target) for batch, _ in few))
        trained = None
        if training and training.steps:
            teaching = Distillation(teacher, objectives)
            trained = Trainer(student, teaching, training, compute=compute, folder=run.folder).fit(images.train)
        freeze(student.network)
        return hand_back(run, student, [same_classes(teacher, images)], trained=trained, measure=measure)
