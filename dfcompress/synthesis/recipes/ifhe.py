"""IFHE (Chen et al. 2023): CMI's method, in which an auxiliary classifier on the teacher's intermediate features
replaces the teacher in judging the class of an image, so that features differ between classes as those of photographs
do.

Minimises α·CE of the auxiliary classifier + β·squared BN distance, averaged over layers + γ·masked −KL(T ‖ S).
Generator and latent vectors are trained together, images are kept. When the student learns, the auxiliary classifier
learns the teacher's predictions. α is 0.5 for CIFAR-10, the best value in the paper, and 1 for CIFAR-100.
The paper does not state the following, which are ours: the features and the classifier (see `auxiliary_head`), β = 1, γ
= 0.5 and the mask (as in CMI), the single view of an image (CMI's global view). Steps, learning rates and the student's
τ are CMI's. −KL is at τ = 1, as CMI codes it, where the paper writes τ.
Steps, width and batch size of the fast presets are ours, chosen so that a CPU needs minutes.
"""

from dfcompress.synthesis.generator_losses import auxiliary_head, disagreement, squared_bn_distance
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates
from dfcompress.synthesis.recipes import cmi
from dfcompress.synthesis.transforms import random_shifts

PAPER = (
    "Chen et al., IFHE: Intermediate-Feature Heterogeneity Enhancement for Image Synthesis in Data-Free Knowledge "
    "Distillation, DAC 2023"
)
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": cmi.FAST,
    "fast-mnist": {**cmi.FAST, "flip": False, "shift": 2},
    "fast-imagenet": {**cmi.FAST, "width": 16, "batch_size": 32, "shift": 28, "student_batch_size": 32},
    "paper-cifar10": {},
    "paper-cifar100": {"alpha": 1.0},
}


def ifhe(
    *,
    alpha: float = 0.5,
    beta: float = 1.0,
    gamma: float = 0.5,
    latent: int = 256,
    width: int = 64,
    lr: float = 1e-3,
    steps: int = 200,
    shift: int = 4,
    flip: bool = True,
    batch_size: int = 256,
    round_batches: int = 1,
    student_steps: int = 2000,
    student_lr: float = 0.1,
    student_batch_size: int = 128,
    temperature: float = 20.0,
) -> Recipe:
    """The published method; settings that the paper does not state are CMI's."""
    return Recipe(
        images=Generator(latent=latent, width=width, learn_latents=True),
        losses=[
            alpha * auxiliary_head(temperature),
            beta * squared_bn_distance(),
            gamma * disagreement(where_agreed=True),
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
