"""BatchNorm statistics (Haroush et al. 2020, section 3.3): no class, only the statistics of every layer.

Minimises J_KL, the mean over BatchNorm layers and the input of KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) (eq. 1 to 3). Pixels are
clamped to [0, 1] after each step. Each image is seen four times, cropped, flipped and with a square cut out; statistics
are taken over all copies.
No label steers the images, so their labels are the teacher's predictions, and the classes are not balanced.
The paper's figure uses 1,000 steps of batch 128. The paper states no optimiser or learning rate: those are ours.
`fast-cifar10` shows each image once a step, cropped less, for 400 steps.
`fast-imagenet`, the default above 64 pixels, optimises spectra from coarse to fine; its settings were chosen by images
of `bns-inception`.
"""

from dfcompress.synthesis.images import parametrised
from dfcompress.synthesis.losses import bn_divergence
from dfcompress.synthesis.recipe import FAST_IMAGENET, Phase, Recipe, Schedule, coarse_to_fine
from dfcompress.synthesis.transforms import augmentations

PAPER = "Haroush et al., The Knowledge Within: Methods for Data-Free Model Compression, CVPR 2020"
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {"steps": 400, "copies": 1, "crop": 0.9, "cutout": 0.125},
    "fast-mnist": {"steps": 400, "copies": 1, "crop": 0.9, "cutout": 0.125, "flip": False},
    "fast-imagenet": {**FAST_IMAGENET, "copies": 1, "crop": 1.0, "cutout": 0.0},
    "paper-cifar10": {"steps": 1000, "batch_size": 128},
}


def bns(
    *,
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
    """BatchNorm statistics alone (Haroush 2020, section 3.3)."""
    return Recipe(
        images=parametrised(clip=True, spectrum=spectrum),
        losses=[bn_divergence()],
        phases=coarse_to_fine(
            Phase(steps, lr, (0.5, 0.9), schedule),
            lambda factor: augmentations(copies, crop=crop, cutout=cutout, jitter=jitter // factor, flip=flip),
            quarter_steps=quarter_steps,
            half_steps=half_steps,
        ),
        batch_size=batch_size,
    )
