"""`quantize`: a checkpoint in, a few-bit model out.

dfcompress.quantize("resnet20.pt", bits="4w4a")
dfcompress.quantize("resnet20.pt", bits="8w8a", export="onnxruntime")     # faster, too
dfcompress.quantize("resnet20.pt", bits="autow8a", size_ratio=0.15, export="onnxruntime")
dfcompress.quantize("resnet44.pt", bits="4w4a", method="paper", calibration={"steps": 50}, data="images")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.device import is_cuda
from dfcompress.machine.execution import Compute
from dfcompress.machine.process import threads, threads_for
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, work_of
from dfcompress.models.fake_quantizers import can_be_quantized, freeze, is_quantized, learn_steps
from dfcompress.models.grids import Scheme
from dfcompress.quantization import Placement
from dfcompress.quantization.bits import Layers, RequestedBits, assign, parse_bits, parse_ends
from dfcompress.quantization.calibration import (
    BATCH,
    Calibrated,
    Calibration,
    calibrated,
    calibrated_on_noise,
)
from dfcompress.quantization.layer_report import REPORT, layer_report
from dfcompress.quantization.mixed_precision import require_reachable, with_widths
from dfcompress.quantization.placement import KERNELS_TAKE, place_grids
from dfcompress.quantization.reconstruction import Reconstructed, Reconstruction, reconstruct, units_of
from dfcompress.run import STATE, Run, write_json
from dfcompress.settings import AUTO
from dfcompress.synthesis.recipe import Recipe, Synthesis
from dfcompress.synthesis.transfer_set import TransferSet, TransferSetSource
from dfcompress.training.distiller import Distillation
from dfcompress.training.objectives import Objective
from dfcompress.training.settings import Training
from dfcompress.verbs import Finetuning, QuantizationMethod, Target
from dfcompress.verbs._co_training import CoTraining, co_training
from dfcompress.verbs._compression import Compression, Train
from dfcompress.verbs._finish import Compressed, evaluator
from dfcompress.verbs._plan import Outcome, Plan, Step, planned
from dfcompress.verbs._quantize_defaults import (
    FINETUNED_BY,
    FINETUNED_ON,
    usual_calibration,
    usual_images,
    usual_objectives,
    usual_rounding,
    usual_tuning,
)
from dfcompress.verbs.export import rehearse, require_kernels, require_packages

BITS, BLOCKS = f"bits{STATE}", f"blocks{STATE}"


@planned
def quantize(
    checkpoint: str | Path | Classifier,
    *,
    bits: str = "4w4a",
    first_last_bits: int | str | None = None,
    layer_bits: Mapping[str, str] | None = None,
    size_ratio: float | None = None,
    data: str | Path | None = None,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    second_recipe: str | None = AUTO,
    method: QuantizationMethod = "default",
    placement: Placement | None = None,
    calibration: Calibration | Mapping[str, Any] | None = None,
    finetune: Finetuning | None = None,
    rounding: Reconstruction | Mapping[str, Any] | None = None,
    training: Training | Reconstruction | Mapping[str, Any] | None = None,
    objectives: Mapping[str, float] | None = None,
    temperature: float = 4.0,
    export: Target | None = None,
    compute: Compute = Compute(),
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Plan[Compressed]:
    """Quantize, calibrate and fine-tune a model on images synthesized from the model.

    - `checkpoint`: the model in float.
    - `bits`: bits of weights and activations, such as `4w4a`. With `auto` as the bits of weights, each layer gets 2 to
      8 bits by its sensitivity on the images, so that the file is at most `size_ratio` times the model's size in fp32.
    - `first_last_bits`: bits of the first and the last layer, or `same` as all others. Default: 8, or `same` at 7w8a.
    - `layer_bits`: bits by pattern of layer names, or `float` to leave layers unquantized.
    - `data`: a synthetic set, the folder of a run with synthetic sets, or real images. Without it, images are
      synthesized as `synthesis` says (default recipe: `bns-inception`), half of them by `second_recipe` (None: all by
      one recipe; see `TransferSetSource`).
    - `method`: `default`, or `paper` for the default settings of Haroush et al. 2020.
    - `placement`: tensors that get grids. `all-tensors`: every tensor that int8 kernels read or write, which makes int8
      files faster; BatchNorms are folded and the model is only calibrated; default for 8w8a and 7w8a where no option
      requests fine-tuning. `layer-inputs`: the inputs of layers; default otherwise.
    - `calibration`: changes of single default settings, or a complete `Calibration`.
    - `finetune`: `blocks` learns the rounding block by block; `lsq` trains weights and steps to match the float model;
      `blocks+lsq` does both in this order; `kd` trains weights with frozen ranges; `none` only calibrates. Default:
      `blocks+lsq`, `none` for `all-tensors`, `kd` for the method `paper`.
    - `training`: changes of the settings of fine-tuning (`FINETUNING`), or complete settings; for `blocks+lsq`, of its
      second half. `rounding`: the same for the first half of `blocks+lsq` (`BEFORE_LSQ`).
    - `objectives`: weights of the distillation losses by name, for `lsq` and `kd`. `temperature`: number above 0 that
      divides the logits in these losses.
    - `export`: runtime for which `model.onnx` is written and checked, None for no file.
    - `eval_data`: real images on which accuracy is reported; they influence nothing else.
    - `output`: folder (default: `<checkpoint>-quantize`) of the packed model (`model.safetensors`, `config.json`),
      `quantization.json` (every layer), `metrics.jsonl` (not with `blocks` and `none`), `run.json` and the synthesized
      images. `resume`: continue an interrupted run there. `overwrite`: replace the contents of the folder.
    - `compute`: device, precision, compilation and seed.

    Raises `BadInput` where the model, the data or an option cannot be used, or the model cannot be exported as
    requested, and `DfcompressError` where the work fails.
    """
    teacher = _in_float(as_classifier(checkpoint))
    calibration = usual_calibration(method, calibration, input_size=teacher.card.input_size, target=export)
    wish = partial(
        wanted_bits,
        bits=bits,
        first_last_bits=first_last_bits,
        layer_bits=layer_bits,
        size_ratio=size_ratio,
        scheme=calibration.scheme,
    )
    # Settings of training request fine-tuning, and so does the paper's method.
    asked = training or rounding or objectives or method == "paper"
    trains = finetune or (FINETUNED_BY[method] if asked else None)
    why_not = partial(_why_not_all_tensors, trains, calibration.scheme)
    placement, reference, student, layers, wanted = place_grids(teacher, wish, why_not, placement, bits)
    finetune = finetune or FINETUNED_ON.get(placement) or FINETUNED_BY[method]
    tuning = usual_tuning(finetune, training, method=method, card=teacher.card)
    rounding = usual_rounding(finetune, rounding, tuning, small=teacher.card.small)
    terms = usual_objectives(teacher, finetune, objectives, temperature=temperature, seed=compute.seed)
    _require_exportable(export, student, wanted, calibration.scheme)
    if not data:
        synthesis, second_recipe = usual_images(
            method, teacher, synthesis, second_recipe, trains=bool(tuning or rounding)
        )
    plain = {name: each for name, each in wanted.items() if can_be_quantized(teacher.network.get_submodule(name))}
    competing = partial(competitor, teacher, plain, calibration, compute)
    source = TransferSetSource(teacher, data, synthesis, compute, second_recipe=second_recipe, competitor=competing)
    steps: dict[str, Step | None] = {
        "calibration": Calibrate(student, reference, calibration, wanted, size_ratio, compute),
        "rounding": _step(student, teacher, finetune, rounding, terms, compute),
        "training": _step(student, teacher, finetune, tuning, terms, compute),
    }
    options = {
        "teacher": teacher.identity(),
        "bits": {name: asdict(each) for name, each in wanted.items()},
        "size_ratio": size_ratio,
        "method": method,
        "placement": placement,
        "finetune": finetune,
        "objectives": {term.name: term.weight for term in terms},
        "temperature": temperature,
        "export": export,
        "data": data,
        "synthesis": source.origin(),
    }
    return Compression(
        verb="quantize",
        student=student,
        teachers=[teacher],
        outputs=[torch.arange(teacher.card.classes)],
        sources={"": source},
        measure=evaluator(eval_data, teacher, compute.device),
        compute=compute,
        complete=partial(_freeze, student, reference, layers, wanted),
        export=export,
    ).plan(steps, options, [data, eval_data], output, resume=resume, overwrite=overwrite)


def _in_float(teacher: Classifier) -> Classifier:
    if is_quantized(teacher.network):
        raise BadInput(f"{teacher.name} is quantized already.", "Give the model it was made from.")
    return teacher


@dataclass(frozen=True)
class Calibrate:
    """Calibrate the student: set bits, ranges and bias correction of every layer in `wanted`.

    `teacher`: the float network. `wanted`: requested bits by layer. `size_ratio`: largest size of the file as a share
    of the fp32 size, where bits are chosen automatically.
    """

    student: Classifier
    teacher: Classifier
    settings: Calibration
    wanted: Mapping[str, RequestedBits]
    size_ratio: float | None
    compute: Compute

    def predicted(self) -> None:
        """None: there is no estimate for this step."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Calibrated:
        """Calibrate on the images of the one set."""
        with threads(threads_for(BATCH * work_of(self.teacher))):
            return calibrated(
                self.student,
                self.teacher,
                self.wanted,
                sets[0].train,
                self.settings,
                self.compute,
                size_ratio=self.size_ratio,
                bits=run.folder / BITS,
            )


