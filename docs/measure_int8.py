"""The table of int8 files in docs/results/quantize.md: ONNX in fp32, at 8w8a and at 7w8a, on one thread of a CPU.

    python docs/measure_int8.py resnet20.th torchvision:resnet18 torchvision:mobilenet_v2 [--images FOLDER] [--batch 64]

Networks are checkpoints, or architectures of torchvision with random weights, whose BatchNorms get the statistics of
random images. Grids are put on all tensors and calibrated by 16 images; files are asked with onnxruntime's default
options and with `session.x64quantprecision=1`, in turn: the least time of 7 rounds. `--images` is a real set, as
`evaluate` takes them; without it images are random, and answers of random weights to them are close calls. A row is
made for OpenVINO where that is installed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dfcompress import Classifier, ModelCard, load
from dfcompress.data.real import open_images
from dfcompress.evaluation.onnx_check import UNSATURATED
from dfcompress.models.architectures import named
from dfcompress.models.fake_quantizers import freeze, quantize_layers
from dfcompress.models.tensor_grids import as_kernels_compute, quantize_tensors
from dfcompress.quantization.bias_correction import correct
from dfcompress.quantization.bits import layers_of
from dfcompress.quantization.onnx import write_onnx
from dfcompress.quantization.ranges import calibrate, fit_weights

CALIBRATED, ASKED, ROUNDS = 16, 256, 7
Run = Callable[[np.ndarray], np.ndarray]


def network_of(spec: str, arch: str | None) -> Classifier:
    """A checkpoint, or torchvision's architecture with random weights and plausible statistics."""
    if not spec.startswith("torchvision:"):
        order = {"arch": arch, "match_by_order": True, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
        return load(spec, **(order if arch else {}))
    torch.manual_seed(0)
    network = named(spec.removeprefix("torchvision:")).make(1000, 3).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(4):
            network(torch.randn(16, 3, 224, 224) + torch.randn(16, 3, 1, 1))
    return Classifier(network, ModelCard(spec, 1000, (3, 224, 224), (0.45,) * 3, (0.25,) * 3)).frozen()


def int8(classifier: Classifier, images: Tensor, weights: int) -> Classifier:
    """The classifier with grids on all tensors, as `quantize --bits 8w8a` and `7w8a` make it."""
    reference = copy.deepcopy(classifier)
    as_kernels_compute(reference)
    student, layers = copy.deepcopy(reference), layers_of(reference).quantizable
    quantize_tensors(student, layers)
    quantize_layers(student.network, dict.fromkeys(layers, (weights, 8)))
    fit_weights(student, rule="mse")
    calibrate(student, images.split(CALIBRATED), rule="mse")
    correct(student, reference, images)
    freeze(student.network)
    return student


def in_onnxruntime(path: Path, option: str | None = None) -> Run:
    """The file with default options, but for the one thread and this one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if option:
        options.add_session_config_entry(option, "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def in_openvino(path: Path) -> Run:
    """The file as OpenVINO compiles it for one thread."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda images: compiled(images)[0]


RUNTIMES = {
    "onnxruntime": in_onnxruntime,
    "onnxruntime, unsaturated": partial(in_onnxruntime, option=UNSATURATED),
    "OpenVINO": in_openvino,
}


def milliseconds(runs: list[Run], images: np.ndarray) -> list[float]:
    """The least time of each, in rounds that take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS + 1):
        for run, found in zip(runs, times, strict=True):
            started = time.perf_counter()
            run(images)
            found.append(time.perf_counter() - started)
    return [1000 * min(found[1:]) for found in times]


def rows(spec: str, given: argparse.Namespace) -> list[str]:
    """A line of the table for each runtime."""
    classifier = network_of(spec, given.arch)
    size = classifier.card.input_size
    if given.images:
        source = open_images(given.images, classifier.card)
        images = torch.cat([some for some, _ in islice(source.batches(32), ASKED // 32)])
    else:
        coarse = torch.rand(ASKED // 4, 3, 7, 7, generator=torch.Generator().manual_seed(0))
        images = nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")
    lines = []
    for weights in (8, 7):
        student = int8(classifier, images[:CALIBRATED], weights)
        with torch.no_grad():
            expected = torch.cat([student(some) for some in images.split(32)]).argmax(1).numpy()
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"]
            write_onnx(classifier, files[0])
            write_onnx(student, files[1])
            for runtime, compiled in RUNTIMES.items():
                try:
                    fp32, quantized = (compiled(path) for path in files)
                except ImportError:
                    continue
                answers = np.concatenate([quantized(some.numpy()) for some in images.split(32)]).argmax(1)
                slow, fast = milliseconds([fp32, quantized], images[torch.arange(given.batch) % len(images)].numpy())
                equal = f"{(answers == expected).sum()} of {len(images)}"
                times = f"{slow:.1f} | {fast:.1f} | {slow / fast:.2f}"
                lines.append(f"| {spec} | {weights}w8a | {runtime} | {times} | {equal} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--arch", help="of a checkpoint whose names are another's, matched by order")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(
        "| network | bits | runtime | fp32, ms | int8, ms | times faster | equal answers |\n" + "|---" * 7 + "|\n"
    )
    for spec in given.networks:
        sys.stdout.write("\n".join(rows(spec, given)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
