"""Adaptive DeepInversion (Yin et al. 2020): images on which a student does not yet agree with its teacher.

DeepInversion and α_c·(1 − JS(p_T, p_S)), a true Jensen-Shannon divergence in nats at a temperature.
The student learns while the images are made: after every round of batches it is distilled on all images so far, and the
next round competes with what it has become. Before its first lesson it is fresh.
α_c is 10 and the temperature 3, as in the released code, whose own student never learns; the rounds, the student's
steps, rate and batch are not stated for images made this way and are ours.
"""

from dfcompress.data.views import random_crops, random_flip, random_roll
from dfcompress.models.card import ModelCard
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy, competition, image_norm, total_variation
from dfcompress.synthesis.recipe import Lessons, Recipe, Schedule, Stage

PAPER = "Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, CVPR 2020"
FAST = {"steps": 400, "lr": 0.1, "beta1": 0.5, "beta2": 0.9, "schedule": "cosine", "clip": True}
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {**FAST, "ce": 30.0, "flip": True, "crop": 0.8, "cutout": 0.125},
    "fast-mnist": {**FAST, "tv": 0.03},
    "paper-cifar10": {},
}


def default_preset(card: ModelCard) -> str:
    """Grey images are mostly characters, which a flip turns into other ones."""
    return "fast-mnist" if card.input_size[0] == 1 else "fast-cifar10"


def adaptive_deepinversion(
    *,
    compete: float = 10.0,
    temperature: float = 3.0,
    round_batches: int = 1,
    student_steps: int = 100,
    student_lr: float = 0.05,
    student_batch_size: int = 128,
    ce: float = 1.0,
    bn: float = 10.0,
    tv: float = 2.5e-5,
    l2: float = 3e-8,
    lr: float = 0.05,
    steps: int = 2000,
    beta1: float = 0.9,
    beta2: float = 0.999,
    schedule: Schedule = "constant",
    jitter: int = 2,
    flip: bool = False,
    crop: float = 1.0,
    cutout: float = 0.0,
    clip: bool = False,
    batch_size: int = 256,
) -> Recipe:
    """DeepInversion with a competing student (Yin 2020, section 3.3)."""
    return Recipe(
        images=Pixels(clip=clip),
        losses=[
            ce * class_cross_entropy(),
            bn * bn_distance(),
            tv * total_variation(),
            l2 * image_norm(),
            compete * competition(temperature),
        ],
        stages=[
            Stage(
                steps,
                lr,
                (beta1, beta2),
                schedule,
                views=[
                    random_roll(jitter),
                    *([random_flip()] if flip else []),
                    *([random_crops(1, smallest=crop, cutout=cutout, mirror=flip)] if crop < 1 or cutout else []),
                ],
            )
        ],
        lessons=Lessons(round_batches, student_steps, student_lr, student_batch_size),
        batch_size=batch_size,
    )
