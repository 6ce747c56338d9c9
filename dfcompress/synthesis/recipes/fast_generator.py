"""Ours, for students that start from nothing: one generator that goes on learning, a few steps a batch, and whose
images are kept.

CE + BN distance + masked −KL(T ‖ S), as in CMI, of a generator that is told the class; few steps a batch and a
generator that lives on are those of Fast-Datafree (Fang et al. 2022), the first layer that begins every batch anew is
that of NAYER (Tran et al. 2024), without their meta-learning and text embeddings.

Chosen on ResNet-20, one seed, students of half the width from random weights, 1,000 training images as judge (one
standard error: 14), seconds of one core. 12 batches of 128 images in 10 steps each at a rate of 2e-3, and 360 steps of
the student, 100 s: 273 right; without the competition 247, with a first layer that lives on 248, with BN distance
weighted 10 and CE 1 255; `dfq` in 80 s 178, 128 images of `deepinversion` in 200 steps 222.
Images alone, at a rate of 1e-3 and without the competition: where the first layer lives on, a second network,
ResNet-44, takes 83 % of the last 512 for what they were made as, and 62 % where it begins anew; but the teacher's
features vary within a class a third as much as on photographs, and four fifths as much where it begins anew. A small
convolutional network trained on 1,536 of them has 222 and 212 right (two seeds), and 230 and 237.
"""

from dfcompress.synthesis.generator_losses import disagreement
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates
from dfcompress.synthesis.transforms import random_shifts

PAPER = (
    "Ours, after Fang et al., Up to 100× Faster Data-free Knowledge Distillation, AAAI 2022, and Tran et al., NAYER: "
    "Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge Distillation, CVPR 2024"
)
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {},
    "fast-mnist": {"flip": False, "shift": 2},
    "fast-imagenet": {"width": 16, "batch_size": 32, "shift": 28, "student_batch_size": 32},
}


def fast_generator(
    *,
    oh: float = 0.5,
    bn: float = 1.0,
    adv: float = 0.5,
    latent: int = 256,
    width: int = 32,
    conditional: bool = True,
    fresh_noise: bool = True,
    lr: float = 2e-3,
    steps: int = 10,
    shift: int = 4,
    flip: bool = True,
    batch_size: int = 128,
    round_batches: int = 1,
    student_steps: int = 50,
    student_lr: float = 0.1,
    student_batch_size: int = 128,
    temperature: float = 4.0,
) -> Recipe:
    """A generator that lives on, and a few steps a batch."""
    return Recipe(
        images=Generator(
            latent=latent,
            width=width,
            conditional=conditional,
            persistent=True,
            fresh_noise=fresh_noise,
        ),
        losses=[
            oh * class_cross_entropy(),
            bn * bn_distance(),
            adv * disagreement(where_agreed=True),
        ],
        phases=[Phase(steps, lr, (0.5, 0.999), transforms=[random_shifts(shift, mirror=flip)])],
        student_updates=StudentUpdates(
            every=round_batches,
            steps=student_steps,
            lr=student_lr,
            batch_size=student_batch_size,
            temperature=temperature,
        ),
        batch_size=batch_size,
    )
