"""Two classifiers on the same images, against numbers that are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import binomtest

from dfcompress.evaluation.pairs import Move, difference_interval, mcnemar, moves, tail_degradation


def test_mcnemar_is_the_exact_binomial_test_of_the_split():
    assert mcnemar(5, 15) == pytest.approx(0.0413895, abs=1e-7)  # 2 · P(Bin(20, ½) ≤ 5)
    for gained, lost in [(0, 1), (3, 3), (16, 33), (700, 800), (10_000, 10_400)]:
        assert mcnemar(gained, lost) == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert mcnemar(0, 0) == 1.0


def test_the_interval_is_walds_after_half_an_image_is_added_to_each_count():
    low, high = difference_interval(16, 33, 846)
    middle, error = -17 / 848, (50 / 848 - (17 / 848) ** 2) ** 0.5 / 848**0.5
    assert (low, high) == pytest.approx((middle - 1.959964 * error, middle + 1.959964 * error), abs=1e-7)
    assert difference_interval(3, 3, 100) == pytest.approx((-0.05084, 0.05084), abs=1e-5)
    assert difference_interval(0, 1, 1)[0] == -1.0


def test_the_interval_holds_zero_where_the_exact_test_does_not_rule_it_out():
    assert difference_interval(10, 22, 846) == pytest.approx((-0.027394, 0), abs=1e-6)  # Wald's ends at -0.0009.
    for gained, lost in itertools.product(range(30), repeat=2):
        for images in (max(1, gained + lost), 846):
            low, high = difference_interval(gained, lost, images)
            assert (low <= 0 <= high) == (mcnemar(gained, lost) >= 0.05)


def test_moves_are_the_pairs_of_different_answers_the_most_frequent_first():
    before, after = torch.tensor([3, 3, 3, 5, 1, 2]), torch.tensor([5, 3, 5, 3, 0, 2])
    assert moves(before, after) == [Move(3, 5, 2), Move(1, 0, 1), Move(5, 3, 1)]


def test_the_tail_takes_the_mean_over_those_classes_that_lost():
    before = [0.8, 0.5, 0.9, None, 0.0]
    after = [0.4, 0.6, 0.6, None, 0.5]
    # In order: a class without images, one that gained, one that lost half, one never right, one that lost a third.
    curve = tail_degradation(before, after, [3, 1, 0, 4, 2])
    assert curve == pytest.approx([0, 0, 0.5, 0.5, (0.5 + 1 / 3) / 2])
