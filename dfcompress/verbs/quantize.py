"""`quantize`: a checkpoint in, a few-bit model out.

dfcompress.quantize("resnet20.pt", bits="4w4a")
dfcompress.quantize("resnet20.pt", bits="8w8a", export="onnxruntime")     # faster, too
dfcompress.quantize("resnet20.pt", bits="autow8a", size_ratio=0.15, export="onnxruntime")
dfcompress.quantize("resnet44.pt", bits="4w4a", method="paper", calibration={"steps": 50}, data="images")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfcompress.data.pool import Augmentation
from dfcompress.device import Compute, threads, threads_for
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, work_of
from dfcompress.models.fake_quantizers import LARGEST_BITS, Scheme, can_be_quantized, freeze, is_quantized, learn_steps
from dfcompress.models.stages import stages_of
from dfcompress.models.statistics import why_no_statistics
from dfcompress.quantization import Placement
from dfcompress.quantization.bits import USUAL_ENDS, Layers, RequestedBits, assign, parse_bits, parse_ends
from dfcompress.quantization.calibration import (
    BATCH,
    Calibrated,
    Calibration,
    calibrated,
    calibrated_on_noise,
    usual_steps,
)
from dfcompress.quantization.layer_report import REPORT, layer_report
from dfcompress.quantization.mixed_precision import require_reachable, with_widths
from dfcompress.quantization.placement import INT8, place_grids
from dfcompress.quantization.reconstruction import Reconstructed, Reconstruction, reconstruct, units_of
from dfcompress.run import STATE, Run, write_json
from dfcompress.settings import AUTO, replace_settings, with_defaults
from dfcompress.synthesis.recipe import Recipe, Synthesis
from dfcompress.synthesis.transfer_set import TransferSet, TransferSetSource
from dfcompress.training import OF_FEATURES
from dfcompress.training.distiller import Distillation
from dfcompress.training.objectives import Objective, make_objectives
from dfcompress.training.settings import Training
from dfcompress.verbs import Finetuning, QuantizationMethod, Target
from dfcompress.verbs._co_training import CoTraining, co_training
from dfcompress.verbs._compression import Compression, Train
from dfcompress.verbs._finish import Compressed, evaluator
from dfcompress.verbs._plan import Outcome, Plan, Step, planned
from dfcompress.verbs.export import rehearse, require_kernels, require_packages

AS_THE_PAPER = Augmentation(shift=4, flip=True, mixup=1.0)
KD = Training(steps=400, lr=0.01, batch_size=256, weight_decay=1e-4, freeze_batchnorm=True, augmentation=AS_THE_PAPER)
LSQ = replace(KD, lr=0.003)  # Steps are small numbers: a clipped gradient at 0.01 moves some too far.
# `lsq` is of Esser et al. 2020, `kd` of Haroush et al. 2020, section 4.2; BatchNorm's statistics stay as corrected.
FINETUNING: Mapping[Finetuning, Training | Reconstruction | None] = {
    "blocks+lsq": LSQ,
    "lsq": LSQ,
    "blocks": Reconstruction(),
    "kd": KD,
    "none": None,
}
BEFORE_LSQ = Reconstruction(steps=300, lr=0.03)
# Above 64 pixels, where an image costs a hundred times as much: 3,200 of them in each half, at a lower rate for batches
# an eighth as large.
LARGE_LSQ, LARGE_BEFORE_LSQ = replace(LSQ, steps=100, batch_size=32, lr=0.001), replace(BEFORE_LSQ, steps=100)
OBJECTIVES: Mapping[Finetuning, Mapping[str, float]] = {
    "blocks+lsq": {"kd": 1.0, "feature": 10.0},
    "lsq": {"kd": 1.0, "feature": 10.0},
    "kd": {"kd": 1.0, "iq": 0.001},
}
# Haroush et al. 2020, section 4: weights are asymmetric and their ranges each channel's ends; ranges of inputs are the
# mean ends of chunks of 16 images, on 200 batches of 256 drawn with replacement; nothing is corrected; `kd` with the
# `iq` loss for 16,000 steps of 512 images (as ResNet-44 on CIFAR-10), or 44,000 of 256 where images have more than 64
# pixels a side (as ResNet-18 on ImageNet); images by `bns-inception` alone, preset `paper-cifar10`.
# Ours, where the paper says nothing: layers quantize their inputs and not their outputs; zero is on the grid of
# weights; ranges are seen through the float network and averaged plainly; temperature 4, SGD's rate 0.01, Nesterov
# momentum 0.9, decay 1e-4, warm-up for 5 % of the steps, the gradient's norm cut at 5, mixup from Beta(1, 1); crops are
# shifts by up to 4 pixels that repeat the edge. A batch has no more images than there are, and one image in sixteen is
# held out.
CALIBRATIONS: Mapping[QuantizationMethod, Calibration] = {
    "default": Calibration(),
    "paper": Calibration(
        inputs="minmax", weights="minmax", steps=200, correction=False, weight_grid="asymmetric", replacement=True
    ),
}
FINETUNED_BY: Mapping[QuantizationMethod, Finetuning] = {"default": "blocks+lsq", "paper": "kd"}
# ResNet-20, calibrated on 128 made images: 999 of 1,000 training images right, as many as in float.
FINETUNED_ON: Mapping[Placement, Finetuning] = {"all-tensors": "none"}
# Haroush et al. 2020, section 4.2: CIFAR's ResNet-44, and ImageNet's ResNet-18.
PAPER_KD, PAPER_KD_LARGE = replace(KD, steps=16_000, batch_size=512), replace(KD, steps=44_000)
RECIPE, PAPER_PRESET, IMAGES, LARGE_IMAGES = "bns-inception", "paper-cifar10", 2048, 128
ROUNDING_SETTING = "setting of rounding called"
BITS, BLOCKS = f"bits{STATE}", f"blocks{STATE}"


@planned
def quantize(
    checkpoint: str | Path | Classifier,
    *,
    bits: str = "4w4a",
    first_last_bits: int | str = USUAL_ENDS,
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
    """Quantize, calibrate and fine-tune a model on images made from itself; raises `BadInput` where it cannot.

    `bits` are those of weights and activations, `first_last_bits` those of the first and the last layer (`same`: as
    all others), `layer_bits` those of layers by name pattern, or `float`. With `bits="auto"` weights get 2 to 8 bits
    each, by what they cost on the images, so that the file is at most `size_ratio` of the model in fp32.
    `finetune`: `blocks` learns the rounding block by block, `lsq` trains weights and steps to follow the float model,
    `blocks+lsq` does the one after the other, `kd` trains the weights with ranges frozen, `none` only calibrates.
    `training` changes or replaces its settings (`FINETUNING`); of `blocks+lsq` these are the second half's, and
    `rounding` the first's (`BEFORE_LSQ`); `objectives` are followed. `method` sets all defaults: ours or the `paper`'s.
    `placement` says which tensors get grids: with `all-tensors` every one that kernels for integers read or write, so
    that int8 files are faster (BatchNorms folded, calibrated only; usual where all is 8w8a), else `layer-inputs`.
    `data` is a synthetic set, the folder of a run that made some, or real images; without it images are made first,
    usually by `bns-inception`, and half of them by `second_recipe` (see `TransferSetSource`).
    `export` also writes `model.onnx` for that runtime and checks it. The folder `output` (default:
    `<checkpoint>-quantize`) holds the packed model (`model.safetensors`, `config.json`), `quantization.json` (every
    layer), `metrics.jsonl` (but of `blocks`), `run.json` and the images made; on real `eval_data` it is only reported.
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
    # Settings of a training ask for one, and so does the paper's method.
    asked = training or rounding or objectives or method == "paper"
    trains = finetune or (FINETUNED_BY[method] if asked else None)
    why_not = partial(_why_not_all_tensors, trains, calibration.scheme)
    placement, reference, student, layers, wanted = place_grids(teacher, wish, why_not, placement, bits)
    finetune = finetune or FINETUNED_ON.get(placement) or FINETUNED_BY[method]
    tuning = usual_tuning(finetune, training, method=method, card=teacher.card)
    rounding = usual_rounding(finetune, rounding, tuning, small=teacher.card.small)
    terms = _objectives(teacher, finetune, objectives, temperature=temperature, seed=compute.seed)
    _require_exportable(export, student, wanted, calibration.scheme)
    if not data:
        synthesis, second_recipe = usual_images(method, teacher, synthesis, second_recipe)
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
    """Give every layer of the student that is `wanted` its bits, its ranges and its correction."""

    student: Classifier
    teacher: Classifier
    settings: Calibration
    wanted: Mapping[str, RequestedBits]
    size_ratio: float | None
    compute: Compute

    def predicted(self) -> None:
        """Nothing is known of it before."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Calibrated:
        """Calibrate on the one set."""
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
    """Learn the rounding of the calibrated student's weights, block by block."""

    student: Classifier
    teacher: Classifier
    settings: Reconstruction
    seed: int

    def predicted(self) -> None:
        """Nothing is known of it before."""

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Reconstructed:
        """Learn it on the one set."""
        state = run.folder / BLOCKS
        images, step = sets[0].train, 3.0 * self.settings.batch_size * work_of(self.teacher)
        with threads(threads_for(step / max(1, len(units_of(self.student))))):
            return reconstruct(self.student, self.teacher, images, self.settings, seed=self.seed, state=state)


