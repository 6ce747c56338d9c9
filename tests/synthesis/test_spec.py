"""A synthesis resolved for one teacher."""

from __future__ import annotations

import pytest
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.losses import class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates, Synthesis
from dfcompress.synthesis.recipes import bns_inception
from dfcompress.synthesis.spec import resolve


def teacher_of(side, *, head):
    """A convolution of stride 4, a trained BatchNorm, and a head for 8 × 8 squares of 3 channels."""
    network = nn.Sequential(nn.Conv2d(3, 3, 4, stride=4), nn.BatchNorm2d(3), *head)
    network[1].running_mean.add_(0.1)
    network[1].num_batches_tracked.add_(1)
    return Classifier(network, ModelCard("net", 200, (3, side, side), (0.5,) * 3, (0.25,) * 3))


def pooled():
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 200)]


def flat(side):
    return [nn.Flatten(), nn.Linear(3 * (side // 4) ** 2, 200)]


def phases(side, head, **settings):
    spec = resolve(teacher_of(side, head=head), Synthesis(recipe="bns-inception", images=4, settings=settings))
    return [(phase.transforms[0].downscale, phase.steps) for phase in spec.recipe.phases], spec


QUARTER, HALF, FULL = 16, 12, 5
STEPS = {"quarter_steps": QUARTER, "half_steps": HALF, "steps": FULL}


@pytest.fixture
def coarse(monkeypatch):
    """The preset for large images with known numbers of steps."""
    monkeypatch.setitem(bns_inception.PRESETS, "fast-imagenet", {**bns_inception.PRESETS["fast-imagenet"], **STEPS})


def test_the_first_steps_show_smaller_images_where_the_network_takes_them(coarse):
    found, spec = phases(224, pooled())
    assert found == [(4, QUARTER), (2, HALF), (1, FULL)]
    assert spec.recipe.work == QUARTER / 16 + HALF / 4 + FULL


def test_a_network_for_one_size_gets_steps_of_the_same_work_at_that_size(coarse):
    found, spec = phases(224, flat(224))
    assert found == [(1, FULL + QUARTER // 16 + HALF // 4)]
    assert spec.choice.settings["half_steps"] == spec.choice.settings["quarter_steps"] == 0


def test_images_are_never_shown_smaller_than_objects_can_be_seen_in(coarse):
    assert phases(112, pooled())[0] == [(2, HALF), (1, FULL + QUARTER // 16)]


def test_first_steps_that_were_asked_for_stay(coarse):
    assert phases(112, pooled(), quarter_steps=7)[0][0] == (4, 7)


def test_no_batches_side_by_side_are_refused():
    with pytest.raises(BadInput, match="groups must be 1 batch or more; it is 0"):
        Synthesis(groups=0)


def test_images_that_live_on_have_one_phase():
    """A second one would begin with the first one's transforms and optimiser."""

    def painted() -> Recipe:
        updates = StudentUpdates(steps=1, lr=0.1, batch_size=8, keep=False, rounds=1)
        images = Generator(width=2, persistent=True)
        return Recipe(images, 8, [class_cross_entropy()], [Phase(1, 0.1), Phase(1, 0.1)], updates)

    with pytest.raises(BadInput, match="in one phase"):
        resolve(teacher_of(32, head=pooled()), Synthesis(recipe=painted, images=8))
