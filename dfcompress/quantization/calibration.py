"""Calibration: a copy of a float network gets bits, ranges and corrected statistics, and so becomes quantized."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.arguments import require_fields
from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.data.synthetic_set import as_float
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.device import resolve_device
from dfcompress.machine.execution import Compute
from dfcompress.machine.memory import images_at_once
from dfcompress.models.channel_statistics import images_for_statistics
from dfcompress.models.classifier import Classifier, bytes_a_pass, images_a_pass
from dfcompress.models.fake_quantizers import quantize_layers
from dfcompress.models.grids import WIDTHS, Scheme
from dfcompress.quantization import WeightGridKind
from dfcompress.quantization.bias_correction import correct
from dfcompress.quantization.bits import Bits, RequestedBits
from dfcompress.quantization.mixed_precision import choose_bits, images_to_measure_on, sensitivities, with_widths
from dfcompress.quantization.ranges import calibrate, fit_weights, require_rules
from dfcompress.randomness import generator, seed_of
from dfcompress.run import STATE, write_json

BATCH, STEPS = 256, 16
CORRECTED_ON = f"correction{STATE}"
PIXELS = STEPS * BATCH * 64**2
NOISE, UNCHOSEN = 64, 4
# The bits at which weights have asymmetric grids. `auto` uses these where their one additional value pays. Correct of
# 1,000 training images, ResNet-20 with the same bits in all layers, calibrated only (999 in float): at 2w4a 652 with
# symmetric and 743 with asymmetric grids; at 3w4a 922 and 947; at 4w4a 974 and 972.
# TensorRT takes symmetric grids of 8 bits alone.
ASYMMETRIC: Mapping[WeightGridKind, Collection[int]] = {"auto": (2, 3), "symmetric": (), "asymmetric": WIDTHS}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Settings of the calibration. `inputs` and `weights` name the rules (modules of the folder `observers`) for the
    ranges of layer inputs and of weights.

    Ranges of inputs are measured on `steps` batches of 256 shifted and flipped images. The images are drawn with
    `replacement`, or else every image is used once before any is used again. With `signed` the grids of activations
    have zero point 0. `weight_grid` decides at which bits the grids of weights have a zero point (`ASYMMETRIC`). With
    `correction` BatchNorms and biases are corrected for the shifts that quantization causes.
    """

    inputs: str = "mse"
    weights: str = "mse"
    steps: int = STEPS
    signed: bool = False
    correction: bool = True
    weight_grid: WeightGridKind = "auto"
    replacement: bool = False

    def __post_init__(self) -> None:
        """Raise `BadInput` for invalid settings."""
        require_fields(self)
        require_rules(self.inputs, self.weights)
        if self.steps < 1:
            raise BadInput("Calibration takes at least one batch of images.", "Use 16.")

    @property
    def scheme(self) -> Scheme:
        """The kinds of grids that these settings choose."""
        return Scheme(self.signed, ASYMMETRIC[self.weight_grid])


