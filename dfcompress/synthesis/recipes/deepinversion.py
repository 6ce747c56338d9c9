"""DeepInversion (Yin et al. 2020): images whose features have the statistics that BatchNorm remembers.

Minimises CE(T(x̂), y) + α_f·Σ_l(‖μ_l − BN mean‖₂ + ‖σ²_l − BN var‖₂) + α_tv·R_TV + α_l2·R_l2,
the norms not squared, on randomly rolled images.

`paper-cifar10` are the published settings: constant rate, no flip, no clipping.
`fast-cifar10`, the default, is ours: a fifth of the steps, a cosine, flips and a heavier cross-entropy.
How many of 256 images out of ResNet-20 a released ResNet-44 classifies as intended: cross-entropy weighted 10: 69 %,
with flips too: 81 %, weighted 30 with flips: 86 % (38 to 59 s on two cores, bf16, beside other work).
`fast-mnist`, the default for grey images, has no flip, which makes other characters, and much more smoothness:
a LeNet-5 student reached 91 % of MNIST's training images without it, 95 % at 0.003, 96 % at 0.03.
"""

from dfcompress.data.views import random_flip, random_roll
from dfcompress.models.card import ModelCard
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy, image_norm, total_variation
from dfcompress.synthesis.recipe import Recipe, Schedule, Stage

PAPER = "Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, CVPR 2020"
FAST = {"steps": 400, "lr": 0.1, "beta1": 0.5, "beta2": 0.9, "schedule": "cosine", "clip": True}
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {**FAST, "ce": 30.0, "flip": True},
    "fast-mnist": {**FAST, "tv": 0.03},
    "paper-cifar10": {},
}


def default_preset(card: ModelCard) -> str:
    """Grey images are mostly characters, which a flip turns into other ones."""
    return "fast-mnist" if card.input_size[0] == 1 else "fast-cifar10"


def deepinversion(
    *,
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
    clip: bool = False,
    batch_size: int = 256,
) -> Recipe:
    """The published method; every default is the paper's for CIFAR-10 (Yin 2020, section 4.1)."""
    return Recipe(
        images=Pixels(clip=clip),
        losses=[ce * class_cross_entropy(), bn * bn_distance(), tv * total_variation(), l2 * image_norm()],
        views=[random_roll(jitter), random_flip(0.5 if flip else 0.0)],
        stages=[Stage(steps, lr, (beta1, beta2), schedule)],
        batch_size=batch_size,
    )
