"""BNS + Inception (Haroush et al. 2020, section 3.4, algorithm 1): statistics, class and smoothness together.

Minimises α·J_KL + β·e^(−logit_y / scale) + γ·mean((x − smooth(x))²). Pixels are clamped to [0, 1] after each step. Each
image is seen four times, cropped, flipped and with a square cut out.
The paper does not state α, β, γ, the optimiser, its learning rate, the steps and the sizes of crops and cut-outs: those
are ours.
`fast-cifar10` shows each image once a step for 400 steps.
α = 100 and the milder crops were chosen by J_KL, which the paper reports as 1.2 times that of real data. On ResNet-20
with 128 images, `paper-cifar10` reaches a J_KL of 0.016 (0.018 after 150 of its 1,000 steps), and the teacher
classifies all images as intended; 128 training images, balanced over the classes, also have 0.016 (five draws: 0.0148
to 0.0172). With crops to 0.75 and cut-outs of 0.25, J_KL after 150 steps was 0.034 with α = 100 and 0.036 with α =
1,000: the cropped images match the statistics (0.002), the whole images do not.
`fast-mnist`, the default for grey images, does not mirror, because mirrored characters are other characters. Of 128
images of the demo's LeNet-5, the teacher classified all and another LeNet-5 118 as intended, at a J_KL of 0.016 (real
images: 0.008). With mirroring the numbers were 125 and 90, at 0.023; with mirroring and `ce` = 1 the teacher
classified 19 as intended.
`fast-imagenet`, the default above 64 pixels, optimises spectra from coarse to fine. Of 16 images of EfficientNet-Lite0,
the teacher classified 16 and another network 13 as intended, at a J_KL of 0.035, which is also that of 16 real images;
with α = 3,000 the numbers were 15 and 11, at 0.032. With 20 steps at full size, the other network classified 15 as
intended with β = 100 and a scale of 10, and 10 to 14 with a cross-entropy weighted 10 instead: the gradient of the
former does not vanish once the teacher is certain.
"""

from dfcompress.synthesis.images import parametrised
from dfcompress.synthesis.losses import bn_divergence, inception, smoothness
from dfcompress.synthesis.recipe import FAST_IMAGENET, Phase, Recipe, Schedule, coarse_to_fine
from dfcompress.synthesis.transforms import augmentations

PAPER = "Haroush et al., The Knowledge Within: Methods for Data-Free Model Compression, CVPR 2020"
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {"steps": 400, "copies": 1, "crop": 0.9, "cutout": 0.125, "bn": 100.0},
    "fast-mnist": {"steps": 400, "copies": 1, "crop": 0.9, "cutout": 0.125, "bn": 100.0, "ce": 30.0, "flip": False},
    "fast-imagenet": {
        **FAST_IMAGENET,
        "copies": 1,
        "crop": 1.0,
        "cutout": 0.0,
        "bn": 2000.0,
        "ce": 100.0,
        "scale": 10.0,
        "smooth": 0.0,
    },
    "paper-cifar10": {"sigma": 1.0, "steps": 1000, "batch_size": 128, "bn": 100.0, "crop": 0.9, "cutout": 0.125},
}


def bns_inception(
    *,
    bn: float = 1.0,
    ce: float = 1.0,
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
    """Algorithm 1 of Haroush 2020."""
    return Recipe(
        images=parametrised(clip=True, spectrum=spectrum),
        losses=[bn * bn_divergence(), ce * inception(scale), smooth * smoothness(kernel, sigma)],
        phases=coarse_to_fine(
            Phase(steps, lr, (0.5, 0.9), schedule),
            lambda factor: augmentations(copies, crop=crop, cutout=cutout, jitter=jitter // factor, flip=flip),
            quarter_steps=quarter_steps,
            half_steps=half_steps,
        ),
        batch_size=batch_size,
    )
