"""DAFL (Chen et al. 2019): a generator whose images make the teacher certain and its features large, and are spread
over all classes; the student learns from new images at every step, and no image is kept.

Minimises CE to the teacher's own argmax, −mean |features| before the last layer, and the balance of the mean
prediction, weighted 1, 0.001 and 20 as in the code of Fang et al. 2021, with which later papers compare. The generator
takes one step before every 5 steps of the student, for 200 epochs of 400. In that code, as here, the generator is
trained against the teacher alone.
`fast-mnist` has the paper's weights for MNIST (0.1 and 5). Rounds, width and batch size of the fast presets are ours,
chosen so that a CPU needs minutes.
`head` adds the feature term of IFHE (Chen et al. 2023), whose paper does not state its weight.
"""

from dfcompress.synthesis.generator_losses import weighted_losses
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates

PAPER = "Chen et al., Data-Free Learning of Student Networks, ICCV 2019"
FAST: dict[str, object] = {"width": 32, "batch_size": 128, "rounds": 400, "student_batch_size": 128}
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": FAST,
    "fast-mnist": {**FAST, "latent": 100, "act": 0.1, "balance": 5.0},
    "fast-imagenet": {**FAST, "width": 16, "batch_size": 32, "student_batch_size": 32},
    "paper-cifar10": {},
}


def dafl(
    *,
    oh: float = 1.0,
    act: float = 0.001,
    balance: float = 20.0,
    head: float = 0.0,
    latent: int = 512,
    width: int = 64,
    lr: float = 1e-3,
    steps: int = 1,
    batch_size: int = 256,
    rounds: int = 16_000,
    student_steps: int = 5,
    student_lr: float = 0.1,
    student_batch_size: int = 256,
    temperature: float = 20.0,
) -> Recipe:
    """The published method, as coded by the authors of CMI."""
    return Recipe(
        images=Generator(latent=latent, width=width, persistent=True),
        losses=weighted_losses(oh=oh, act=act, balance=balance, head=head, temperature=temperature),
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
