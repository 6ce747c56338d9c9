"""Two classifiers on the same images: what one answers differently, and whether that is more than chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import bdtr, ndtri
from torch import Tensor

NOISE = 0.05  # p-values from here on are within noise.


class Move(NamedTuple):
    """So many `images` that were taken for the class `before` are now taken for the class `after`."""

    before: int
    after: int
    images: int


def moves(before: Tensor, after: Tensor) -> list[Move]:
    """The pairs of different answers `(N,)`, the most frequent first."""
    changed = before != after
    pairs = Counter(zip(before[changed].tolist(), after[changed].tolist(), strict=True))
    return [Move(*pair, images) for pair, images in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: how often so uneven a split of the `gained + lost` images that one
    classifier alone has right would come of tossing a coin for each. 1 where there are none.
    """
    changed = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), changed, 0.5))) if changed else 1.0


def difference_interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """The 95 % confidence interval of (gained − lost) / images, a difference of paired proportions in [−1, 1]. It holds
    0 exactly where `mcnemar` is `NOISE` or more.

    Wald's interval after half an image is added to each of the four counts (Agresti & Min 2005, section 2), which
    reaches on to 0 where the exact test does not rule 0 out. (An interval of the exact test alone takes the number of
    changed images for certain: where a model loses 1 % of 846 images and gains none, it is right 46 % of the time, this
    one 92 %.)
    """
    gains, losses, total = gained + 0.5, lost + 0.5, images + 2
    difference = (gains - losses) / total
    error = math.sqrt((gains + losses) / total - difference**2) / math.sqrt(total)
    reach = float(ndtri(1 - NOISE / 2)) * error
    low, high = max(-1.0, difference - reach), min(1.0, difference + reach)
    return (min(low, 0.0), max(high, 0.0)) if mcnemar(gained, lost) >= NOISE else (low, high)


def tail_degradation(
    before: Sequence[float | None], after: Sequence[float | None], order: Sequence[int]
) -> list[float]:
    """For N = 1, 2, ... the mean relative loss of accuracy over those of the first N classes of `order` that lost
    (Haroush 2020, appendix F), each in [0, 1]; 0 where none lost.

    `before` and `after` are accuracies by class, None where a class has no images.
    """
    losses: list[float] = []
    curve = []
    for each in order:
        was, now = before[each], after[each]
        if was and now is not None and now < was:
            losses.append((was - now) / was)
        curve.append(sum(losses) / len(losses) if losses else 0.0)
    return curve
