"""The defaults of `quantize`: images, calibration, rounding, training and objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dfcompress.data.pool import Augmentation
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import stages_of
from dfcompress.models.statistics import why_no_statistics
from dfcompress.quantization import Placement
from dfcompress.quantization.calibration import Calibration, usual_steps
from dfcompress.quantization.reconstruction import Reconstruction
from dfcompress.settings import AUTO, replace_settings, with_defaults
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.training import OF_FEATURES
from dfcompress.training.objectives import Objective, make_objectives
from dfcompress.training.settings import Training
from dfcompress.verbs import Finetuning, QuantizationMethod, Target

AS_THE_PAPER = Augmentation(shift=4, flip=True, mixup=1.0)
KD = Training(steps=400, lr=0.01, batch_size=256, weight_decay=1e-4, freeze_batchnorm=True, augmentation=AS_THE_PAPER)
LSQ = replace(KD, lr=0.003)  # Grid steps are small: at a learning rate of 0.01 a clipped gradient moves some too far.
# Sources: `lsq` Esser et al. 2020; `kd` Haroush et al. 2020, section 4.2. Training keeps the corrected BatchNorm
# statistics.
FINETUNING: Mapping[Finetuning, Training | Reconstruction | None] = {
    "blocks+lsq": LSQ,
    "lsq": LSQ,
    "blocks": Reconstruction(),
    "kd": KD,
    "none": None,
}
BEFORE_LSQ = Reconstruction(steps=300, lr=0.03)
# For images of more than 64 pixels a side, which cost a hundred times as much: 3,200 images in each half of
# `blocks+lsq`; batches an eighth as large, and a lower learning rate for them.
LARGE_LSQ, LARGE_BEFORE_LSQ = replace(LSQ, steps=100, batch_size=32, lr=0.001), replace(BEFORE_LSQ, steps=100)
OBJECTIVES: Mapping[Finetuning, Mapping[str, float]] = {
    "blocks+lsq": {"kd": 1.0, "feature": 10.0},
    "lsq": {"kd": 1.0, "feature": 10.0},
    "kd": {"kd": 1.0, "iq": 0.001},
}
# From Haroush et al. 2020, section 4: grids of weights are asymmetric, and their ranges are the minimum and maximum of
# each channel; ranges of inputs are the mean minimum and maximum of chunks of 16 images, on 200 batches of 256 images
# drawn with replacement; there is no bias correction; `kd` with the `iq` loss for 16,000 steps of 512 images (as for
# ResNet-44 on CIFAR-10), or 44,000 steps of 256 images of more than 64 pixels a side (as for ResNet-18 on ImageNet);
# images by `bns-inception` alone, preset `paper-cifar10`.
# Our choices, where the paper states nothing: layers quantize their inputs and not their outputs; zero is on the grid
# of weights; ranges are measured in the float network, and their average has equal weights; temperature 4, SGD with
# learning rate 0.01, Nesterov momentum 0.9, weight decay 1e-4, warm-up for 5 % of the steps, gradient norm clipped at
# 5, mixup from Beta(1, 1); crops are shifts by up to 4 pixels that repeat the edge. A batch has at most as many images
# as the set, and one image in sixteen is held out.
CALIBRATIONS: Mapping[QuantizationMethod, Calibration] = {
    "default": Calibration(),
    "paper": Calibration(
        inputs="minmax", weights="minmax", steps=200, correction=False, weight_grid="asymmetric", replacement=True
    ),
}
FINETUNED_BY: Mapping[QuantizationMethod, Finetuning] = {"default": "blocks+lsq", "paper": "kd"}
# ResNet-20, calibrated on 128 synthetic images: 999 of 1,000 training images are correct, the same number as in float.
FINETUNED_ON: Mapping[Placement, Finetuning] = {"all-tensors": "none"}
# Haroush et al. 2020, section 4.2: ResNet-44 on CIFAR-10, and ResNet-18 on ImageNet.
PAPER_KD, PAPER_KD_LARGE = replace(KD, steps=16_000, batch_size=512), replace(KD, steps=44_000)
RECIPE, PAPER_PRESET = "bns-inception", "paper-cifar10"
IMAGES, CALIBRATION_IMAGES, LARGE_IMAGES = 2048, 512, 128
ROUNDING_SETTING = "setting of rounding called"


def usual_images(
    method: QuantizationMethod, teacher: Classifier, synthesis: Synthesis, second_recipe: str | None, *, trains: bool
) -> tuple[Synthesis, str | None]:
    """The synthesis with the defaults of `quantize`, and the second recipe.

    Without a named recipe, images are made to match the BatchNorm statistics of the training data, where the teacher
    has such statistics. By default there are fewer images where nothing `trains` on them. The method `paper` has the
    paper's preset, and no second recipe unless one was requested.
    """
    if method == "paper":
        usual = IMAGES
    elif teacher.card.small:
        usual = IMAGES if trains else CALIBRATION_IMAGES
    else:
        usual = LARGE_IMAGES
    synthesis = synthesis.counted(usual)
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
    """The settings of calibration: the defaults of `method`, with the changes in `settings`, or complete `settings`.

    By default there are fewer batches for images of more than 64 x 64 pixels, and the grids suit the `target`. Raises
    `BadInput` for an unknown method, and for a setting that is unknown or not valid.
    """
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
    """The settings of fine-tuning: the defaults of `method` for images of the model's size, with the changes in
    `settings`, or complete `settings`; None where nothing is trained.

    Raises `BadInput` for an unknown `finetune`, and for settings that do not belong to it.
    """
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
    """The settings of the rounding that `blocks+lsq` learns before the training `tuning`: the defaults with the changes
    in `settings`, or complete `settings`. None where there is no such rounding; without `tuning` it must be requested.

    Raises `BadInput` for settings of rounding where `finetune` is not `blocks+lsq`.
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


def usual_objectives(
    teacher: Classifier, finetune: Finetuning, objectives: Mapping[str, float] | None, *, temperature: float, seed: int
) -> list[Objective]:
    """The distillation losses: the requested `objectives`, or the defaults of `finetune`. Losses of features are a
    default only where the network has stages.

    Raises `BadInput` for objectives that `finetune` or the network does not support.
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
