"""Compress released image classifiers without the data they were trained on.

    import dfcompress

    model = dfcompress.load("resnet20.pt")
    asked = dfcompress.Synthesis(recipe="bns-inception", images=512, settings={"steps": 400})
    made = dfcompress.invert(model, output="images", synthesis=asked)
    small = dfcompress.quantize(model, bits="4w4a", data="images", output="resnet20-4w4a")
    print(made.bn_divergence, small.bytes_ratio, small.agreement)
    print(dfcompress.evaluate([model, small.checkpoint], data="test.npz").results[1].top1)
    network = small.load().network  # A torch.nn.Module.

Every verb of the command line is a function of the same name, and returns a result with typed fields; errors are raised
as `DfcompressError`. A type checker sees the type of every name.
Modules are imported when a name is first used: `import dfcompress` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfcompress.data.pool import Augmentation as Augmentation
    from dfcompress.errors import BadInput as BadInput
    from dfcompress.errors import DfcompressError as DfcompressError
    from dfcompress.errors import GateNotMet as GateNotMet
    from dfcompress.evaluation.normalisation import NormalisationCheck as NormalisationCheck
    from dfcompress.evaluation.onnx_check import Exported as Exported
    from dfcompress.evaluation.timing import Bench as Bench
    from dfcompress.machine.execution import Compute as Compute
    from dfcompress.models.card import ModelCard as ModelCard
    from dfcompress.models.checkpoint import load as load
    from dfcompress.models.classifier import Classifier as Classifier
    from dfcompress.quantization.calibration import Calibration as Calibration
    from dfcompress.quantization.reconstruction import Reconstruction as Reconstruction
    from dfcompress.synthesis.generators import Generator as Generator
    from dfcompress.synthesis.images import Pixels as Pixels
    from dfcompress.synthesis.losses import Loss as Loss
    from dfcompress.synthesis.recipe import Phase as Phase
    from dfcompress.synthesis.recipe import Recipe as Recipe
    from dfcompress.synthesis.recipe import StudentUpdates as StudentUpdates
    from dfcompress.synthesis.recipe import Synthesis as Synthesis
    from dfcompress.synthesis.records.accumulator import RecordSettings as RecordSettings
    from dfcompress.training.settings import Training as Training
    from dfcompress.verbs._comparison import Comparison as Comparison
    from dfcompress.verbs._finish import Compressed as Compressed
    from dfcompress.verbs._gates import Gates as Gates
    from dfcompress.verbs._plan import Plan as Plan
    from dfcompress.verbs._plan import SynthesisEstimate as SynthesisEstimate
    from dfcompress.verbs.bench_generator import bench_generator as bench_generator
    from dfcompress.verbs.bench_step import bench_step as bench_step
    from dfcompress.verbs.bench_train import bench_train as bench_train
    from dfcompress.verbs.compare import compare as compare
    from dfcompress.verbs.demo import Demo as Demo
    from dfcompress.verbs.demo import demo as demo
    from dfcompress.verbs.distill import distill as distill
    from dfcompress.verbs.doctor import Diagnosis as Diagnosis
    from dfcompress.verbs.doctor import doctor as doctor
    from dfcompress.verbs.evaluate import Evaluation as Evaluation
    from dfcompress.verbs.evaluate import evaluate as evaluate
    from dfcompress.verbs.export import export as export
    from dfcompress.verbs.extend import extend as extend
    from dfcompress.verbs.inspect import Ability as Ability
    from dfcompress.verbs.inspect import Inspection as Inspection
    from dfcompress.verbs.inspect import inspect as inspect
    from dfcompress.verbs.invert import Inversion as Inversion
    from dfcompress.verbs.invert import invert as invert
    from dfcompress.verbs.merge import merge as merge
    from dfcompress.verbs.prune import prune as prune
    from dfcompress.verbs.quantize import quantize as quantize
    from dfcompress.verbs.record import Recorded as Recorded
    from dfcompress.verbs.record import record as record
    from dfcompress.verbs.report import Report as Report
    from dfcompress.verbs.report import report as report

    __version__: str

# The same imports, made at the first use of a name; tests/test_api.py compares the two lists. The verbs are in a folder
# of their own, because an imported submodule `dfcompress.distill` would replace the function of this name.
_MODULES = {
    "data.pool": ["Augmentation"],
    "machine.execution": ["Compute"],
    "errors": ["BadInput", "DfcompressError", "GateNotMet"],
    "evaluation.normalisation": ["NormalisationCheck"],
    "evaluation.onnx_check": ["Exported"],
    "evaluation.timing": ["Bench"],
    "models.card": ["ModelCard"],
    "models.checkpoint": ["load"],
    "models.classifier": ["Classifier"],
    "quantization.calibration": ["Calibration"],
    "quantization.reconstruction": ["Reconstruction"],
    "synthesis.generators": ["Generator"],
    "synthesis.images": ["Pixels"],
    "synthesis.losses": ["Loss"],
    "synthesis.recipe": ["Phase", "Recipe", "StudentUpdates", "Synthesis"],
    "synthesis.records.accumulator": ["RecordSettings"],
    "training.settings": ["Training"],
    "verbs._comparison": ["Comparison"],
    "verbs._finish": ["Compressed"],
    "verbs._gates": ["Gates"],
    "verbs._plan": ["Plan", "SynthesisEstimate"],
    "verbs.bench_generator": ["bench_generator"],
    "verbs.bench_step": ["bench_step"],
    "verbs.bench_train": ["bench_train"],
    "verbs.compare": ["compare"],
    "verbs.demo": ["Demo", "demo"],
    "verbs.distill": ["distill"],
    "verbs.doctor": ["Diagnosis", "doctor"],
    "verbs.evaluate": ["Evaluation", "evaluate"],
    "verbs.export": ["export"],
    "verbs.extend": ["extend"],
    "verbs.inspect": ["Ability", "Inspection", "inspect"],
    "verbs.invert": ["Inversion", "invert"],
    "verbs.merge": ["merge"],
    "verbs.prune": ["prune"],
    "verbs.quantize": ["quantize"],
    "verbs.record": ["Recorded", "record"],
    "verbs.report": ["Report", "report"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605


if not TYPE_CHECKING:  # If a type checker saw this function, it would accept every misspelt name.

    def __getattr__(name: str) -> object:
        """Import a public name at its first use, and store it in this module."""
        if name == "__version__":
            from importlib.metadata import version

            value = version("dfcompress")
        elif name in _HOME:
            value = getattr(importlib.import_module(f"dfcompress.{_HOME[name]}"), name)
        else:
            raise AttributeError(f"module 'dfcompress' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