@dataclass(frozen=True)
class Round:
    """Learn the rounding of the calibrated student's weights, block by block, so that each block's output matches that
    block of the float network `teacher`.
    """

    student: Classifier
    teacher: Classifier
    settings: Reconstruction
    compute: Compute

    def predicted(self) -> None:
        """None: there is no estimate for this step."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Reconstructed:
        """Learn the rounding on the images of the one set."""
        state = run.folder / BLOCKS
        images, step = sets[0].train, 3.0 * self.settings.batch_size * work_of(self.teacher)
        with threads(threads_for(step / max(1, len(units_of(self.student))))):
            return reconstruct(
                self.student,
                self.teacher,
                images,
                self.settings,
                seed=self.compute.seed,
                state=state,
                capture=is_cuda(self.teacher.mean.device) and self.compute.compile != "off",
            )


def _step(
    student: Classifier,
    teacher: Classifier,
    finetune: Finetuning,
    settings: Training | Reconstruction | None,
    terms: Sequence[Objective],
    compute: Compute,
) -> Round | Train | None:
    """The step of fine-tuning with these settings, None where `settings` is None."""
    if settings is None:
        return None
    if isinstance(settings, Reconstruction):
        return Round(student, teacher, settings, compute)
    prepare = learn_steps if finetune != "kd" else None
    taught = partial(Distillation, teacher, terms)
    return Train(student, taught, settings, compute, repair=True, prepare=prepare)


def _freeze(
    student: Classifier,
    teacher: Classifier,
    layers: Layers,
    wanted: Mapping[str, RequestedBits],
    run: Run,
    found: Mapping[str, Outcome],
) -> None:
    """Turn the weights into integers, and write the report of every layer."""
    freeze(student.network)
    measured = found["calibration"]
    assert isinstance(measured, Calibrated)
    if world().is_main:
        left = layers.others | {name: "float" for name in layers.quantizable if name not in wanted}
        with threads(threads_for(len(measured.few) * work_of(teacher))):
            report = layer_report(
                student, teacher, measured.few, sensitivity=measured.sensitivity, left=left, unused=layers.unused
            )
        write_json(run.folder / REPORT, report)


def _why_not_all_tensors(
    finetune: Finetuning | None, scheme: Scheme, wanted: Mapping[str, RequestedBits]
) -> str | None:
    """The option that excludes grids on all tensors, because int8 kernels or a traced graph do not support it; None
    where there is none.
    """
    if other := next((name for name, each in wanted.items() if each not in KERNELS_TAKE), None):
        return f"other bits than 8w8a and 7w8a, as layer {other} has"
    if {each.weights for each in wanted.values()} & set(scheme.asymmetric):
        return "--weight-grid asymmetric"
    if finetune not in (None, "none"):
        return f"--finetune {finetune}"
    return None


def competitor(
    teacher: Classifier, wanted: Mapping[str, RequestedBits], calibration: Calibration, compute: Compute, recipe: Recipe
) -> CoTraining | None:
    """The student that a recipe's images compete with: the teacher quantized to the `wanted` bits, trained between the
    rounds of images as with `kd`. In Yin et al. 2020, too, images compete with the student of the application. None for
    recipes without a student.
    """
    if recipe.student_updates is None:
        return None
    student = calibrated_on_noise(teacher, wanted, calibration, seed=compute.seed)
    return co_training(teacher, recipe, student, compute, repair=True)


def wanted_bits(
    teacher: Classifier,
    layers: Sequence[str],
    bits: str,
    first_last_bits: int | str | None,
    layer_bits: Mapping[str, str] | None,
    size_ratio: float | None,
    scheme: Scheme,
) -> dict[str, RequestedBits]:
    """The requested bits of each of the `layers`; raises `BadInput` where the options contradict each other, or the
    size cannot be reached.
    """
    requested = parse_bits(bits)
    wanted = assign(layers, requested, ends=parse_ends(first_last_bits, requested), layer_bits=layer_bits or {})
    if requested.weights is None and all(each.weights for each in wanted.values()):
        raise BadInput("--bits auto has no layer left to choose for.", "Use --first-last-bits same, or fewer patterns.")
    require_reachable(teacher, wanted, size_ratio, scheme)
    return wanted


def _require_exportable(
    target: Target | None, teacher: Classifier, wanted: Mapping[str, RequestedBits], scheme: Scheme
) -> None:
    """Raise `BadInput` or `DfcompressError`, before any work, where the model cannot be exported at `wanted` bits."""
    if target is None:
        return
    require_packages()
    bits = {name: (each.weights, each.activations) for name, each in wanted.items()}
    require_kernels(target, bits, scheme)
    rehearse(teacher, with_widths(wanted, {}), scheme)
