"""`quantize`: a checkpoint in, a few-bit model out.

dfcompress.quantize("resnet20.pt", bits="4w4a")
dfcompress.quantize("resnet20.pt", bits="8w8a", data="images", finetune="none")
dfcompress.quantize("resnet20.pt", bits="autow8a", size_ratio=0.15, export="onnxruntime")
dfcompress.quantize("resnet44.pt", bits="4w4a", method="paper", calibration={"steps": 50}, data="images")
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dfcompress import console
from dfcompress.data.pool import Augmentation
from dfcompress.data.real import open_images
from dfcompress.device import Compute
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import Scheme, freeze, is_quantized, learn_steps
from dfcompress.models.stages import stages_of
from dfcompress.models.statistics import why_no_statistics
from dfcompress.quantization.bits import USUAL_ENDS, Wanted, assign, layers_of, parse_bits, parse_ends
from dfcompress.quantization.calibration import Calibration, calibrated, calibrated_on_noise
from dfcompress.quantization.layer_report import REPORT, layer_report, named_bytes
from dfcompress.quantization.mixed_precision import require_reachable, with_widths
from dfcompress.quantization.reconstruction import Reconstructed, Reconstruction, reconstruct
from dfcompress.run import Run, running, write_json
from dfcompress.settings import AUTO, replace_settings, with_defaults
from dfcompress.synthesis.recipe import Recipe, Synthesis
from dfcompress.synthesis.transfer_set import NONE, TransferSetSource
from dfcompress.training.co_trained_student import CoTrainedStudent
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import Trained, Trainer, require_trainable
from dfcompress.training.objectives import OF_FEATURES, Objective, make_objectives
from dfcompress.training.settings import Training
from dfcompress.verbs._finish import Compressed, evaluator, load_finished, same_classes, save_and_measure
from dfcompress.verbs.export import (
    FILE,
    Target,
    rehearse,
    require_kernels,
    require_packages,
    sampled,
    write_compared,
)
from dfcompress.verbs.invert import co_trained_student

Finetuning = Literal["blocks+lsq", "lsq", "blocks", "kd", "none"]
Method = Literal["default", "paper"]

AS_THE_PAPER = Augmentation(shift=4, flip=True, mixup=1.0)
KD = Training(steps=400, lr=0.01, batch_size=256, weight_decay=1e-4, freeze_batchnorm=True, augmentation=AS_THE_PAPER)
LSQ = replace(KD, lr=0.003)  # Steps are small numbers: a clipped gradient at 0.01 moves some too far.
FINETUNING: Mapping[Finetuning, Training | Reconstruction | None] = {
    "blocks+lsq": LSQ,
    "lsq": LSQ,
    "blocks": Reconstruction(),
    "kd": KD,
    "none": None,
}
BEFORE_LSQ = Reconstruction(steps=300, lr=0.03)
OBJECTIVES: Mapping[Finetuning, Mapping[str, float]] = {
    "blocks+lsq": {"kd": 1.0, "feature": 10.0},
    "lsq": {"kd": 1.0, "feature": 10.0},
    "kd": {"kd": 1.0, "iq": 0.001},
}
CALIBRATIONS: Mapping[Method, Calibration] = {
    "default": Calibration(),
    "paper": Calibration(
        inputs="minmax", weights="minmax", steps=200, correction=False, weight_grid="asymmetric", replacement=True
    ),
}
FINETUNED_BY: Mapping[Method, Finetuning] = {"default": "blocks+lsq", "paper": "kd"}
# Haroush et al. 2020, section 4.2: CIFAR's ResNet-44, and ImageNet's ResNet-18.
SMALL = 64
PAPER_KD, PAPER_KD_LARGE = replace(KD, steps=16_000, batch_size=512), replace(KD, steps=44_000)
RECIPE, PAPER_PRESET, IMAGES = "bns-inception", "paper-cifar10", 2048
BITS, BLOCKS = "bits.partial", "blocks.partial"


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
    mix: str = AUTO,
    method: Method = "default",
    calibration: Calibration | Mapping[str, Any] | None = None,
    finetune: Finetuning | None = None,
    training: Training | Reconstruction | Mapping[str, Any] | None = None,
    objectives: Mapping[str, float] | None = None,
    temperature: float = 4.0,
    export: Target | None = None,
    compute: Compute = Compute(),
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Compressed:
    """Quantize, calibrate and fine-tune a model on images made from itself.

    `bits` are those of weights and activations, `first_last_bits` those of the first and the last layer (`same`: as
    all others), `layer_bits` those of layers by name pattern, or `float`. With `bits="auto"` weights get 2 to 8 bits
    each, by what they cost on the images, so that the file is at most `size_ratio` of the model in fp32.
    `finetune`: `blocks` learns the rounding block by block, `lsq` trains weights and steps to follow the float model
    (Esser et al. 2020), `blocks+lsq` does the one after the other, `kd` trains the weights with ranges frozen (Haroush
    et al. 2020, section 4.2), `none` only calibrates. `training` changes single ones of its usual settings
    (`FINETUNING`), or replaces them, `objectives` what is followed (`OBJECTIVES`).
    BatchNorm's statistics stay as they are corrected.
    `method="paper"` is that of Haroush et al. 2020, section 4: weights are asymmetric and their ranges each channel's
    ends; ranges of inputs are the mean ends of chunks of 16 images, on 200 batches of 256 drawn with replacement;
    nothing is corrected; `kd` with the `iq` loss for 16,000 steps of 512 images (as ResNet-44 on CIFAR-10), or 44,000
    of 256 where images have more than 64 pixels a side (as ResNet-18 on ImageNet); images by `bns-inception` alone,
    preset `paper-cifar10`. `calibration`, `finetune`, `training`, `synthesis` and `mix` change single ones of these.
    Ours, where the paper says nothing: layers quantize their inputs and not their outputs; zero is on the grid of
    weights; ranges are seen through the float network and averaged plainly; temperature 4, SGD's rate 0.01, Nesterov
    momentum 0.9, decay 1e-4, warm-up for 5 % of the steps, the gradient's norm cut at 5, mixup from Beta(1, 1); crops
    are shifts by up to 4 pixels that repeat the edge. A batch has no more images than there are, and one image in
    sixteen is held out.
    `data` is a synthetic set, the folder of a run that made some, or real images; without it images are made first, by
    `bns-inception` unless another recipe is named, half of them by the recipe `mix` (see `TransferSetSource`), and kept
    in `<output>/synthetic` and `<output>/synthetic-<mix>`.
    `export` also writes `model.onnx` for `onnxruntime` or `tensorrt` and checks it (see `dfcompress.export`).
    The folder `output` (default: `<checkpoint>-quantize`) holds the packed model (`model.safetensors`, `config.json`),
    `quantization.json` (every layer), `metrics.jsonl` (but of `blocks`) and `run.json`. `eval_data` are real images
    that only report.
    Raises `BadInput` where the model, the bits or the data cannot be used.
    """
    teacher = as_classifier(checkpoint)
    if is_quantized(teacher.network):
        raise BadInput(f"{teacher.name} is quantized already.", "Give the model it was made from.")
    calibration, finetune = usual_calibration(method, calibration), finetune or FINETUNED_BY[method]
    student, layers = copy.deepcopy(teacher), layers_of(teacher)
    wanted = wanted_bits(
        teacher, layers.quantizable, bits, first_last_bits, layer_bits or {}, size_ratio, calibration.scheme
    )
    tuning = usual_tuning(finetune, training, method=method, input_size=teacher.card.input_size)
    terms = _objectives(teacher, finetune, objectives, temperature=temperature, seed=compute.seed)
    if export:
        # What cannot be exported should not cost an hour of work.
        _require_exportable(export, teacher, wanted, calibration.scheme)
    if not data:
        synthesis, mix = usual_images(method, teacher, synthesis, mix)
    supply = TransferSetSource(
        teacher,
        data,
        synthesis,
        compute,
        mix=mix,
        learner=partial(competitor, teacher, wanted, calibration, compute),
    )
    if isinstance(tuning, Training):
        require_trainable(student, tuning, compute, [len(supply)], repair=True)
    options = {
        "teacher": teacher.identity(),
        "bits": {name: asdict(each) for name, each in wanted.items()},
        "size_ratio": size_ratio,
        "method": method,
        "calibration": asdict(calibration),
        "finetune": finetune,
        "objectives": {term.name: term.weight for term in terms},
        "temperature": temperature,
        "export": export,
        "data": data,
        "synthesis": supply.origin(),
        "rounding": asdict(BEFORE_LSQ) if tuning and finetune == "blocks+lsq" else None,
        "training": asdict(tuning) if tuning else None,
        **asdict(compute),
    }
    if eval_data is not None:
        open_images(eval_data, teacher.card)  # A wrong path should not cost an hour of work.
    measure = evaluator(eval_data, teacher, compute.device)
    folder = Path(output or f"{teacher.name}-quantize")
    inputs = [teacher.path, data, eval_data, *supply.inputs]
    with running("quantize", folder, options, inputs=inputs, resume=resume, overwrite=overwrite) as run:
        if result := load_finished(run, student, measure):
            return result
        for name, kind in layers.others.items():
            console.notice(f"Layer {name} is a {kind}, which cannot be quantized: it stays in float.")
        if layers.unused:
            console.notice(f"Evaluation does not use {named_bytes(layers.unused)}: the file holds them in float.")
        images = supply.gather(run.folder)
        with run.timed("calibration"):
            found = calibrated(
                student,
                teacher,
                wanted,
                images.train,
                calibration,
                compute,
                size_ratio=size_ratio,
                bits=run.folder / BITS,
            )
        trained = _finetuned(student, teacher, finetune, tuning, terms, images.train, compute, run)
        freeze(student.network)
        if world().is_main:
            left = layers.others | {name: "float" for name in layers.quantizable if name not in wanted}
            report = layer_report(
                student, teacher, found.few, sensitivity=found.sensitivity, left=left, unused=layers.unused
            )
            write_json(run.folder / REPORT, report)
        written = partial(write_compared, path=run.folder / FILE, images=sampled(images.train))
        return save_and_measure(
            run,
            student,
            [same_classes(teacher, images)],
            trained=asdict(trained) if trained else None,
            device=compute.device,
            measure=measure,
            export=partial(written, target=export) if export else None,
        )


def competitor(
    teacher: Classifier, wanted: Mapping[str, Wanted], calibration: Calibration, compute: Compute, recipe: Recipe
) -> CoTrainedStudent | None:
    """The student that a recipe's images compete with: what quantization leaves of the teacher, repaired in its updates
    as by `kd` (Yin et al. 2020 let images compete with the student of the application).
    """
    if recipe.student_updates is None:
        return None
    student = calibrated_on_noise(teacher, wanted, calibration, seed=compute.seed)
    return co_trained_student(teacher, recipe, student, compute, repair=True)


def wanted_bits(
    teacher: Classifier,
    layers: Sequence[str],
    bits: str,
    first_last_bits: int | str,
    layer_bits: Mapping[str, str],
    size_ratio: float | None,
    scheme: Scheme,
) -> dict[str, Wanted]:
    """What the options ask of each of the `layers`; raises `BadInput` where that cannot be."""
    asked = parse_bits(bits)
    wanted = assign(layers, asked, ends=parse_ends(first_last_bits), layer_bits=layer_bits)
    if asked.weights is None and all(each.weights for each in wanted.values()):
        raise BadInput("--bits auto has no layer left to choose for.", "Use --first-last-bits same, or fewer patterns.")
    require_reachable(teacher, wanted, size_ratio, scheme)
    return wanted


def usual_images(method: Method, teacher: Classifier, synthesis: Synthesis, mix: str) -> tuple[Synthesis, str]:
    """What is made unless a recipe is named: images whose statistics are those of the training data, as far as the
    teacher knows them; the paper's for its method, and nothing mixed in, unless that was asked for.
    """
    synthesis = synthesis.counted(IMAGES)
    if method == "paper" and mix == AUTO:
        mix = NONE
    if synthesis.recipe or synthesis.preset or why_no_statistics(teacher.network):
        return synthesis, mix
    return replace(synthesis, recipe=RECIPE, preset=PAPER_PRESET if method == "paper" else None), mix


def usual_calibration(method: Method, given: Calibration | Mapping[str, Any] | None) -> Calibration:
    """The settings of calibration, a method's own or with changes; raises `BadInput` for a method or a setting that is
    none.
    """
    if method not in CALIBRATIONS:
        raise BadInput(f"There is no --method {method!r}.", f"Known: {', '.join(CALIBRATIONS)}.")
    if isinstance(given, Calibration):
        return given
    return replace_settings(CALIBRATIONS[method], given or {}, "setting of calibration called")


def usual_tuning(
    finetune: Finetuning,
    given: Training | Reconstruction | Mapping[str, Any] | None,
    *,
    method: Method,
    input_size: tuple[int, int, int],
) -> Training | Reconstruction | None:
    """The settings of fine-tuning, a method's usual ones or with changes; raises `BadInput` where those given are of
    another kind.
    """
    if finetune not in FINETUNING:
        raise BadInput(f"There is no --finetune {finetune!r}.", f"Known: {', '.join(FINETUNING)}.")
    usual = FINETUNING[finetune]
    if method == "paper" and finetune == "kd":
        usual = PAPER_KD if max(input_size[1:]) <= SMALL else PAPER_KD_LARGE
    if usual is None:
        if given:
            raise BadInput("--finetune none trains nothing.", "Leave the settings of training out.")
        return None
    if isinstance(given, Training | Reconstruction) and type(given) is not type(usual):
        raise BadInput(
            f"--finetune {finetune} is not set by a {type(given).__name__}.", f"Give a {type(usual).__name__}."
        )
    chosen = with_defaults(usual, given)
    return chosen if chosen.steps else None


def _objectives(
    teacher: Classifier, finetune: Finetuning, asked: Mapping[str, float] | None, *, temperature: float, seed: int
) -> list[Objective]:
    """What is followed: as asked, or as usual; features usually only where the network has some.

    Raises `BadInput` for objectives that this way of fine-tuning, or this network, has not.
    """
    if finetune not in OBJECTIVES:
        if asked is not None:
            raise BadInput(f"--finetune {finetune} follows no --objective.", "Use lsq or kd.")
        return []
    pairs = [(stage, stage) for stage in stages_of(teacher).values()]
    usual = {name: weight for name, weight in OBJECTIVES[finetune].items() if pairs or name not in OF_FEATURES}
    weights = usual if asked is None else asked
    if not pairs and any(name in OF_FEATURES for name in weights):
        raise BadInput(f"{teacher.name} has no stages whose features could be compared.", "Use --objective kd.")
    return make_objectives(weights, temperature=temperature, pairs=pairs, seed=seed)


def _require_exportable(target: Target, teacher: Classifier, wanted: Mapping[str, Wanted], scheme: Scheme) -> None:
    """Raise `BadInput` or `DfcompressError` where the model could not be exported at the bits wanted."""
    require_packages(target)
    asked = {name: (each.weights, each.activations) for name, each in wanted.items()}
    require_kernels(target, asked, scheme)
    rehearse(teacher, with_widths(wanted, {}), scheme)


def _finetuned(
    student: Classifier,
    teacher: Classifier,
    finetune: Finetuning,
    tuning: Training | Reconstruction | None,
    terms: Sequence[Objective],
    images: Tensor,
    compute: Compute,
    run: Run,
) -> Trained | Reconstructed | None:
    """Train the calibrated student as asked."""
    if tuning is None:
        return None
    before = tuning if isinstance(tuning, Reconstruction) else BEFORE_LSQ if finetune == "blocks+lsq" else None
    if before:
        rounded = reconstruct(student, teacher, images, before, seed=compute.seed, state=run.folder / BLOCKS)
        if isinstance(tuning, Reconstruction):
            return rounded
        run.seconds["rounding"] = rounded.seconds
    assert isinstance(tuning, Training)
    if finetune != "kd":
        learn_steps(student.network)
    teaching = Distillation(teacher, terms)
    return Trainer(student, teaching, tuning, compute=compute, folder=run.folder, repair=True).fit(images)
