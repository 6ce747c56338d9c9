"""CMI (Fang et al. 2021): a generator and its latent vectors are trained together, anew for every batch. Student and
teacher agree on the images' classes but not on their probabilities, and each image differs from all others. Images are
kept, and the student learns from all so far.

Minimises 0.5·CE + BN distance + 0.5·masked −KL(T ‖ S) + 0.8·contrast, 200 steps per batch, then 2,000 steps of the
student, as coded by the authors. BN distance, CE and KL are computed on the global view (moved by up to 4 pixels,
mirrored); the contrast compares the global view with the local view (a crop of half the side or more, mirrored). Three
things differ from their code. Their crops vary in shape; here crops are square. They keep the images and features of
the best step; here those of the last step are kept, because the loss is one of random views. Their student also learns
from images inverted beforehand; here `--data` gives such images.
Steps, width and batch size of the fast presets are ours, chosen so that a CPU needs minutes.
"""

from dfcompress.synthesis.generator_losses import contrast, disagreement, on_view
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates
from dfcompress.synthesis.transforms import random_crops, random_shifts, views

PAPER = "Fang et al., Contrastive Model Inversion for Data-Free Knowledge Distillation, IJCAI 2021"
FAST: dict[str, object] = {
    "width": 32,
    "steps": 60,
    "batch_size": 128,
    "student_steps": 40,
    "student_batch_size": 128,
}
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": {**FAST, "remembered": 1024},
    "fast-mnist": {**FAST, "flip": False, "shift": 2, "remembered": 1024},
    "fast-imagenet": {**FAST, "width": 16, "batch_size": 32, "shift": 28, "student_batch_size": 32, "remembered": 256},
    "paper-cifar10": {},
}


def cmi(
    *,
    oh: float = 0.5,
    bn: float = 1.0,
    adv: float = 0.5,
    cr: float = 0.8,
    contrast_temperature: float = 0.1,
    remembered: int = 4096,
    latent: int = 256,
    width: int = 64,
    lr: float = 1e-3,
    steps: int = 200,
    shift: int = 4,
    crop: float = 0.5,
    flip: bool = True,
    batch_size: int = 256,
    round_batches: int = 1,
    student_steps: int = 2000,
    student_lr: float = 0.1,
    student_batch_size: int = 128,
    temperature: float = 20.0,
) -> Recipe:
    """The published method, as coded by its authors."""
    global_view = random_shifts(shift, mirror=flip)
    local_view = random_crops(1, smallest=crop, cutout=0.0, mirror=flip)
    told_apart = contrast(
        batch_size=batch_size, steps=steps, temperature=contrast_temperature, remembered=max(remembered, batch_size)
    )
    return Recipe(
        images=Generator(latent=latent, width=width, learn_latents=True),
        losses=[
            oh * on_view(class_cross_entropy(), 0),
            bn * on_view(bn_distance(), 0),
            adv * on_view(disagreement(where_agreed=True), 0),
            cr * told_apart,
        ],
        phases=[Phase(steps, lr, (0.5, 0.999), transforms=[views(global_view, local_view)])],
        student_updates=StudentUpdates(
            every=round_batches,
            steps=student_steps,
            lr=student_lr,
            batch_size=student_batch_size,
            temperature=temperature,
        ),
        batch_size=batch_size,
    )
