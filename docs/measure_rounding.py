"""Milliseconds of a step of `quantize --finetune blocks`, by unit.

    python docs/measure_rounding.py resnet20-12fca82f.th

4w8a, calibrated on noise, batches of 32, processor time on one thread; calibration and the passes around the steps are
left out.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch

import dfcompress
from dfcompress.models.fake_quantizers import can_be_quantized, quantize_layers
from dfcompress.quantization import reconstruction
from dfcompress.quantization.ranges import calibrate, fit_weights

BITS, IMAGES, STEPS = (4, 8), 256, (1, 41)
WARM_UP = 1  # Torch imports its compiler for the first optimiser.


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    teacher = dfcompress.load(parser.parse_args().model)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *teacher.card.input_size), dtype=torch.uint8)
    student = copy.deepcopy(teacher)
    layers = [name for name, module in student.network.named_modules() if can_be_quantized(module)]
    quantize_layers(student.network, dict.fromkeys(layers, BITS))
    fit_weights(student, rule="mse")
    calibrate(student, [images.float() / 255], rule="mse")
    lines = ["| unit | ms |", "|---|---|"]
    for unit in reconstruction.units_of(student):
        seconds = []
        for steps in (WARM_UP, *STEPS):
            twin, settings = copy.deepcopy(student), reconstruction.Reconstruction(steps=steps)
            started = time.process_time()
            reconstruction._reconstruct_unit(twin, teacher, unit, images, settings, seed=0, room=2**32)
            seconds.append(time.process_time() - started)
        lines.append(f"| {unit} | {1000 * (seconds[-1] - seconds[-2]) / (STEPS[1] - STEPS[0]):.1f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
