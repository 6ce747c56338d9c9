"""Adaptive DeepInversion (Yin et al. 2020): images on which a student does not yet agree with its teacher.

Minimises DeepInversion's loss + α_c·(1 − JS(p_T, p_S)), a true Jensen-Shannon divergence in nats at a temperature.
The student is trained during synthesis: after every round of batches it is distilled on all images so far, and the next
round competes with the updated student. In the first round the student is untrained, so images of a single round (up to
`round_batches` batches) never compete with a trained student.
α_c is 10 and the temperature 3, as in the released code, whose own student never learns; above 64 pixels α_c is 0.2.
The paper does not state the rounds and the student's steps, learning rate and batch size for images made in this way:
they are ours.
"""

from dfcompress.synthesis.images import parametrised
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy, competition, image_norm, total_variation
from dfcompress.synthesis.recipe import Phase, Recipe, Schedule, StudentUpdates, coarse_to_fine
from dfcompress.synthesis.recipes import deepinversion
from dfcompress.synthesis.transforms import jitters

PAPER = "Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, CVPR 2020"
PRESETS: dict[str, dict[str, object]] = {
    name: deepinversion.PRESETS[name] for name in ("fast-cifar10", "fast-mnist", "fast-imagenet", "paper-cifar10")
}
# The paper's α_c for ImageNet, used with its α_f of 0.01. Batches are smaller, so that the student learns between them.
PRESETS["fast-imagenet"] = {**PRESETS["fast-imagenet"], "compete": 0.2, "batch_size": 32}


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
    quarter_steps: int = 0,
    half_steps: int = 0,
    steps: int = 2000,
    beta1: float = 0.9,
    beta2: float = 0.999,
    schedule: Schedule = "constant",
    jitter: int = 2,
    flip: bool = False,
    crop: float = 1.0,
    cutout: float = 0.0,
    clip: bool = False,
    spectrum: bool = False,
    batch_size: int = 256,
) -> Recipe:
    """DeepInversion with a competing student (Yin 2020, section 3.3)."""
    return Recipe(
        images=parametrised(clip=clip, spectrum=spectrum),
        losses=[
            ce * class_cross_entropy(),
            bn * bn_distance(),
            tv * total_variation(),
            l2 * image_norm(),
            compete * competition(temperature),
        ],
        phases=coarse_to_fine(
            Phase(steps, lr, (beta1, beta2), schedule),
            lambda factor: jitters(jitter // factor, flip=flip, crop=crop, cutout=cutout),
            quarter_steps=quarter_steps,
            half_steps=half_steps,
        ),
        student_updates=StudentUpdates(
            every=round_batches, steps=student_steps, lr=student_lr, batch_size=student_batch_size
        ),
        batch_size=batch_size,
    )