def _step(
    student: Classifier,
    teacher: Classifier,
    finetune: Finetuning,
    settings: Training | Reconstruction | None,
    terms: Sequence[Objective],
    compute: Compute,
) -> Round | Train | None:
    """The part of fine-tuning that has these settings."""
    if settings is None:
        return None
    if isinstance(settings, Reconstruction):
        return Round(student, teacher, settings, compute.seed)
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
    """Turn weights into integers, and write what was done to each layer."""
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
    """What kernels for integers, or a network that is its graph, do not take."""
    if other := next((name for name, each in wanted.items() if each != INT8), None):
        return f"other bits than 8w8a, as layer {other} has"
    if LARGEST_BITS in scheme.asymmetric:
        return "--weight-grid asymmetric"
    if finetune not in (None, "none"):
        return f"--finetune {finetune}"
    return None


def competitor(
    teacher: Classifier, wanted: Mapping[str, RequestedBits], calibration: Calibration, compute: Compute, recipe: Recipe
) -> CoTraining | None:
    """The student that a recipe's images compete with: what quantization leaves of the teacher, repaired in its updates
    as by `kd` (Yin et al. 2020 let images compete with the student of the application).
    """
    if recipe.student_updates is None:
        return None
    student = calibrated_on_noise(teacher, wanted, calibration, seed=compute.seed)
    return co_training(teacher, recipe, student, compute, repair=True)


