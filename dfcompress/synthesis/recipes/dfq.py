"""DFQ (Choi et al. 2020): ZSKT's competition, with images that match the teacher's BatchNorm statistics and are spread
over all classes; the student learns from new images at every step, and no image is kept.

Minimises −KL(T ‖ S) + BN distance + cross-entropy to the teacher's own argmax + 20 times the balance of the mean
prediction, as in the code of Fang et al. 2021, with which later papers compare. That code compares statistics by norms,
the paper by KL divergences. The generator takes one step before every 10 steps of the student, for 200 epochs of 400.
Rounds, width and batch size of the fast presets are ours, chosen so that a CPU needs minutes.
`head` adds the feature term of IFHE (Chen et al. 2023), whose paper does not state its weight.
"""

from dfcompress.synthesis.generator_losses import weighted_losses
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates
from dfcompress.synthesis.recipes import dafl

PAPER = "Choi et al., Data-Free Network Quantization with Adversarial Knowledge Distillation, CVPR Workshops 2020"
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": dafl.FAST,
    "fast-mnist": dafl.FAST,
    "fast-imagenet": dafl.PRESETS["fast-imagenet"],
    "paper-cifar10": {},
}


def dfq(
    *,
    adv: float = 1.0,
    bn: float = 1.0,
    oh: float = 1.0,
    balance: float = 20.0,
    head: float = 0.0,
    latent: int = 256,
    width: int = 64,
    lr: float = 1e-3,
    steps: int = 1,
    batch_size: int = 256,
    rounds: int = 8000,
    student_steps: int = 10,
    student_lr: float = 0.1,
    student_batch_size: int = 256,
    temperature: float = 20.0,
) -> Recipe:
    """The published method, as coded by the authors of CMI."""
    return Recipe(
        images=Generator(latent=latent, width=width, persistent=True),
        losses=weighted_losses(adv=adv, bn=bn, oh=oh, balance=balance, head=head, temperature=temperature),
        phases=[Phase(steps, lr, (0.5, 0.999))],
        student_updates=StudentUpdates(
            steps=student_steps,
            lr=student_lr,
            batch_size=student_batch_size,
            keep=False,
            rounds=rounds,
            temperature=temperature,
        ),
        batch_size=batch_size,
    )
