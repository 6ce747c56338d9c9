"""Objectives equal the values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.stages import Stage
from dfcompress.training import OBJECTIVES
from dfcompress.training.objectives import Prediction, attention, ce, feature, iq, kd, make_objectives, mse_logits


def test_kd_is_the_softened_divergence_times_the_temperature_squared():
    """p = (¾, ¼) at τ = 2 against (½, ½): τ²·(¾ ln 3/2 + ¼ ln 1/2)."""
    teacher = Prediction(torch.tensor([[2 * math.log(3.0), 0.0]]))
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kd(2.0).value(Prediction(torch.zeros(1, 2)), teacher).item() == pytest.approx(expected, rel=1e-5)


def test_kd_of_equal_answers_is_zero_and_its_mean_runs_over_the_batch():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert kd(4.0).value(Prediction(logits), Prediction(logits)).item() == pytest.approx(0.0, abs=1e-6)
    other = logits.flip(0)
    doubled = kd(4.0).value(Prediction(torch.cat([other, other])), Prediction(torch.cat([logits, logits])))
    assert doubled.item() == pytest.approx(kd(4.0).value(Prediction(other), Prediction(logits)).item(), rel=1e-5)


def test_ce_is_minus_the_log_of_what_the_student_gives_the_teachers_best_class():
    teacher, student = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[0.3, 0.1, -0.4]]).log_softmax(1)
    assert ce().value(Prediction(student), Prediction(teacher)).item() == pytest.approx(-student[0, 1].item(), rel=1e-6)


def test_mse_of_logits_is_a_mean_over_images_and_classes():
    assert mse_logits().value(Prediction(torch.zeros(2, 2)), Prediction(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))) == 2.5


def test_features_are_compared_through_adapters_that_train():
    pairs = [(Stage("a", 2), Stage("b", 3))]
    objective = feature(pairs)
    adapter = objective.adapters[0]
    nn.init.constant_(adapter.weight, 1.0)
    nn.init.zeros_(adapter.bias)
    student = Prediction(torch.zeros(1, 4), (torch.ones(1, 2, 2, 2),))
    given = torch.tensor([-1.0, 1.0]).repeat(6).view(1, 3, 2, 2)  # Of mean 0 and variance 12 / 11.
    value = objective.value(student, Prediction(torch.zeros(1, 4), (given,)))
    assert value.item() == pytest.approx(((2 + 1) ** 2 + (2 - 1) ** 2) / 2 * 11 / 12)
    value.backward()
    assert adapter.weight.grad.abs().sum() > 0


def test_adapters_between_equal_widths_begin_as_the_identity():
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    answer = Prediction(torch.zeros(2, 4), (features,))
    assert feature([(Stage("a", 3), Stage("b", 3))]).value(answer, answer).item() == pytest.approx(0.0, abs=1e-10)


def test_attention_sees_where_and_not_how_much():
    """Maps (1, 0) and (0, 1) after normalising: a squared distance of 2; scale does not matter."""
    left, right = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])
    value = attention().value(Prediction(left[0], (left,)), Prediction(left[0], (right,)))
    assert value.item() == pytest.approx(2.0)
    assert attention().value(Prediction(left[0], (left,)), Prediction(left[0], (7 * left,))).item() == pytest.approx(
        0.0
    )


def test_iq_is_summed_over_the_elements_of_an_image_and_a_mean_over_images_and_stages():
    """Smooth-L1 of 0.5 is 0.125, of 2 it is 1.5."""
    given = Prediction(torch.zeros(2, 3), (torch.zeros(2, 1, 1, 2), torch.zeros(2, 2, 1, 1)))
    own = (torch.tensor([0.5, 2.0, 0.0, 0.0]).view(2, 1, 1, 2), torch.full((2, 2, 1, 1), -2.0))
    value = iq().value(Prediction(torch.zeros(2, 3), own), given)
    assert value.item() == pytest.approx(((0.125 + 1.5) / 2 + 2 * 1.5) / 2)
    once = Prediction(torch.zeros(1, 3), tuple(features[:1] for features in own))
    twice = Prediction(torch.zeros(2, 3), tuple(features[:1].repeat(2, 1, 1, 1) for features in own))
    assert iq().value(twice, given).item() == pytest.approx(
        iq().value(once, given._replace(features=tuple(features[:1] for features in given.features))).item()
    )


def test_a_weight_multiplies_and_keeps_the_name():
    objective = 0.5 * kd(4.0)
    assert (objective.name, objective.weight) == ("kd", 0.5)


def test_every_objective_is_made_by_its_name():
    pairs = [(Stage("a", 3), Stage("b", 3))]
    made = make_objectives(dict.fromkeys(OBJECTIVES, 0.5), temperature=4.0, pairs=pairs, seed=0)
    assert tuple(objective.name for objective in made) == OBJECTIVES
    assert {objective.weight for objective in made} == {0.5}


def test_iq_takes_equally_many_channels_alone():
    pairs = [(Stage("a", 2), Stage("b", 3))]
    with pytest.raises(BadInput, match="Use feature, which adapts them"):
        make_objectives({"kd": 1.0, "iq": 0.001}, temperature=4.0, pairs=pairs, seed=0)


@pytest.mark.parametrize("weights", [{}, {"feature": 1.0}, {"kl": 1.0}, {"kd": 0.0}, {"kd": math.nan}])
def test_unknown_objectives_and_weights_are_refused(weights):
    with pytest.raises(BadInput, match="objective"):
        make_objectives(weights, temperature=4.0, pairs=[], seed=0)