def usual_steps(input_size: tuple[int, int, int]) -> int:
    """The default number of batches on which ranges are measured: 16, or for images of more than 64 x 64 pixels as many
    as hold the pixels of 16 batches of 64 x 64 images, at least 1.
    """
    _, height, width = input_size
    return min(STEPS, max(1, PIXELS // (BATCH * height * width)))


class Calibrated(NamedTuple):
    """The result of a calibration: a `few` images `(N, C, H, W)` in [0, 1], the `sensitivity` of each layer on them in
    nats (see `sensitivities`), and the seconds that the calibration took.
    """

    few: Tensor
    sensitivity: dict[str, float]
    seconds: float


def calibrated(
    student: Classifier,
    teacher: Classifier,
    requested: Mapping[str, RequestedBits],
    images: Tensor,
    calibration: Calibration,
    compute: Compute,
    *,
    size_ratio: float | None,
    bits: Path,
) -> Calibrated:
    """Quantize the layers of `student` in place, each with its own bits and ranges.

    `images` are stored images `(N, C, H, W)`. The bits of all layers (see `choose_bits`) are saved to the file `bits`,
    and the number of images for the correction to a file beside it, so that a resume and all processes use the same.
    """
    started, target = time.perf_counter(), resolve_device(compute.device)
    teacher.to(target)
    # Synthetic images are sorted by recipe, and real images by class.
    mixed = images[torch.randperm(len(images), generator=generator("calibration", compute.seed))]
    few = as_float(mixed[: images_to_measure_on(teacher, requested, len(mixed))].to(target))
    bits_of_layers = _once(
        bits, lambda: choose_bits(teacher, requested, few, size_ratio=size_ratio, scheme=calibration.scheme)
    )
    chosen = {name: Bits(*each) for name, each in bits_of_layers.items()}
    quantize_layers(student.to(target).network, chosen, asymmetric=calibration.scheme.asymmetric)
    fit_weights(student, rule=calibration.weights)
    batches = calibration_batches(images.to(target), calibration, seed=compute.seed)
    fit = images_a_pass(student)
    with console.progress("calibration", calibration.steps) as progress:
        parts = (some for batch in _counted(batches, progress) for some in batch.split(fit))
        calibrate(student, parts, rule=calibration.inputs, signed=calibration.signed)
    sensitivity = sensitivities(student, few, list(chosen))
    if calibration.correction:
        shown = _once(bits.with_name(CORRECTED_ON), lambda: {"images": _images_to_correct_on(student, len(images))})
        correct(student, teacher, as_float(mixed[: shown["images"]].to(target)))
    return Calibrated(few, sensitivity, time.perf_counter() - started)


def calibration_batches(images: Tensor, calibration: Calibration, *, seed: int) -> Iterator[Tensor]:
    """The batches `(256, C, H, W)` in [0, 1] to calibrate on, made of stored `images` `(N, C, H, W)`."""
    augmentation = Augmentation(shift=4, flip=images.shape[1] > 1)
    if not calibration.replacement:
        pool = ImagePool(images, augmentation=augmentation, batch_size=BATCH, seed=seed)
        yield from (pool.batch(step).images for step in range(calibration.steps))
        return
    for step in range(calibration.steps):
        drawn = torch.randint(len(images), (BATCH,), generator=generator("calibration draw", seed, step))
        batch_seed = seed_of("calibration batch", seed, step)
        drawn_images = images[drawn.to(images.device)]
        yield ImagePool(drawn_images, augmentation=augmentation, batch_size=BATCH, seed=batch_seed).batch(0).images


def _counted(batches: Iterator[Tensor], progress: console.Progress) -> Iterator[Tensor]:
    """The batches; each counts as done when the next one is taken."""
    for number, batch in enumerate(batches, 1):
        yield batch
        progress.update(number)


def calibrated_on_noise(
    teacher: Classifier, requested: Mapping[str, RequestedBits], calibration: Calibration, *, seed: int
) -> Classifier:
    """A quantized copy of the teacher at the requested bits, for use before there are images: adaptive synthesis takes
    it as the student that images compete with.

    Ranges of inputs are measured on 64 images of normalised noise, N(0, 1). No statistics are corrected, and weights
    whose bits are still to be chosen have 4 bits.
    """
    student = copy.deepcopy(teacher)
    bits = with_widths(requested, dict.fromkeys(requested, UNCHOSEN))
    quantize_layers(student.network, bits, asymmetric=calibration.scheme.asymmetric)
    fit_weights(student, rule=calibration.weights)
    noise = torch.randn(NOISE, *teacher.card.input_size, generator=generator("noise", seed))
    shown = teacher.denormalise(noise.to(teacher.mean.device))
    calibrate(student, shown.split(images_a_pass(student)), rule=calibration.inputs, signed=calibration.signed)
    return student


def _images_to_correct_on(student: Classifier, available: int) -> int:
    """The number of images for the correction: enough for stable statistics, if so many fit into memory at once."""
    count = images_for_statistics(student.card.input_size, available)
    return images_at_once(count, bytes_a_pass(student), target=student.mean.device)


def _once(path: Path, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `choose`, stored in the file `path`, so that all processes and resumes use the same result:
    measurements may differ in their last bits, and so may the free memory.
    """
    if world().is_main and not path.exists():
        write_json(path, choose())
    shared: dict[str, Any] = world().broadcast(json.loads(path.read_text()) if world().is_main else None)
    return shared
