"""`doctor`: properties of this machine, and the features of dfcompress that work on it.

dfcompress.doctor().to_json()
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from dfcompress.machine.compiling import NEEDED_TO_COMPILE, compiler, missing_to_compile
from dfcompress.machine.device import cuda_devices, precision_name, processor_name, resolve_device, resolve_precision
from dfcompress.training.optimizers import probe
from dfcompress.verbs._verb import verb

PACKAGES = (
    "dfcompress",
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "timm",
    "onnx",
    "onnxruntime",
    "torch-pruning",
    "jinja2",
    "matplotlib",
)


@dataclass(frozen=True)
class Diagnosis:
    """Properties of this machine.

    `versions`: of Python and packages, None for a package that is not installed. `processor`: name of the CPU. `cores`:
    its logical cores. `gpus`: name, compute capability and bytes of memory of each CUDA device. `device`, `precision`:
    the meaning of `auto`. `compiler`: the C++ compiler, None where there is none. `compiles`: whether `torch.compile`
    can work. `apex`: state of NVIDIA apex, with what was found and a remedy. `advice`: one sentence for each missing
    part that makes the work slower.
    """

    versions: dict[str, str | None]
    processor: str
    cores: int
    gpus: list[dict[str, Any]]
    device: str
    precision: str
    compiler: str | None
    compiles: bool
    apex: dict[str, str]
    advice: list[str]

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return asdict(self)


@verb
def doctor() -> Diagnosis:
    """Examine this machine. Nothing is changed, and only the test of NVIDIA apex computes anything."""
    target = resolve_device("auto")
    apex = probe(target)
    precision, missing, gpus = (
        precision_name(resolve_precision("auto", target)),
        missing_to_compile(target),
        cuda_devices(),
    )
    advice = []
    if not gpus:
        advice.append("No CUDA device: everything runs on the CPU.")
    if missing:
        remedy = f"Install {NEEDED_TO_COMPILE[missing]}."
        advice.append(f"torch.compile finds no {missing}: everything runs eagerly, which is slower. {remedy}")
    if precision == "fp32":
        advice.append("No bf16 instructions: convolutions run in fp32, which is slower.")
    if gpus and apex.remedy:
        advice.append(f"LAMB runs without fused kernels: {apex.found}. {apex.remedy}")
    return Diagnosis(
        {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        processor_name(torch.device("cpu")),
        os.cpu_count() or 1,
        gpus,
        str(target),
        precision,
        compiler(),
        missing is None,
        {"state": apex.state.value, "found": apex.found, "remedy": apex.remedy},
        advice,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
