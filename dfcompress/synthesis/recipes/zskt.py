"""ZSKT (Micaelli and Storkey 2019): a generator whose images maximise the divergence of student and teacher, and
nothing else; the student learns from new images at every step, and no image is kept.

The only loss is −KL(T ‖ S). Settings are as coded by Fang et al. 2021, with which later papers compare: z of 256
numbers, one step of the generator before every 5 of the student, 200 epochs of 400. In the paper these are 1 and 10
steps, and the student also learns the teacher's attention maps. `attention` is the weight of these maps, 0 as in that
code, because stages of other students need not fit; the paper's weight of 250 is for means over positions, ours for
sums (see `attention` of `distill`).
Rounds, width and batch size of the fast presets are ours, chosen so that a CPU needs minutes.
"""

from dfcompress.synthesis.generator_losses import weighted_losses
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates
from dfcompress.synthesis.recipes import dafl

PAPER = "Micaelli and Storkey, Zero-shot Knowledge Transfer via Adversarial Belief Matching, NeurIPS 2019"
PRESETS: dict[str, dict[str, object]] = {
    "fast-cifar10": dafl.FAST,
    "fast-mnist": dafl.FAST,
    "fast-imagenet": dafl.PRESETS["fast-imagenet"],
    "paper-cifar10": {},
}


def zskt(
    *,
    adv: float = 1.0,
    attention: float = 0.0,
    latent: int = 256,
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
        losses=weighted_losses(adv=adv),
        phases=[Phase(steps, lr, (0.5, 0.999))],
        student_updates=StudentUpdates(
            steps=student_steps,
            lr=student_lr,
            batch_size=student_batch_size,
            keep=False,
            rounds=rounds,
            temperature=temperature,
            objectives={"kd": 1.0, "attention": attention} if attention else {"kd": 1.0},
        ),
        batch_size=batch_size,
    )
