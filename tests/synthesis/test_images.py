"""Other parametrisations than pixels, on the real loop: a generator with its latent vectors, and spectra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dfcompress.machine.execution import Execution
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.images import STARTING_STD, ParameterGroup, Spectrum
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
        if self.persistent and self.begun:
            self.latent.data.copy_(torch.randn(self.latent.shape, generator=generator))
            return
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


@pytest.mark.parametrize("images", [Generated, Spectrum])
def test_every_parametrisation_fits_a_photo(images, teacher, cifar10_train_file):
    """The squared error of one image falls to a third."""
    photo = torch.from_numpy(np.load(cifar10_train_file)["images"][:1]).float() / 255
    photo = teacher.normalise(photo.permute(0, 3, 1, 2) if photo.shape[-1] == 3 else photo)
    fit = Loss("fit", lambda trace: (trace.images - photo).square().mean())
    batch = synthesizer(teacher, images(), steps=150, losses=[fit], lr=0.3).batch(0, torch.zeros(8).long())
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
    template = Generated(persistent=True)
    made = synthesizer(teacher, template)
    made.batch(0, LABELS)
    assert not template.begun
    state = made.begin({1: LABELS})
    images, moments = state.images[0], state.optimizer.state
    assert images.network[1].num_batches_tracked == 6
    learnt = images.network[3].weight.detach().clone()
    steps(made, state, 1)
    assert state.optimizer.state is moments
    assert moments[images.latent]["step"] == 7
    assert images.network[1].num_batches_tracked == 7
    assert not torch.equal(images.network[3].weight, learnt)


@pytest.mark.parametrize("size", [(3, 224, 224), (1, 33, 40)])
def test_spectra_start_as_noise_that_falls_with_the_frequency(size, teacher):
    """Octaves of a photograph have about equal variance; of white noise each has four times that of the one below."""
    card = replace(teacher.card, input_size=size, mean=(0.5,) * size[0], std=(0.25,) * size[0])
    images = Spectrum()
    images.start(torch.zeros(16).long(), Classifier(teacher.network, card), torch.Generator().manual_seed(0))
    noise = images.render().detach()
    assert noise.shape == (16, *size)
    assert noise.std().item() == pytest.approx(STARTING_STD, rel=0.1)
    powers = torch.fft.fft2(noise).abs().square().mean((0, 1))
    along = powers[0]
    assert (along[2:4].sum() / along[8:16].sum()).item() == pytest.approx(7.3, rel=0.5)


def test_a_spectrum_is_shown_in_range_and_gets_gradients_where_it_was_clipped(teacher):
    images = Spectrum()
    images.start(LABELS, teacher, torch.Generator().manual_seed(0))
    images.load_state_dict({"coefficients": 50 * images.state_dict()["coefficients"]})
    shown = images.render()
    seen = teacher.denormalise(shown.detach())
    assert seen.min().item() == pytest.approx(0, abs=1e-6)
    assert seen.max().item() == pytest.approx(1, abs=1e-6)
    (gradient,) = torch.autograd.grad(shown.sum(), images.parameters()[0].parameters)
    brightness = gradient[:, 0, 0, 0, 0]
    assert torch.allclose(brightness, brightness[0].expand_as(brightness))
    assert brightness[0] > 1


def test_a_killed_spectrum_goes_on_to_the_same_bytes(teacher, tmp_path):
    whole = synthesizer(teacher, Spectrum())
    expected = steps(whole, whole.begin({0: LABELS}), 6).images[0].render()
    killed = synthesizer(teacher, Spectrum())
    steps(killed, killed.begin({0: LABELS}), 4).save(tmp_path / "state")
    again = synthesizer(teacher, Spectrum())
    state = again.begin({0: LABELS})
    state.load(tmp_path / "state")
    assert torch.equal(steps(again, state, 2).images[0].render(), expected)
