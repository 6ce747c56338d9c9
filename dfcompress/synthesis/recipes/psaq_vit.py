"""PSAQ-ViT (Li et al. 2022): images whose patches are as different to a vision transformer as those of real ones.

Networks without BatchNorm remember no statistics. But the patches of a real image are like some others and unlike the
rest, where those of noise are all alike: the cosine similarities of their features are spread widely. So this maximises
Σ_l H_l, the differential entropy of those similarities in every attention module, and minimises the cross-entropy of
the intended class and the distance of R_TV to what is usual, on rolled and flipped images that are kept in range.

`paper-deit` and `paper-swin` are the settings of the released code: 500 steps with a jitter of 15 pixels and 500 with
30, each along a cosine after 100 warm-up steps, batches of 32; of Swin at a rate of 0.25.
`fast`, the default, is ours: a fifth of the steps.
Ours, too: the features are the outputs of whole attention modules, in place of the mean over heads before their
projection; those of Swin and ConvNeXt are the outputs of whole blocks, averaged to at most 14 × 14 patches; images are
rolled by another offset along each axis; the density is taken over each image's own range; the usual R_TV is fixed,
and the classes take turns.
Tested on random weights alone: what the images are worth to a trained network is not measured.
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
    """30 pixels of jitter are an eighth of an image of 224, and about all of one of 32."""
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
    """Every default is that of the released code for DeiT; `steps` are those of both halves together."""
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
