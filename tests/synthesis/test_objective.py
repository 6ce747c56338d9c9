"""The loss and the gradient of a step: against plain autograd, of several batches at once, and in chunks."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from test_synthesizer import EAGER, LABELS, synthesizer

from dfcompress.machine import compiling
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import HookRecorder
from dfcompress.models.trace import Target
from dfcompress.synthesis import losses
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.objective import losses_of
from dfcompress.synthesis.recipe import Phase, Recipe, choose
from dfcompress.synthesis.records.targets import BatchTargets
from dfcompress.synthesis.synthesizer import Synthesizer


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


def gradient(made, images, labels=LABELS, groups=1):
    """Gradient and unweighted losses of normalised images, through the synthesizer's own objective, without views."""
    seen = images.clone().requires_grad_(True)
    phase = made.recipe.phases[0]
    state = made.begin(dict(enumerate(labels.chunk(groups))))
    state.put_drawn(
        [[tuple(map(torch.zeros_like, numbers)) for numbers in drawn] for drawn in made._drawn(state, phase)]
    )
    total, values = made.objective(state, phase, list(seen.chunk(groups)))
    return torch.autograd.grad(total, seen)[0], values


def noise(count=16):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "blocks"),
    [
        ("resnet20_file", 1),  # Of three in each stage: compiling all takes half a minute.
        pytest.param("resnet20_file", 3, marks=pytest.mark.release),
        pytest.param("resnet44_file", 7, marks=pytest.mark.release),
    ],
)
def test_every_trick_gives_the_gradients_of_plain_autograd(file, blocks, request):
    """Hooks and plain autograd on the untouched network, against the fused recorder, and that compiled."""
    teacher = load(request.getfixturevalue(file)).frozen()
    for stage in ("layer1", "layer2", "layer3"):
        setattr(teacher.network, stage, getattr(teacher.network, stage)[:blocks])
    recipe = choose("deepinversion", "paper-cifar10", {"batch_size": 16}).recipe
    images = noise().requires_grad_(True)
    recorder = HookRecorder(teacher.network, moments=True)
    total, expected_values, _ = losses_of(recipe)(images, LABELS, recorder(images))
    expected = torch.autograd.grad(total, images)[0]
    for execution in (EAGER, replace(EAGER, compile=True)):
        ours, values = gradient(Synthesizer(recipe, teacher, execution), images.detach())
        torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-5)
        # Rounding moves single activations across ReLU's kink: a few pixels differ, the gradient as a whole does not.
        assert (ours - expected).abs().median() < 1e-5 * expected.abs().max()
        assert (ours - expected).norm() < 2e-3 * expected.norm()


def test_groups_have_the_gradients_of_single_batches(teacher):
    images, labels = noise(32), torch.cat([LABELS, LABELS.flip(0)])
    together, values = gradient(synthesizer(teacher, 1), images, labels, groups=2)
    one = synthesizer(teacher, 1)
    alone = [gradient(one, own, own_labels) for own, own_labels in zip(images.chunk(2), labels.chunk(2), strict=True)]
    torch.testing.assert_close(values, torch.cat([values for _, values in alone]), rtol=1e-5, atol=1e-5)
    expected = torch.cat([own for own, _ in alone])
    assert (together - expected).norm() < 1e-5 * expected.norm()


class Sampled:
    """A record that wants the same of every image's logits and of a layer, and multiplies no dropout."""

    layers, fixes_dropout = ("logits", "layer1.0.conv1"), False

    def sample(self, labels, random):
        sizes = {"logits": 10, "layer1.0.conv1": 16 * 32 * 32}
        values = {layer: torch.randn(len(labels), size, generator=random) for layer, size in sizes.items()}
        return BatchTargets({layer: Target(each, torch.tensor(0.5)) for layer, each in values.items()})


# All losses but those that own a module; weighted so that none is lost beside the others.
LOSSES = [
    losses.class_cross_entropy(),
    losses.inception(1.0),
    losses.competition(),
    losses.bn_distance(first=10.0),
    0.1 * losses.bn_distance(),
    losses.bn_divergence(),
    losses.pixel_divergence(),
    0.1 * losses.activation_distance(0.1, later=2.0),
    1e-2 * losses.total_variation(),
    1e-2 * losses.usual_variation(),
    losses.smoothness(),
    1e-2 * losses.image_norm(),
    losses.image_norm(each=True),
]


def in_chunks(teacher, recipe, chunk, *, compiled=False):
    """With a student that answers otherwise than its teacher."""
    student = Classifier(copy.deepcopy(teacher.network), teacher.card).frozen()
    student.network.fc.weight.mul_(-0.5)
    execution = replace(EAGER, chunk=chunk, compile=compiled)
    return Synthesizer(recipe, teacher, execution, student=student, sampler=Sampled())


def first_step(made):
    """The values and the gradient of the first step, at the images that it begins with."""
    state = made.begin({0: LABELS})
    made.step(state)
    return state.history[0], state.parameters[0].grad


def test_every_loss_is_tried_in_chunks():
    makers = [each for each in vars(losses).values() if inspect.isfunction(each) and each.__module__ == losses.__name__]
    makers = [each for each in makers if inspect.signature(each).return_annotation == "Loss"]
    names = {each.__name__.removeprefix("class_") for each in makers}
    # ResNet-20 has no patches.
    assert {loss.name for loss in LOSSES} == names - {"patch_similarity"}


@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_chunks_have_the_loss_and_the_gradient_of_their_batch(teacher, number):
    """16 images in chunks of 4, and of 6, of which the last has 4."""
    recipe = Recipe(images=Pixels(), losses=[LOSSES[number]], phases=[Phase(1, 0.1)], batch_size=16)
    expected_values, expected = first_step(in_chunks(teacher, recipe, None))
    for chunk in (4, 6):
        values, gradient = first_step(in_chunks(teacher, recipe, chunk))
        torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-6)
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_chunks_of_compiled_losses_have_the_loss_of_their_batch(teacher, monkeypatch):
    """All of them together; the network and the losses are compiled once each for chunks of one size."""
    graphs = []
    monkeypatch.setattr(compiling, "_inductor", lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()
    different = {loss.name: loss for loss in LOSSES}.values()
    recipe = Recipe(images=Pixels(), losses=[*different], phases=[Phase(2, 0.1)], batch_size=16)
    expected_values, expected = first_step(in_chunks(teacher, recipe, None))
    made = in_chunks(teacher, recipe, 4, compiled=True)
    state = made.begin({0: LABELS})
    made.step(state)
    assert len(graphs) == 3  # Of the teacher, the student and the losses.
    torch.testing.assert_close(state.history[0], expected_values, rtol=1e-5, atol=1e-6)
    assert (state.parameters[0].grad - expected).norm() < 1e-4 * expected.norm()
    made.step(state)
    assert len(graphs) == 3
