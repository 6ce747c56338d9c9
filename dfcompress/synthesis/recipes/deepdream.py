"""DeepDream (Mordvintsev et al. 2015), in the form that DeepInversion's authors compare with: class and image prior, no
statistics.

Minimises CE(T(x̂), y) + α_tv·R_TV + α_l2·‖x̂‖₂.
Settings are DeepInversion's without its BatchNorm term; the paper states no separate settings for CIFAR-10.
`fast-mnist`, the default for grey images, does not mirror, because mirrored characters are other characters.
`fast-imagenet`, the default above 64 pixels, has DeepInversion's settings, too, which were not measured here.
The teacher is certain of such images, but other networks recognise little in them: they are the baseline that recipes
with statistics must beat.
"""

from dfcompress.synthesis.images import parametrised
from dfcompress.synthesis.losses import class_cross_entropy, image_norm, total_variation
from dfcompress.synthesis.recipe import FAST_IMAGENET, Phase, Recipe, Schedule, coarse_to_fine
from dfcompress.synthesis.transforms import jitters

PAPER = "Mordvintsev et al., Inceptionism, 2015; Yin et al., Dreaming to Distill, CVPR 2020"
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {
        "steps": 400,
        "lr": 0.1,
        "beta1": 0.5,
        "beta2": 0.9,
        "schedule": "cosine",
        "clip": True,
        "flip": True,
    },
    "fast-mnist": {"steps": 400, "lr": 0.1, "beta1": 0.5, "beta2": 0.9, "schedule": "cosine", "clip": True},
    "fast-imagenet": {**FAST_IMAGENET, "beta1": 0.5, "beta2": 0.9, "tv": 1e-4, "l2": 0.0, "flip": True, "clip": True},
    "paper-cifar10": {},
}


def deepdream(
    *,
    ce: float = 1.0,
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
    clip: bool = False,
    spectrum: bool = False,
    batch_size: int = 256,
) -> Recipe:
    """DeepInversion without its feature term (Yin 2020, table 1)."""
    return Recipe(
        images=parametrised(clip=clip, spectrum=spectrum),
        losses=[ce * class_cross_entropy(), tv * total_variation(), l2 * image_norm()],
        phases=coarse_to_fine(
            Phase(steps, lr, (beta1, beta2), schedule),
            lambda factor: jitters(jitter // factor, flip=flip),
            quarter_steps=quarter_steps,
            half_steps=half_steps,
        ),
        batch_size=batch_size,
    )