def wanted_bits(
    teacher: Classifier,
    layers: Sequence[str],
    bits: str,
    first_last_bits: int | str,
    layer_bits: Mapping[str, str] | None,
    size_ratio: float | None,
    scheme: Scheme,
) -> dict[str, RequestedBits]:
    """What the options ask of each of the `layers`; raises `BadInput` where that cannot be."""
    requested = parse_bits(bits)
    wanted = assign(layers, requested, ends=parse_ends(first_last_bits), layer_bits=layer_bits or {})
    if requested.weights is None and all(each.weights for each in wanted.values()):
        raise BadInput("--bits auto has no layer left to choose for.", "Use --first-last-bits same, or fewer patterns.")
    require_reachable(teacher, wanted, size_ratio, scheme)
    return wanted


def usual_images(
    method: QuantizationMethod, teacher: Classifier, synthesis: Synthesis, second_recipe: str | None
) -> tuple[Synthesis, str | None]:
    """What is made unless a recipe is named: images whose statistics are those of the training data, as far as the
    teacher knows them; the paper's for its method, and no second recipe, unless one was asked for.
    """
    synthesis = synthesis.counted(IMAGES if teacher.card.small or method == "paper" else LARGE_IMAGES)
    if method == "paper" and second_recipe == AUTO:
        second_recipe = None
    if synthesis.recipe or synthesis.preset or why_no_statistics(teacher.network):
        return synthesis, second_recipe
    return replace(synthesis, recipe=RECIPE, preset=PAPER_PRESET if method == "paper" else None), second_recipe


