"""Comparison of two classifiers on the same images: their different predictions, and whether these are significant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import bdtr, ndtri
from torch import Tensor

NOISE = 0.05  # A difference whose p-value is at least this counts as noise.


class Move(NamedTuple):
    """The number of `images` that one classifier assigns to the class `before`, and the other to the class `after`."""

    before: int
    after: int
    images: int


def moves(before: Tensor, after: Tensor) -> list[Move]:
    """The pairs of different classes in the predictions `before` and `after`, each `(N,)`; the most frequent first."""
    changed = before != after
    pairs = Counter(zip(before[changed].tolist(), after[changed].tolist(), strict=True))
    return [Move(*pair, images) for pair, images in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test on the `gained + lost` images that only one classifier has right:
    the probability that fair coin tosses split them at least as unevenly. 1 where there are no such images.
    """
    changed = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), changed, 0.5))) if changed else 1.0


def difference_interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """The 95 % confidence interval of (gained − lost) / images, a difference of paired proportions in [−1, 1]. It
    contains 0 exactly where `mcnemar` is at least `NOISE`.

    It is Wald's interval with half an image added to each of the four counts (Agresti & Min 2005, section 2), widened
    to 0 where the exact test does not exclude 0. (An interval from the exact test alone would treat the number of
    changed images as certain. For a model that loses 1 % of 846 images and gains none, such an interval covers the true
    value 46 % of the time, and this interval 92 %.)
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
    """For N = 1, 2, ... the mean relative loss of accuracy over the first N classes of `order`, counting only classes
    that lost accuracy (Haroush 2020, appendix F); each in [0, 1], and 0 where no class lost.

    `before` and `after` are accuracies by class, None for a class without images.
    """
    losses: list[float] = []
    curve = []
    for each in order:
        was, now = before[each], after[each]
        if was and now is not None and now < was:
            losses.append((was - now) / was)
        curve.append(sum(losses) / len(losses) if losses else 0.0)
    return curve
