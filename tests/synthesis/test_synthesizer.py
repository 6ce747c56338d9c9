"""The one synthesis loop, against the formulas and against itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dfcompress.device import Execution
from dfcompress.errors import DfcompressError
from dfcompress.models.checkpoint import load
from dfcompress.models.recorder import batchnorms
from dfcompress.randomness import generator
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import Synthesizer

EAGER = Execution("cpu", "fp32", False, 2, "")
LABELS = torch.arange(16) % 10


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


def synthesizer(teacher, steps, *, execution=EAGER, seed=3, preset="paper-cifar10", **settings):
    recipe = choose("deepinversion", preset, {"steps": steps, "batch_size": 16, **settings}).build()
    return Synthesizer(recipe, teacher, execution, seed=seed)


def plain_loop(teacher, steps):
    """DeepInversion for CIFAR-10 from the paper's formulas, with the same random numbers; losses of every step."""
    images = torch.randn(16, 3, 32, 32, generator=generator(3, 0)).requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=0.05)
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0])))
        for layer in batchnorms(teacher.network)
    ]
    history = []
    for step in range(steps):
        inputs.clear()
        down, right = torch.randint(-2, 3, (2,), generator=generator(3, 0, step)).tolist()
        x = torch.roll(images, (down, right), (2, 3))
        ce = F.cross_entropy(teacher.network(x), LABELS)
        bn = sum(
            (f.mean((0, 2, 3)) - layer.running_mean).norm()
            + (f.var((0, 2, 3), correction=0) - layer.running_var).norm()
            for layer, f in inputs
        )
        tv = (
            (x[:, :, :, 1:] - x[:, :, :, :-1]).norm()
            + (x[:, :, 1:] - x[:, :, :-1]).norm()
            + (x[:, :, 1:, 1:] - x[:, :, :-1, :-1]).norm()
            + (x[:, :, 1:, :-1] - x[:, :, :-1, 1:]).norm()
        )
        optimizer.zero_grad()
        (ce + 10 * bn + 2.5e-5 * tv + 3e-8 * x.norm()).backward()
        optimizer.step()
        history.append([ce.item(), bn.item(), tv.item(), x.norm().item()])
    for hook in hooks:
        hook.remove()
    return torch.tensor(history)


def test_ten_steps_equal_a_plain_loop_written_from_the_formulas(teacher):
    batch = synthesizer(teacher, 10).batch(0, LABELS)
    names = ["cross_entropy", "bn_distance", "total_variation", "image_norm"]
    ours = torch.tensor([[point[name] for name in names] for point in batch.history])
    torch.testing.assert_close(ours, plain_loop(teacher, 10), rtol=1e-4, atol=1e-4)


def test_a_batch_depends_on_seed_and_shard_alone(teacher):
    first = synthesizer(teacher, 2).batch(1, LABELS).images
    again = synthesizer(teacher, 2).batch(1, LABELS).images
    assert torch.equal(first, again)
    assert not torch.equal(first, synthesizer(teacher, 2).batch(2, LABELS).images)
    assert not torch.equal(first, synthesizer(teacher, 2, seed=4).batch(1, LABELS).images)


def test_work_taken_up_from_a_file_ends_in_the_same_images(teacher, tmp_path):
    whole = synthesizer(teacher, 6, preset="fast-cifar10").batch(0, LABELS).images
    interrupted = synthesizer(teacher, 6, preset="fast-cifar10")
    work = interrupted.begin(0, LABELS)
    for _ in range(4):
        interrupted.step(work)
    work.save(tmp_path / "partial")
    resumed = synthesizer(teacher, 6, preset="fast-cifar10").batch(0, LABELS, partial=tmp_path / "partial").images
    assert torch.equal(resumed, whole)


def test_clipped_images_stay_in_range(teacher):
    images = synthesizer(teacher, 3, preset="fast-cifar10").batch(0, LABELS).images
    assert images.min() >= -1e-6
    assert images.max() <= 1 + 1e-6


def test_the_rate_falls_to_zero_along_a_cosine(teacher):
    stage = synthesizer(teacher, 100, preset="fast-cifar10").recipe.stages[0]
    assert stage.rate(0) == pytest.approx(0.1)
    assert stage.rate(50) == pytest.approx(0.05)
    assert stage.rate(99) < 1e-4


def test_a_rate_that_overflows_is_reported(teacher):
    with pytest.raises(DfcompressError, match="not finite"):
        synthesizer(teacher, 4, lr=1e30).batch(0, LABELS)


@pytest.mark.slow
def test_compiled_steps_agree_with_eager_ones(teacher):
    """In fp32 the compiler only reorders sums; the gradients agree to rounding."""
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, expected_values = synthesizer(teacher, 1).gradient(images, LABELS)
    compiled = Execution("cpu", "fp32", True, 2, "")
    gradient, values = synthesizer(teacher, 1, execution=compiled).gradient(images, LABELS)
    torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-5)
    assert (gradient - expected).norm() < 2e-3 * expected.norm()
