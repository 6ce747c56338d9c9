"""PSAQ-ViT (Li et al. 2022): images whose patches differ for a vision transformer as much as those of real images.

Networks without BatchNorm store no statistics. But a patch of a real image resembles some patches and differs from the
others, while all patches of noise are alike: the cosine similarities of a real image's patch features are spread
widely. The recipe therefore maximises Σ_l H_l, the differential entropy of those similarities in every attention
module, and minimises the cross-entropy of the intended class and the distance of R_TV from a typical value, on rolled
and flipped images that are kept in range.

`paper-deit` and `paper-swin` have the settings of the released code: 500 steps with a jitter of 15 pixels and 500 with
30, each along a cosine after 100 warm-up steps, batches of 32; for Swin at a learning rate of 0.25.
`fast`, the default, is ours: a fifth of the steps.
These differences from the released code are ours, too. The features are the outputs of whole attention modules, instead
of the mean over heads before their projection; for Swin and ConvNeXt they are the outputs of whole blocks, averaged to
at most 14 × 14 patches. Images are rolled by a different offset along each axis. The density is taken over each image's
own range. The typical R_TV is fixed, and the classes take turns.
Tested on random weights alone: the value of the images for a trained network is not measured.
"""

from dfcompress.models.card import ModelCard
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import class_cross_entropy, patch_similarity, usual_variation
from dfcompress.synthesis.recipe import Phase, Recipe
from dfcompress.synthesis.records.record_file import Description
from dfcompress.synthesis.transforms import jitters

PAPER = "Li et al., Patch Similarity Aware Data-Free Quantization for Vision Transformers, ECCV 2022"
FAST = {"steps": 200, "warmup": 20}
PRESETS: dict[str, dict[str, object]] = {
    "fast": {**FAST},
    "fast-small": {**FAST, "jitter": 4},
    "paper-deit": {},
    "paper-swin": {"lr": 0.25},
}


def default_preset(card: ModelCard, record: Description | None) -> str:
    """A jitter of 30 pixels is an eighth of the side of a 224-pixel image, but nearly all of a 32-pixel one."""
    return "fast-small" if card.small else "fast"


def psaq_vit(
    *,
    similarity: float = 1.0,
    points: int = 10,
    bandwidth: float = 0.01,
    ce: float = 1.0,
    tv: float = 0.05,
    usual_tv: float = 1.25,
    lr: float = 0.2,
    steps: int = 1000,
    warmup: int = 100,
    jitter: int = 30,
    batch_size: int = 32,
) -> Recipe:
    """All defaults are the released code's for DeiT; `steps` is the number of steps of both halves together."""
    return Recipe(
        images=Pixels(clip=True),
        losses=[
            similarity * patch_similarity(points, bandwidth),
            ce * class_cross_entropy(),
            tv * usual_variation(usual_tv),
        ],
        phases=[
            Phase(count, lr, (0.5, 0.9), "cosine", warmup, transforms=jitters(reach, flip=True))
            for count, reach in ((steps // 2, jitter // 2), (steps - steps // 2, jitter))
            if count
        ],
        batch_size=batch_size,
    )
