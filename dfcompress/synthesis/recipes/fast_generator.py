"""Ours, for students that start from nothing: one generator that goes on learning, a few steps a batch, and whose
images are kept.

CE + BN distance + masked −KL(T ‖ S), as in CMI, of a generator that is told the class; few steps a batch and a
generator that lives on are those of Fast-Datafree (Fang et al. 2022), the first layer that begins every batch anew is
that of NAYER (Tran et al. 2024), without their meta-learning and text embeddings.
"""

from dfcompress.synthesis.generator_losses import disagreement
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates
from dfcompress.synthesis.transforms import random_shifts

PAPER = (
    "Ours, after Fang et al., Up to 100× Faster Data-free Knowledge Distillation, AAAI 2022, and Tran et al., NAYER, \
CVPR 2024"
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
    where_agreed: bool = True,
    latent: int = 256,
    width: int = 32,
    conditional: bool = True,
    persistent: bool = True,
    fresh_noise: bool = True,
    learn_latents: bool = False,
    lr: float = 2e-3,
    steps: int = 10,
    shift: int = 4,
    flip: bool = True,
    batch_size: int = 128,
    round_batches: int = 1,
    student_steps: int = 30,
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
            persistent=persistent,
            fresh_noise=fresh_noise,
            learn_latents=learn_latents,
        ),
        losses=[
            oh * class_cross_entropy(),
            bn * bn_distance(),
            adv * disagreement(where_agreed=where_agreed),
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
