"""DeepInversion (Yin et al. 2020): images whose features have the statistics that BatchNorm stores.

Minimises CE(T(x̂), y) + α_f·Σ_l(‖μ_l − BN mean‖₂ + ‖σ²_l − BN var‖₂) + α_tv·R_TV + α_l2·R_l2,
the norms not squared, on randomly rolled images.

`paper-cifar10` and `paper-imagenet` are the published settings: constant learning rate, no flip, no clipping.
`paper-merging` has the settings of Shapira and Sidi 2020, whose released code leaves out the competition, too.
`repo-imagenet` has the released settings: 2,000 steps through 2×2 average pooling, then 1,000 at full size, cosine
schedule with 100 warm-up steps, the first BatchNorm weighted 10, flips and clipping; the first phase has half the
jitter.
`fast-cifar10`, the default, is ours: a fifth of the steps, a cosine schedule, a larger weight of cross-entropy, flips,
and every image cropped, mirrored and with a square cut out on its own.
`fast-imagenet`, the default above 64 pixels, has the published α_f = 0.01 and three times the cross-entropy, and
optimises spectra from coarse to fine. Of 16 images of EfficientNet-Lite0, the teacher classified all and another
network 11 as intended, at a J_KL of 0.088 (20 steps at full size). With α_f = 0.1 and `ce` = 1, neither network
classified any image as intended. With α_f = 0.01 and `ce` = 30, the teacher classified 16 and the other network 8 as
intended, at a J_KL of 0.132.
`fast-mnist`, the default for grey images, does not flip, because flipped characters are other characters, and has a
much larger weight of smoothness. With `ce` = 1 the teacher classified only half of the images of a LeNet-5 as intended.
Results and times are in docs/results/invert.md.
"""

from dfcompress.synthesis.images import parametrised
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy, image_norm, total_variation
from dfcompress.synthesis.recipe import FAST_IMAGENET, Phase, Recipe, Schedule, coarse_to_fine
from dfcompress.synthesis.transforms import jitters

PAPER = "Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, CVPR 2020"
FAST = {"steps": 400, "lr": 0.1, "beta1": 0.5, "beta2": 0.9, "schedule": "cosine", "clip": True}
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {**FAST, "ce": 30.0, "flip": True, "crop": 0.8, "cutout": 0.125},
    "fast-mnist": {**FAST, "ce": 10.0, "tv": 0.1},
    "fast-imagenet": {**FAST, **FAST_IMAGENET, "ce": 3.0, "bn": 0.01, "tv": 1e-4, "l2": 0.0, "flip": True},
    "paper-cifar10": {},
    "paper-merging": {"lr": 0.085, "tv": 1e-3, "l2": 0.0, "batch_size": 64},
    "paper-imagenet": {
        "steps": 20_000,
        "bn": 0.01,
        "tv": 1e-4,
        "l2": 0.0,
        "jitter": 30,
        "batch_size": 152,
    },
    "repo-imagenet": {
        "half_steps": 2000,
        "steps": 1000,
        "lr": 0.25,
        "beta1": 0.5,
        "beta2": 0.9,
        "schedule": "cosine",
        "warmup": 100,
        "bn": 0.01,
        "first_bn": 10.0,
        "tv": 1e-4,
        "l2": 1e-5,
        "each_norm": True,
        "jitter": 30,
        "flip": True,
        "clip": True,
        "batch_size": 152,
    },
}


def deepinversion(
    *,
    ce: float = 1.0,
    bn: float = 10.0,
    first_bn: float = 1.0,
    tv: float = 2.5e-5,
    l2: float = 3e-8,
    each_norm: bool = False,
    lr: float = 0.05,
    quarter_steps: int = 0,
    half_steps: int = 0,
    steps: int = 2000,
    beta1: float = 0.9,
    beta2: float = 0.999,
    schedule: Schedule = "constant",
    warmup: int = 0,
    jitter: int = 2,
    flip: bool = False,
    crop: float = 1.0,
    cutout: float = 0.0,
    clip: bool = False,
    spectrum: bool = False,
    batch_size: int = 256,
) -> Recipe:
    """The published method; all defaults are the paper's for CIFAR-10 (Yin 2020, section 4.1)."""
    return Recipe(
        images=parametrised(clip=clip, spectrum=spectrum),
        losses=[
            ce * class_cross_entropy(),
            bn * bn_distance(first_bn),
            tv * total_variation(),
            l2 * image_norm(each=each_norm),
        ],
        phases=coarse_to_fine(
            Phase(steps, lr, (beta1, beta2), schedule, warmup),
            lambda factor: jitters(jitter // factor, flip=flip, crop=crop, cutout=cutout),
            quarter_steps=quarter_steps,
            half_steps=half_steps,
        ),
        batch_size=batch_size,
    )
