"""Gaussian images: nothing is optimised (Haroush et al. 2020, section 3.1).

Samples of N(mean, std) of the input data, which is N(0, 1) in normalised space, or of `mean` and `std` in [0, 1]. The
labels are the teacher's predictions.
This is the baseline that every other recipe must beat.
"""

from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.recipe import Recipe

PAPER = "Haroush et al., The Knowledge Within: Methods for Data-Free Model Compression, CVPR 2020"
PRESETS: dict[str, dict[str, object]] = {"paper": {}}


def gaussian(*, mean: float = 0.0, std: float = 0.0, batch_size: int = 256) -> Recipe:
    """x ~ N(mean, std) in [0, 1], or N(0, 1) in normalised space if both are 0."""
    return Recipe(images=Pixels(mean=mean, std=std), batch_size=batch_size)
