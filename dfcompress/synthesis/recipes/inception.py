"""Inception scheme (Haroush et al. 2020, section 3.2): a class's logit grows, and the image stays smooth.

Minimises e^(−logit_y / scale) + β·mean((x − smooth(x))²). Pixels are clamped to [0, 1] after each step. Each image is
seen four times, cropped, flipped and with a square cut out.
The paper prints the scale three ways (100 as divisor, 0.01, 0.001) and states no optimiser, learning rate, steps or
weights: those are ours. It smooths 5×5 with σ = 1; σ = 0.375, which it also lists in a table, is much better on CIFAR
and is the default here.
`fast-cifar10` shows each image once a step, cropped less, for 400 steps.
`fast-mnist`, the default for grey images, does not mirror, because mirrored characters are other characters.
`fast-imagenet`, the default above 64 pixels, optimises spectra from coarse to fine; its settings were chosen by images
of `bns-inception`.
"""

from dfcompress.synthesis.images import parametrised
from dfcompress.synthesis.losses import inception as inception_loss
from dfcompress.synthesis.losses import smoothness
from dfcompress.synthesis.recipe import FAST_IMAGENET, Phase, Recipe, Schedule, coarse_to_fine
from dfcompress.synthesis.transforms import augmentations

PAPER = "Haroush et al., The Knowledge Within: Methods for Data-Free Model Compression, CVPR 2020"
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {"steps": 400, "copies": 1, "crop": 0.9, "cutout": 0.125},
    "fast-mnist": {"steps": 400, "copies": 1, "crop": 0.9, "cutout": 0.125, "flip": False},
    "fast-imagenet": {**FAST_IMAGENET, "copies": 1, "crop": 1.0, "cutout": 0.0, "scale": 10.0},
    "paper-cifar10": {"sigma": 1.0, "steps": 1000, "batch_size": 128},
}


def inception(
    *,
    scale: float = 100.0,
    smooth: float = 1.0,
    kernel: int = 5,
    sigma: float = 0.375,
    lr: float = 0.1,
    quarter_steps: int = 0,
    half_steps: int = 0,
    steps: int = 1000,
    schedule: Schedule = "cosine",
    copies: int = 4,
    crop: float = 0.75,
    cutout: float = 0.25,
    jitter: int = 0,
    flip: bool = True,
    spectrum: bool = False,
    batch_size: int = 256,
) -> Recipe:
    """Class and smoothness, no statistics (Haroush 2020, section 3.2)."""
    return Recipe(
        images=parametrised(clip=True, spectrum=spectrum),
        losses=[inception_loss(scale), smooth * smoothness(kernel, sigma)],
        phases=coarse_to_fine(
            Phase(steps, lr, (0.5, 0.9), schedule),
            lambda factor: augmentations(copies, crop=crop, cutout=cutout, jitter=jitter // factor, flip=flip),
            quarter_steps=quarter_steps,
            half_steps=half_steps,
        ),
        batch_size=batch_size,
    )