def usual_calibration(
    method: QuantizationMethod,
    settings: Calibration | Mapping[str, Any] | None,
    *,
    input_size: tuple[int, int, int],
    target: Target | None = None,
) -> Calibration:
    """The settings of calibration, a method's own or with changes; by default fewer batches of images that have more
    than 64 x 64 pixels, and the grids that the target takes. Raises `BadInput` for a method or a setting that is none.
    """
    if method not in CALIBRATIONS:
        raise BadInput(f"There is no --method {method!r}.", f"Known: {', '.join(CALIBRATIONS)}.")
    if isinstance(settings, Calibration):
        return settings
    usual = replace(CALIBRATIONS[method], signed=target == "tensorrt")
    if method == "default":
        usual = replace(usual, steps=usual_steps(input_size))
    return replace_settings(usual, settings or {}, "setting of calibration called")


def usual_tuning(
    finetune: Finetuning,
    settings: Training | Reconstruction | Mapping[str, Any] | None,
    *,
    method: QuantizationMethod,
    card: ModelCard,
) -> Training | Reconstruction | None:
    """The settings of fine-tuning, a method's usual ones for images of the model's size, or with changes; raises
    `BadInput` where those given are of another kind.
    """
    if finetune not in FINETUNING:
        raise BadInput(f"There is no --finetune {finetune!r}.", f"Known: {', '.join(FINETUNING)}.")
    usual = FINETUNING[finetune]
    if method == "paper" and finetune == "kd":
        usual = PAPER_KD if card.small else PAPER_KD_LARGE
    elif not card.small and usual is LSQ:
        usual = LARGE_LSQ
    if usual is None:
        if settings:
            raise BadInput("--finetune none trains nothing.", "Leave the settings of training out.")
        return None
    if isinstance(settings, Training | Reconstruction) and type(settings) is not type(usual):
        raise BadInput(
            f"--finetune {finetune} is not set by a {type(settings).__name__}.", f"Give a {type(usual).__name__}."
        )
    if isinstance(usual, Training):
        usual = usual.suiting(card.input_size)
    chosen = with_defaults(usual, settings)
    return chosen if chosen.steps else None


def usual_rounding(
    finetune: Finetuning,
    settings: Reconstruction | Mapping[str, Any] | None,
    tuning: Training | Reconstruction | None,
    *,
    small: bool,
) -> Reconstruction | None:
    """The settings of the rounding that `blocks+lsq` learns before the training `tuning`, as usual or with changes;
    without training there is none unless it was asked for.

    Raises `BadInput` where the fine-tuning has no such half.
    """
    if finetune != "blocks+lsq":
        if settings:
            raise BadInput(
                f"--finetune {finetune} has no rounding before its training.",
                "Use --finetune blocks+lsq, or --train-set with --finetune blocks.",
            )
        return None
    if not settings and tuning is None:
        return None
    usual = BEFORE_LSQ if small else LARGE_BEFORE_LSQ
    chosen = (
        settings if isinstance(settings, Reconstruction) else replace_settings(usual, settings or {}, ROUNDING_SETTING)
    )
    return chosen if chosen.steps else None


def _objectives(
    teacher: Classifier, finetune: Finetuning, objectives: Mapping[str, float] | None, *, temperature: float, seed: int
) -> list[Objective]:
    """What is followed: as asked, or as usual; features usually only where the network has some.

    Raises `BadInput` for objectives that this way of fine-tuning, or this network, has not.
    """
    if finetune not in OBJECTIVES:
        if objectives is not None:
            raise BadInput(f"--finetune {finetune} follows no --objective.", "Use lsq or kd.")
        return []
    pairs = [(stage, stage) for stage in stages_of(teacher).values()]
    usual = {name: weight for name, weight in OBJECTIVES[finetune].items() if pairs or name not in OF_FEATURES}
    weights = usual if objectives is None else objectives
    if not pairs and any(name in OF_FEATURES for name in weights):
        raise BadInput(f"{teacher.name} has no stages whose features could be compared.", "Use --objective kd.")
    return make_objectives(weights, temperature=temperature, pairs=pairs, seed=seed)


def _require_exportable(
    target: Target | None, teacher: Classifier, wanted: Mapping[str, RequestedBits], scheme: Scheme
) -> None:
    """Raise `BadInput` or `DfcompressError` where the model could not be exported at the bits wanted, which should not
    cost an hour of work.
    """
    if target is None:
        return
    require_packages(target)
    bits = {name: (each.weights, each.activations) for name, each in wanted.items()}
    require_kernels(target, bits, scheme)
    rehearse(teacher, with_widths(wanted, {}), scheme)
