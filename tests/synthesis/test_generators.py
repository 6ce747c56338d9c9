"""A generator as images: sizes, what it draws and keeps, and its trick, on the real loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfcompress.machine.execution import Execution
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.generators import Generator, convolved_doubled
from dfcompress.synthesis.losses import bn_distance, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe
from dfcompress.synthesis.synthesizer import Synthesizer

EAGER = Execution("cpu", "fp32", False, 1, "")
LABELS = torch.arange(8) % 4


def a_teacher(channels=3, height=32, width=32):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    network[1].running_mean.uniform_(-1, 1)
    card = ModelCard("net", 4, (channels, height, width), (0.4,) * channels, (0.3,) * channels)
    return Classifier(network, card).frozen()


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def started(images, teacher=None, *, seed=1):
    images.start(LABELS, teacher or a_teacher(), drawn(seed))
    return images


def synthesizer(images, *, execution=EAGER, steps=5):
    recipe = Recipe(
        images=images,
        batch_size=8,
        losses=[class_cross_entropy(), bn_distance()],
        phases=[Phase(steps, 0.01, (0.5, 0.999))],
    )
    return Synthesizer(recipe, a_teacher(), execution)


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 224, 224), (1, 33, 40), (3, 5, 7)])
def test_images_have_the_cards_size_and_stay_in_range(size):
    teacher = a_teacher(*size)
    images = started(Generator(width=2, latent=8), teacher)
    shown = teacher.denormalise(images.render())
    assert shown.shape == (8, *size)
    assert shown.min() >= -1e-6
    assert shown.max() <= 1 + 1e-6
    assert shown.std(0).mean() > 1e-3
    (gradients,) = (
        torch.autograd.grad(images.render().square().sum(), group.parameters) for group in images.parameters()
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_transposed_convolution_is_that_of_doubled_maps():
    maps = torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.double, requires_grad=True)
    expected = F.conv2d(F.interpolate(maps, scale_factor=2), weight, padding=1)
    found = convolved_doubled(maps, weight)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [maps, weight], cotangent), torch.autograd.grad(expected, [maps, weight], cotangent)
    )


def test_a_seed_is_a_generator_and_another_seed_another_one():
    first, again, other = (started(Generator(width=2), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])


def test_the_next_batch_of_a_persistent_generator_has_new_vectors_in_the_same_memory():
    images = started(Generator(width=2, persistent=True, conditional=True, learn_latents=True))
    before = {name: (tensor, tensor.clone()) for name, tensor in images.state_dict().items()}
    images.start(LABELS.flip(0), a_teacher(), drawn(2))
    after = images.state_dict()
    assert {name for name, (_, value) in before.items() if not torch.equal(value, after[name])} == {"latents", "labels"}
    assert all(tensor.data_ptr() == after[name].data_ptr() for name, (tensor, _) in before.items())


def test_fresh_noise_begins_the_first_layer_anew_and_leaves_what_the_others_learnt():
    images = started(Generator(width=2, persistent=True, fresh_noise=True))
    before = {name: tensor.clone() for name, tensor in images.state_dict().items()}
    images.start(LABELS, a_teacher(), drawn(2))
    changed = {name for name, tensor in images.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"first.weight", "latents"}


@pytest.mark.parametrize("conditional", [False, True])
def test_classes_count_only_where_the_generator_is_conditional(conditional):
    shown = []
    for labels in (LABELS, LABELS.flip(0)):
        images = Generator(width=2, conditional=conditional)
        images.start(labels, a_teacher(), drawn(1))
        shown.append(images.render())
    assert torch.equal(*shown) == (not conditional)


def test_vectors_are_learnt_at_their_own_rate_if_asked_to():
    assert len(started(Generator(width=2)).parameters()) == 1
    weights, latents = started(Generator(width=2, learn_latents=True, latent_lr=0.3)).parameters()
    assert (weights.lr, latents.lr) == (None, 0.3)


def test_a_generator_learns_side_by_side_as_alone_and_leaves_the_recipe_as_it_was():
    images = Generator(width=2, learn_latents=True)
    made = synthesizer(images)
    together = made.batches({0: LABELS, 1: LABELS})
    for shard, batch in enumerate(together):
        alone = made.batch(shard, LABELS)
        torch.testing.assert_close(batch.images, alone.images, atol=1e-4, rtol=0)
        total = [point["cross_entropy"] + point["bn_distance"] for point in alone.history]
        assert total[-1] < total[0]
    assert not images._weights


def test_a_killed_generator_goes_on_to_the_same_bytes(tmp_path):
    whole = synthesizer(Generator(width=2, conditional=True, learn_latents=True)).batch(0, LABELS)
    killed = synthesizer(Generator(width=2, conditional=True, learn_latents=True))
    state = killed.begin({0: LABELS})
    for _ in range(3):
        killed.step(state)
    state.save(tmp_path / "state")
    again = synthesizer(Generator(width=2, conditional=True, learn_latents=True))
    assert torch.equal(again.batch(0, LABELS, partial=tmp_path / "state").images, whole.images)


@pytest.mark.release
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_images_are_the_eager_ones(precision):
    execution = replace(EAGER, precision=precision)
    shown = []
    for compile_ in (False, True):
        images = Generator(width=4, conditional=True)
        images.compute_as(replace(execution, compile=compile_))
        shown.append(started(images).render())
    torch.testing.assert_close(shown[0], shown[1], atol=0.05 if precision == "bf16" else 1e-5, rtol=0)
