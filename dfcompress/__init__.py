"""Compress released image classifiers without the data they were trained on.

    import dfcompress

    dfcompress.inspect("resnet20.pt")
    dfcompress.invert("resnet20.pt", output="images")
    dfcompress.quantize("resnet20.pt", bits="4w4a", data="images")

Every verb of the command line is a function of the same name, so that no module of the package's top may have it: an
imported submodule takes the place of the attribute.
Nothing is imported before it is used: `import dfcompress` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Augmentation": "data.pool",
    "Compute": "device",
    "Calibration": "quantization.calibration",
    "Classifier": "models.classifier",
    "Gates": "verbs._gates",
    "RecordSettings": "synthesis.records.accumulator",
    "ModelCard": "models.card",
    "Reconstruction": "quantization.reconstruction",
    "Synthesis": "synthesis.recipe",
    "Training": "training.settings",
    "bench_step": "verbs.bench_step",
    "bench_train": "verbs.bench_train",
    "demo": "verbs.demo",
    "distill": "verbs.distill",
    "doctor": "verbs.doctor",
    "evaluate": "verbs.evaluate",
    "export": "verbs.export",
    "inspect": "verbs.inspect",
    "invert": "verbs.invert",
    "load": "models.checkpoint",
    "merge": "verbs.merge",
    "quantize": "verbs.quantize",
    "record": "verbs.record",
}

__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dfcompress")
    if name not in _HOME:
        raise AttributeError(f"module 'dfcompress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dfcompress.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
