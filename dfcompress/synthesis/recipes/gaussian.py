"""Gaussian images: nothing is optimised (Haroush et al. 2020, section 3.1).

Samples of N(mean, std) of the input data, which is N(0, 1) in normalised space.
The label is the teacher's answer. The baseline that every other recipe must beat.
"""

from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.recipe import Recipe

PAPER = "Haroush et al., The Knowledge Within: Methods for Data-Free Model Compression, CVPR 2020"
PRESETS: dict[str, dict[str, object]] = {"paper": {}}


def gaussian(*, batch_size: int = 256) -> Recipe:
    """x ~ N(0, 1) in normalised space."""
    return Recipe(images=Pixels(), batch_size=batch_size)
