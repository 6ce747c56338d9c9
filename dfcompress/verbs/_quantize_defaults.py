"""What `quantize` does unless it is told otherwise: images, calibration, rounding, training and objectives."""

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
RECIPE, PAPER_PRESET = "bns-inception", "paper-cifar10"
IMAGES, CALIBRATION_IMAGES, LARGE_IMAGES = 2048, 512, 128
ROUNDING_SETTING = "setting of rounding called"


def usual_images(
    method: QuantizationMethod, teacher: Classifier, synthesis: Synthesis, second_recipe: str | None, *, trains: bool
) -> tuple[Synthesis, str | None]:
    """What is made unless a recipe is named: images whose statistics are those of the training data, as far as the
    teacher knows them, and fewer where nothing `trains` on them; the paper's for its method, and no second recipe,
    unless one was asked for.
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
    """The settings of calibration, a method's own or with changes; by default fewer batches of images that have more
    than 64 x 64 pixels, and the grids that the target takes. Raises `BadInput` for a method or a setting that is none.
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
    """The settings of fine-tuning, a method's usual ones for images of the model's size, or with changes; raises
    `BadInput` where those given are of another kind.
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


def usual_objectives(
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
