"""Each loss of a generator equals the value worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfcompress.errors import BadInput
from dfcompress.machine.execution import Execution
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.layers import last_weighted_layer
from dfcompress.models.recorder import FusedRecorder, HookRecorder
from dfcompress.models.trace import Rest, Trace, traces
from dfcompress.synthesis.generator_losses import (
    auxiliary_head,
    class_balance,
    contrast,
    disagreement,
    feature_activation,
    feature_count,
    on_view,
    own_argmax_cross_entropy,
    squared_bn_distance,
    weighted_losses,
)
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import Want, bn_distance, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe
from dfcompress.synthesis.synthesizer import Synthesizer
from dfcompress.synthesis.transforms import random_crops, random_shifts, views

EAGER = Execution("cpu", "fp32", False, 1, "")
A, B = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([[0.6, 0.4], [0.9, 0.1]])


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip
    for layer in (network[1], network[4]):
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return Classifier(network, ModelCard("net", 4, (1, 12, 12), (0.5,), (0.5,))).frozen()


def recorded(teacher, images, labels, **kwargs):
    recorder = HookRecorder(teacher.network, moments=True, last=last_weighted_layer(teacher))
    (trace,) = traces(images, labels, recorder(images), **kwargs)
    return trace


def inputs_of_batchnorms(teacher, images):
    first = teacher.network[0](images)
    return [(teacher.network[1], first), (teacher.network[4], teacher.network[:4](images))]


def standardised(teacher, images):
    """Channel means of all BatchNorm inputs, as BatchNorm sees them."""
    return torch.cat(
        [
            (features.mean((2, 3)) - layer.running_mean) / layer.running_var.sqrt()
            for layer, features in inputs_of_batchnorms(teacher, images)
        ],
        1,
    )


def test_own_cross_entropy_is_the_surprise_at_the_likeliest_class():
    value = own_argmax_cross_entropy().value(Trace(None, None, A.log()))
    assert value.item() == pytest.approx(-(math.log(0.8) + math.log(0.7)) / 2)


def test_class_balance_is_least_where_classes_are_even_whole_or_in_chunks():
    value = class_balance().value(Trace(None, None, A.log()))
    assert value.item() == pytest.approx(0.55 * math.log(0.55) + 0.45 * math.log(0.45))
    half = Trace(None, None, A[:1].log(), rest=Rest(2, 0.5, {"class_balance": 0.5 * A[1]}))
    assert class_balance().value(half).item() == pytest.approx(value.item())
    assert class_balance().value(Trace(None, None, torch.tensor([[999.0, 0.0]]))).isfinite()


def test_disagreement_is_the_negative_divergence_of_student_from_teacher():
    given = Trace(None, None, 2 * A.log(), student_logits=2 * B.log())
    by_hand = (A * (A / B).log()).sum(1)
    assert disagreement(2.0).value(given).item() == pytest.approx(-by_hand.mean().item(), rel=1e-5)
    assert disagreement(2.0, where_agreed=True).value(given).item() == pytest.approx(-by_hand[0].item() / 2, rel=1e-5)
    with pytest.raises(BadInput, match="temperature"):
        disagreement(0.0)


def test_squared_bn_distance_is_the_mean_over_layers_of_squared_differences(teacher):
    images = torch.randn(6, 1, 12, 12)
    by_hand = [
        (f.mean((0, 2, 3)) - layer.running_mean).square().sum()
        + (f.std((0, 2, 3), correction=0) - layer.running_var.sqrt()).square().sum()
        for layer, f in inputs_of_batchnorms(teacher, images)
    ]
    value = squared_bn_distance().value(recorded(teacher, images, torch.zeros(6).long()))
    assert value.item() == pytest.approx(sum(by_hand).item() / 2, rel=1e-4)


def test_features_before_the_last_layer_are_recorded_by_both_recorders(teacher):
    images = torch.randn(6, 1, 12, 12)
    expected = -teacher.network[:8](images).abs().mean()
    assert feature_activation().value(recorded(teacher, images, torch.zeros(6).long())).item() == pytest.approx(
        expected.item()
    )
    fused = FusedRecorder(teacher.network, last=last_weighted_layer(teacher))
    (trace,) = traces(images, torch.zeros(6).long(), fused(images))
    assert feature_activation().value(trace).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_of_one_view_sees_its_images_alone(teacher):
    images, labels = torch.randn(6, 1, 12, 12), torch.tensor([0, 1, 2])
    both = recorded(teacher, images, labels)
    for number, shown in enumerate(images.chunk(2)):
        alone = recorded(teacher, shown, labels)
        for loss in (class_cross_entropy(), bn_distance(), squared_bn_distance()):
            assert on_view(loss, number).value(both).item() == pytest.approx(loss.value(alone).item(), rel=1e-4)


def test_the_auxiliary_head_is_a_linear_layer_that_learns_the_teachers_answers(teacher):
    images, labels = torch.randn(6, 1, 12, 12), torch.arange(6) % 4
    trace, features = recorded(teacher, images, labels), standardised(teacher, images)
    loss = auxiliary_head(3.0).sized_for(teacher)
    state = loss.module_state(torch.device("cpu"))
    assert loss.value_with(state, trace).item() == pytest.approx(math.log(4))
    with torch.no_grad():
        state["weight"].copy_(torch.randn(4, 8))
    logits = features @ state["weight"].detach().T
    assert loss.value_with(state, trace).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    own = auxiliary_head(3.0, own_argmax=True).sized_for(teacher)
    expected = F.cross_entropy(logits, trace.logits.argmax(1))
    assert own.value_with(state, trace).item() == pytest.approx(expected.item(), rel=1e-4)
    assert (loss.learns_with_student, Want.LABELS in loss.wants, Want.LABELS in own.wants) == (True, True, False)
    of_head = loss.module_loss(state, trace)
    target, answer = (trace.logits / 3).softmax(1), (logits / 3).softmax(1)
    assert of_head.item() == pytest.approx((target * (target / answer).log()).sum(1).mean().item(), rel=1e-4)


def test_contrast_tells_local_views_apart_from_all_global_ones_that_it_remembers(teacher):
    """Two steps of one batch, then another batch: only the last features of the first are looked at."""
    loss = contrast(batch_size=3, steps=2, remembered=6, units=7).sized_for(teacher)
    state = loss.module_state(torch.device("cpu"))
    assert feature_count(teacher) == 8
    batches = torch.randn(3, 6, 1, 12, 12)

    def directions(features):
        hidden = F.relu(features @ state["hidden"].T)
        return F.normalize(hidden @ state["head"].T, dim=1)

    def by_hand(shown):
        of_globals, of_locals = (directions(torch.cat(parts)) for parts in zip(*shown, strict=True))
        return F.cross_entropy(of_locals @ of_globals.T / 0.1, torch.arange(len(of_globals)), reduction="none")

    pairs = [standardised(teacher, images).chunk(2) for images in batches]
    found = [loss.value_with(state, recorded(teacher, images, torch.zeros(3).long())).item() for images in batches]
    assert found[:2] == pytest.approx([by_hand([pair]).mean().item() for pair in pairs[:2]], rel=1e-4)
    both = by_hand([pairs[2], pairs[1]])
    assert found[2] == pytest.approx((both[:3].mean() + both[3:].mean()).item(), rel=1e-4)
    assert state["calls"] == 3


def test_a_table_of_weights_makes_the_losses_that_have_one():
    assert [(loss.name, loss.weight) for loss in weighted_losses(adv=1.0, bn=2.0, balance=20.0)] == [
        ("disagreement", 1.0),
        ("bn_distance", 2.0),
        ("class_balance", 20.0),
    ]


def test_losses_of_single_views_are_never_computed_in_chunks():
    """Copies of one image are a whole batch apart."""
    recipe = Recipe(images=Pixels(), losses=[on_view(class_cross_entropy(), 0)], batch_size=8)
    assert recipe.needs_whole_batch
    assert not replace(recipe, losses=[class_cross_entropy()]).needs_whole_batch


@pytest.mark.parametrize("compile_", [False, pytest.param(True, marks=pytest.mark.release)])
def test_contrast_runs_in_the_loop_and_leaves_features_of_the_batch(teacher, compile_):
    shown = views(random_shifts(1), random_crops(1, smallest=0.5, cutout=0.0))
    recipe = Recipe(
        images=Generator(width=2, learn_latents=True),
        losses=[on_view(class_cross_entropy(), 0), contrast(batch_size=8, steps=3, remembered=8)],
        phases=[Phase(3, 0.01, transforms=[shown])],
        batch_size=8,
    )
    made = Synthesizer(recipe, teacher, replace(EAGER, compile=compile_))
    state = made.begin({0: torch.arange(8) % 4})
    for _ in range(3):
        made.step(state)
    module = state.modules[0]["contrast"]
    assert module["calls"] == 3
    assert module["filled"].tolist() == [1.0, 0.0]
    assert module["memory"][:, 0].abs().min(2).values.min() > 0


class Partly(nn.Module):
    """One BatchNorm runs twice, and one in training alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.auxiliary = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))

    def forward(self, images):
        features = self.norm(self.conv(self.norm(images)))
        if self.training:
            self.auxiliary(features)
        return features.mean((2, 3))


def test_features_are_those_of_the_layers_that_run():
    teacher = Classifier(Partly(), ModelCard("test", 3, (3, 4, 4), (0.5,) * 3, (0.3,) * 3)).frozen()
    assert feature_count(teacher) == 6
