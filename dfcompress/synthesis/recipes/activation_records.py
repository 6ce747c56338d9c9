"""Activation records (Lopes et al. 2017): images whose activations match activations that the model's owner recorded.

For each image and its class, a target t of each recorded layer's output is drawn from the record: a sample of the
class's Gaussian, or a stored activation. With a the image's own outputs, the recipe minimises
Σ_layers mean over units of (ReLU(t) − ReLU(a))², logits divided by the record's temperature (section 3.1.1, 3.1.2).
Images start from the mean and standard deviation of the training images' pixels. A record of kind `all-layers-dropout`
gives every batch dropout filters, which stay fixed for all steps.

`paper` has the settings of the authors' code, without image prior; because of ReLU on both sides there is no gradient
where the image's unit is off and the target's is on. `paper-spectral` is for spectral records: Σ over all units i of
(s̄_i − s_i)² without ReLU (3.1.3), where a layer counts by its number of units (`summed`). For a 784-1200-1200-10
network, the logits are 3 % of this loss, and would be 71 % of a sum of means. Each of the two presets is refused for
records of the other family.
The `fast` presets are ours: a fifth of the steps, a cosine schedule, pixels kept in range, and a unit that is off
passes `leak` of its difference.
Samples of different layers are drawn independently and contradict each other, so in `fast-all-layers` each layer is
weighted a tenth of the layer before it (`later`). Logits alone constrain images little, so `fast-top-layer` adds
smoothness, jitter, and the mean and standard deviation of the data's pixels for each image (`pixels`).
`ce` adds cross-entropy and `bn` the distance to BatchNorm's statistics; `pooled` is taken from the record.
Results are in docs/results/record.md.
"""

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import (
    activation_distance,
    bn_distance,
    class_cross_entropy,
    pixel_divergence,
    total_variation,
)
from dfcompress.synthesis.recipe import Phase, Recipe, Schedule
from dfcompress.synthesis.records import SPECTRAL
from dfcompress.synthesis.records.record_file import Description
from dfcompress.synthesis.transforms import jitters

PAPER = "Lopes, Fenu & Starner, Data-Free Knowledge Distillation for Deep Neural Networks, 2017"
PAPER_GAUSSIAN, PAPER_SPECTRAL = "paper", "paper-spectral"
FAST = {"steps": 200, "lr": 0.1, "beta1": 0.5, "beta2": 0.9, "schedule": "cosine", "clip": True, "batch_size": 256}
PRESETS: dict[str, dict[str, object]] = {
    "fast-top-layer": {**FAST, "activations": 10.0, "leak": 0.1, "pixels": 1.0, "tv": 1e-3, "jitter": 2},
    "fast-all-layers": {**FAST, "leak": 0.1, "later": 0.1},
    "fast-spectral": {**FAST, "leak": 1.0, "tv": 1e-3},
    PAPER_GAUSSIAN: {},
    PAPER_SPECTRAL: {"leak": 1.0, "summed": True},
}


def default_preset(card: ModelCard, record: Description | None) -> str:
    """The preset for the record's family."""
    if record and record.kind in SPECTRAL:
        return "fast-spectral"
    return "fast-top-layer" if record and len(record.layers) == 1 else "fast-all-layers"


def check_preset(preset: str, record: Description) -> None:
    """Raise `BadInput` for the published settings of another family of records."""
    meant, other = PAPER_GAUSSIAN, PAPER_SPECTRAL
    if record.kind in SPECTRAL:
        meant, other = other, meant
    if preset == other:
        raise BadInput(
            f"--preset {preset} is not what the paper does with a record of kind {record.kind}.",
            f"Use --preset {meant}.",
        )


def activation_records(
    *,
    activations: float = 1.0,
    leak: float = 0.0,
    later: float = 1.0,
    summed: bool = False,
    ce: float = 0.0,
    bn: float = 0.0,
    pixels: float = 0.0,
    tv: float = 0.0,
    lr: float = 0.07,
    steps: int = 1000,
    beta1: float = 0.9,
    beta2: float = 0.999,
    schedule: Schedule = "constant",
    jitter: int = 0,
    clip: bool = False,
    pooled: bool = False,
    batch_size: int = 64,
) -> Recipe:
    """All defaults are from the paper or its authors' code (Lopes 2017); `pooled` is taken from the record."""
    return Recipe(
        images=Pixels(clip=clip),
        losses=[
            activations * activation_distance(leak, later=later, summed=summed, pooled=pooled),
            *([ce * class_cross_entropy()] if ce else []),
            *([bn * bn_distance()] if bn else []),
            *([pixels * pixel_divergence()] if pixels else []),
            *([tv * total_variation()] if tv else []),
        ],
        phases=[Phase(steps, lr, (beta1, beta2), schedule, transforms=jitters(jitter) if jitter else [])],
        batch_size=batch_size,
    )
