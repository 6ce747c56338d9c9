"""Other parametrisations than pixels, on the real loop: a generator with its latent vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dfcompress.device import Execution
from dfcompress.models.checkpoint import load
from dfcompress.synthesis.images import ParameterGroup
from dfcompress.synthesis.losses import Loss, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe
from dfcompress.synthesis.synthesizer import Synthesizer

EAGER = Execution("cpu", "fp32", False, 1, "")
LABELS = torch.arange(8) % 10


class Generated:
    """Images of a convolution and a BatchNorm, from latent vectors with a rate of their own."""

    in_range = False

    def __init__(self, *, persistent=False):
        self.persistent = persistent
        self.network = nn.Sequential(
            nn.ConvTranspose2d(4, 6, 4, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 8, 8)
        )
        self.begun = False

    def start(self, labels, teacher, generator, pixels=None):
        if not (self.persistent and self.begun):
            for parameter in self.network.parameters():
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        self.begun = True
        self.latent = torch.randn(len(labels), 4, 1, 1, generator=generator).requires_grad_(True)

    def parameters(self):
        return [ParameterGroup([*self.network.parameters()], factor=0.1), ParameterGroup([self.latent], lr=0.02)]

    def render(self):
        return self.network(self.latent)

    def project(self):
        """Nothing to put back."""

    def state_dict(self):
        return {"latent": self.latent, **self.network.state_dict(prefix="network.")}

    def load_state_dict(self, state):
        self.latent.data.copy_(state["latent"])
        prefix = "network."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


def synthesizer(teacher, images, *, steps=6, losses=None, lr=0.05):
    recipe = Recipe(
        images=images, batch_size=8, losses=losses or [class_cross_entropy()], phases=[Phase(steps, lr, (0.5, 0.9))]
    )
    return Synthesizer(recipe, teacher, EAGER)


def steps(made, state, count):
    for _ in range(count):
        made.step(state)
    return state


def test_a_generator_fits_a_photo(teacher, cifar10_train_file):
    """Every parametrisation must be able to: the squared error of one image falls to a third."""
    photo = torch.from_numpy(np.load(cifar10_train_file)["images"][:1]).float() / 255
    photo = teacher.normalise(photo.permute(0, 3, 1, 2) if photo.shape[-1] == 3 else photo)
    fit = Loss("fit", lambda trace: (trace.images - photo).square().mean())
    batch = synthesizer(teacher, Generated(), steps=150, losses=[fit], lr=0.3).batch(0, torch.zeros(8).long())
    assert batch.history[-1]["fit"] < batch.history[0]["fit"] / 3


def test_a_killed_generator_goes_on_to_the_same_bytes_with_its_buffers(teacher, tmp_path):
    whole = synthesizer(teacher, Generated())
    expected = steps(whole, whole.begin({0: LABELS}), 6).images[0].state_dict()
    killed = synthesizer(teacher, Generated())
    steps(killed, killed.begin({0: LABELS}), 4).save(tmp_path / "state")
    again = synthesizer(teacher, Generated())
    state = again.begin({0: LABELS})
    state.load(tmp_path / "state")
    found = steps(again, state, 2).images[0].state_dict()
    assert found.keys() == expected.keys()
    assert found["network.1.num_batches_tracked"] == 6
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_group_of_parameters_has_its_own_rate(teacher):
    """Adam's first step moves every parameter by its rate, and in the cosine's middle by half of it."""
    made = synthesizer(teacher, Generated())
    state = made.begin({0: LABELS})
    before = {name: value.detach().clone() for name, value in state.images[0].state_dict().items()}
    made.step(state)
    after = state.images[0].state_dict()
    assert (after["latent"] - before["latent"]).abs().max().item() == pytest.approx(0.02, rel=1e-3)
    moved = (after["network.3.weight"] - before["network.3.weight"]).abs().max().item()
    assert moved == pytest.approx(0.1 * 0.05, rel=1e-3)
    phase = Phase(10, 0.05, schedule="cosine", warmup=2)
    assert [phase.rate(step, peak=0.02) for step in (0, 1, 6)] == pytest.approx([0.01, 0.02, 0.01])


def test_a_batch_leaves_the_recipe_as_it_was(teacher):
    """Every batch begins with a copy; previews and finished images change no buffer either."""
    images = Generated()
    before = {name: value.clone() for name, value in images.network.state_dict().items()}
    made = synthesizer(teacher, images)
    first = made.batch(0, LABELS, watch=lambda step, show: show()).images
    assert torch.equal(made.batch(0, LABELS).images, first)
    assert all(torch.equal(value, before[name]) for name, value in images.network.state_dict().items())


def test_a_persistent_generator_goes_on_learning_with_the_next_batch(teacher):
    images = Generated(persistent=True)
    made = synthesizer(teacher, images)
    made.batch(0, LABELS)
    assert images.network[1].num_batches_tracked == 6
    learnt = images.network[3].weight.detach().clone()
    state = made.begin({1: LABELS})
    assert state.images[0] is images
    assert torch.equal(images.network[3].weight, learnt)
    steps(made, state, 1)
    assert images.network[1].num_batches_tracked == 7
