"""The one synthesis loop, against the formulas and against itself."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfcompress import console
from dfcompress.errors import DfcompressError
from dfcompress.machine.execution import Execution
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.statistics import statistics_layers
from dfcompress.randomness import generator
from dfcompress.run import Clock
from dfcompress.synthesis import batch_state
from dfcompress.synthesis import synthesizer as synthesizer_module
from dfcompress.synthesis.batch_state import SMALLER, BatchState
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import STEPS_BEFORE_RELEASE, Synthesizer

EAGER = Execution("cpu", "fp32", False, 1, "")
LABELS = torch.arange(16) % 10


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


def synthesizer(teacher, steps, *, execution=EAGER, seed=3, preset="paper-cifar10", **settings):
    recipe = choose("deepinversion", preset, {"steps": steps, "batch_size": 16, **settings}).recipe
    return Synthesizer(recipe, teacher, execution, seed=seed)


def plain_loop(teacher, steps, labels):
    """DeepInversion for CIFAR-10 from the paper's formulas, with the same random numbers; losses of every step.

    In double precision, because rounding in the plain loop's own gradients would take it apart from ours in ten steps.
    """
    teacher = copy.deepcopy(teacher).double()
    images = torch.randn(len(labels), 3, 32, 32, generator=generator("noise", 3, 0)).double().requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=0.05)
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0])))
        for layer in statistics_layers(teacher.network)
    ]
    history = []
    for step in range(steps):
        inputs.clear()
        down, right = torch.randint(-2, 3, (2,), generator=generator("view", 3, 0, step)).tolist()
        x = torch.roll(images, (down, right), (2, 3))
        ce = F.cross_entropy(teacher.network(x), labels)
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
    labels = torch.arange(32) % 10
    batch = synthesizer(teacher, 10).batch(0, labels)
    names = ["cross_entropy", "bn_distance", "total_variation", "image_norm"]
    ours = torch.tensor([[point[name] for name in names] for point in batch.history])
    torch.testing.assert_close(ours, plain_loop(teacher, 10, labels), rtol=1e-4, atol=0)


def test_a_batch_depends_on_seed_and_shard_alone(teacher):
    first = synthesizer(teacher, 2).batch(1, LABELS).images
    again = synthesizer(teacher, 2).batch(1, LABELS).images
    assert torch.equal(first, again)
    assert not torch.equal(first, synthesizer(teacher, 2).batch(2, LABELS).images)
    assert not torch.equal(first, synthesizer(teacher, 2, seed=4).batch(1, LABELS).images)


def test_every_shard_starts_from_noise_of_its_own(teacher):
    """Views are drawn for each shard too, and would make different images out of the same noise."""
    barely = synthesizer(teacher, 1, lr=1e-12)
    first, second = (barely.batch(shard, LABELS).images for shard in (0, 1))
    assert (first - second).abs().mean() > 0.1


def test_work_taken_up_from_a_file_ends_in_the_same_images(teacher, tmp_path):
    whole = synthesizer(teacher, 6, preset="fast-cifar10").batch(0, LABELS).images
    interrupted = synthesizer(teacher, 6, preset="fast-cifar10")
    work = interrupted.begin({0: LABELS})
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
    phase = synthesizer(teacher, 100, preset="fast-cifar10").recipe.phases[0]
    assert phase.rate(0) == pytest.approx(0.1)
    assert phase.rate(50) == pytest.approx(0.05)
    assert phase.rate(99) < 1e-4


def test_a_rate_that_overflows_is_reported(teacher):
    with pytest.raises(DfcompressError, match="not finite"):
        synthesizer(teacher, 4, lr=1e30).batch(0, LABELS)


def test_a_step_that_cannot_be_captured_is_tried_once(teacher, monkeypatch):
    """Not in every batch anew, with a notice each."""
    tried = []
    monkeypatch.setattr(batch_state, "captured", tried.append)  # It returns None, as where capturing fails.
    made = synthesizer(teacher, 8, execution=replace(EAGER, capture=True), batch_size=2)
    for shard in range(2):
        state = made.begin({shard: torch.tensor([1, 2])})
        for _ in range(8):
            made.step(state)
    assert len(tried) == 1
    assert len(state.history) == 8


def test_shards_made_side_by_side_are_those_made_alone(teacher):
    """To the end, through views, optimiser and clipping; also where a unit has fewer shards than the others."""
    made = synthesizer(teacher, 3, preset="fast-cifar10")
    together = [*made.batches({0: LABELS, 1: LABELS}), *made.batches({2: LABELS})]
    for shard, batch in enumerate(together):
        alone = synthesizer(teacher, 3, preset="fast-cifar10").batch(shard, LABELS)
        assert batch.losses == pytest.approx(alone.losses, rel=1e-3)
        assert (batch.images - alone.images).abs().median() < 1e-4


def test_the_number_of_threads_changes_no_bit(teacher):
    images = [synthesizer(teacher, 4, execution=replace(EAGER, threads=n)).batch(0, LABELS).images for n in (1, 2)]
    assert torch.equal(*images)


def test_freed_memory_is_given_back_every_few_steps(teacher, monkeypatch):
    """Kept all the time, it falls into pieces, and a process grows with its steps."""
    released = []
    monkeypatch.setattr(synthesizer_module, "release_freed_memory", lambda: released.append(True))
    synthesizer(teacher, 2 * STEPS_BEFORE_RELEASE + 1).batch(0, LABELS)
    assert len(released) == 2


def test_a_chunk_of_the_whole_batch_changes_no_bit(teacher):
    made = [synthesizer(teacher, 3, execution=replace(EAGER, chunk=chunk)) for chunk in (None, 16, 64)]
    first, *others = [each.batch(0, LABELS).images for each in made]
    assert all(torch.equal(first, other) for other in others)


def test_a_batch_in_chunks_is_as_good_as_a_whole_one(teacher):
    """After 40 steps with views of their own for every chunk; a batch of 4 alone is further from the statistics."""
    ends = {}
    for size, chunk in ((16, None), (16, 4), (4, None)):
        made = synthesizer(teacher, 40, execution=replace(EAGER, chunk=chunk), preset="fast-cifar10")
        ends[size, chunk] = made.batch(0, LABELS[:size]).losses["bn_distance"]
    assert ends[16, 4] < 1.03 * ends[16, None]
    assert ends[16, None] < 0.95 * ends[4, None]


def test_a_batch_in_chunks_is_taken_up_from_a_file_to_the_same_bytes(teacher, tmp_path):
    """In the middle of a phase, where the means of all chunks are needed at once."""
    execution = replace(EAGER, chunk=6)
    whole = synthesizer(teacher, 6, preset="fast-cifar10", execution=execution).batch(0, LABELS).images
    interrupted = synthesizer(teacher, 6, preset="fast-cifar10", execution=execution)
    work = interrupted.begin({0: LABELS})
    for _ in range(4):
        interrupted.step(work)
    work.save(tmp_path / "partial")
    again = synthesizer(teacher, 6, preset="fast-cifar10", execution=execution)
    assert torch.equal(again.batch(0, LABELS, partial=tmp_path / "partial").images, whole)
    assert not torch.equal(whole, synthesizer(teacher, 6, preset="fast-cifar10").batch(0, LABELS).images)


@pytest.mark.release
def test_nor_does_it_compiled_in_bf16(resnet20_file, tmp_path):
    """In processes of their own, because compiled code knows its number of threads."""
    code = (
        "import sys, torch; from dfcompress.machine.execution import Execution\n"
        "from dfcompress.models.checkpoint import load\n"
        "from dfcompress.synthesis.recipe import choose; from dfcompress.synthesis.synthesizer import Synthesizer\n"
        "recipe = choose('deepinversion', 'fast-cifar10', {'steps': 2, 'batch_size': 64}).recipe\n"
        "execution = Execution('cpu', 'bf16', True, int(sys.argv[1]), '')\n"
        f"made = Synthesizer(recipe, load({str(resnet20_file)!r}), execution)\n"
        "torch.save(made.batch(0, torch.arange(64) % 10).images, sys.argv[2])"
    )
    for threads in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, threads, tmp_path / threads], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "1"), torch.load(tmp_path / "2"))


def test_the_optimiser_equals_adam_as_published(teacher):
    """torch 2.15's fused Adam wrote wrong values for channels_last parameters with contiguous gradients."""
    made = synthesizer(teacher, 5)
    work = made.begin({0: LABELS})
    plain = work.images[0].render().detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([plain], lr=0.05, foreach=False, fused=False)
    for _ in range(5):
        made.step(work)
        plain.grad = work.parameters[0].grad.clone()
        optimizer.step()
    torch.testing.assert_close(work.images[0].render(), plain, rtol=1e-5, atol=1e-6)


def test_a_batch_that_overflows_is_made_again_with_a_smaller_rate(teacher, monkeypatch):
    made = synthesizer(teacher, 3)
    honest, calls, rates = made._losses, [], []

    def overflowing_once(*arguments):
        total, values, means = honest(*arguments)
        calls.append(total)
        return total, values * float("nan") if len(calls) == 1 else values, means

    def noted(state, *step, real=BatchState.set_rates):
        real(state, *step)
        rates.extend(rate.item() for rate in state._rates.values())

    monkeypatch.setattr(made, "_losses", overflowing_once)
    monkeypatch.setattr(BatchState, "set_rates", noted)
    # Values are looked at when a batch ends, and on a slow machine before.
    monkeypatch.setattr(Clock, "is_time_to_tell", lambda clock: False)
    batch = made.batch(0, LABELS)
    assert batch.attempts == 2
    assert batch.images.isfinite().all()
    assert rates == pytest.approx([0.05] * 3 + [0.05 * SMALLER] * 3)


@pytest.mark.parametrize("recipe", ["deepinversion", "bns"])
@pytest.mark.parametrize("network", ["odd", "grey", "vector", "depthwise"])
@pytest.mark.parametrize("count", [1, 3])
def test_any_network_with_batchnorm_will_do(recipe, network, count):
    torch.manual_seed(0)
    layers, size = {
        "odd": ([nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)], (3, 11, 7)),
        "grey": ([nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)], (1, 8, 8)),
        "vector": ([nn.Flatten(), nn.Linear(108, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5)], (3, 6, 6)),
        "depthwise": (
            [nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6, affine=False), nn.ReLU6(), nn.Flatten(), nn.LazyLinear(5)],
            (3, 8, 8),
        ),
    }[network]
    built = nn.Sequential(*layers)
    built(torch.randn(8, *size))  # In training mode: BatchNorm gets statistics.
    card = ModelCard("file.py:net", 5, size, (0.5,) * size[0], (0.25,) * size[0])
    settings = {"steps": 3, "batch_size": count}
    made = Synthesizer(choose(recipe, "paper-cifar10", settings).recipe, Classifier(built.eval(), card), EAGER)
    batch = made.batch(0, torch.arange(count))
    assert batch.images.shape == (count, *size)
    assert all(value == value for value in batch.losses.values())


def test_too_little_memory_names_the_batch_that_fits(teacher, monkeypatch):
    made = synthesizer(teacher, 2)
    honest = made._update

    def with_little_memory(work, phase):
        if len(work.labels) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(work, phase)

    monkeypatch.setattr(made, "_update", with_little_memory)
    with pytest.raises(DfcompressError, match=r"16 images a step do not fit.*--batch-size 4 fits"):
        made.batch(0, LABELS)


def out_of_memory(self, state):
    raise torch.OutOfMemoryError("out of memory")


def test_too_little_memory_for_a_chunk_blames_no_batch(teacher, monkeypatch):
    made = synthesizer(teacher, steps=2, execution=replace(EAGER, chunk=4))
    monkeypatch.setattr(Synthesizer, "step", out_of_memory)
    with pytest.raises(DfcompressError, match=r"16 images a step do not fit into memory\. Free memory, or begin anew"):
        made.batch(0, LABELS)


def test_a_generator_that_lives_on_is_told_to_take_a_smaller_batch(teacher, monkeypatch):
    recipe = choose("fast-generator", None, {"steps": 2, "batch_size": 16}).recipe
    made = Synthesizer(recipe, teacher, EAGER, student=teacher)
    monkeypatch.setattr(Synthesizer, "step", out_of_memory)
    for make in (made.batch, made.advance):
        with pytest.raises(DfcompressError, match=r"16 images a step do not fit into memory\. .* smaller --batch-size"):
            make(0, LABELS)


def test_batches_that_do_not_fit_side_by_side_are_made_one_after_the_other(teacher, monkeypatch):
    made = synthesizer(teacher, 2)
    honest = made._update

    def with_little_memory(work, phase):
        if len(work.labels) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(work, phase)

    monkeypatch.setattr(made, "_update", with_little_memory)
    batches = made.batches({0: LABELS, 1: LABELS, 2: LABELS})
    alone = [synthesizer(teacher, 2).batch(shard, LABELS) for shard in range(3)]
    assert all(torch.equal(own.images, one.images) for own, one in zip(batches, alone, strict=True))


@pytest.mark.usefixtures("broken_compiler")
def test_no_compiler_means_eager_with_one_line(teacher, capsys):
    console.configure(console.NORMAL)
    try:
        batch = synthesizer(teacher, 2, execution=replace(EAGER, compile=True)).batch(0, LABELS)
    finally:
        console.configure(console.QUIET)
    assert torch.equal(batch.images, synthesizer(teacher, 2).batch(0, LABELS).images)
    assert "runs eagerly" in capsys.readouterr().err


def test_the_step_that_overflowed_is_named(teacher):
    """At a rate of 1e30 the first step's losses are finite and the second's are not."""
    with pytest.raises(DfcompressError, match=r"not finite at step 1: bn_distance.*Lower the rate with --lr"):
        synthesizer(teacher, 4, lr=1e30).batch(0, LABELS)


def loud(factor):
    """A network whose first layer answers `factor` times as loud, and whose last takes it back."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10)).eval()
    with torch.no_grad():
        network[0].weight.mul_(factor)
        network[3].weight.div_(factor)
    return Classifier(network, ModelCard("loud", 10, (1, 8, 8), (0.5,), (0.5,)))


def of_inception(teacher, *, precision="fp32", **settings):
    recipe = choose("inception", "fast-cifar10", {"steps": 2, "batch_size": 4, **settings}).recipe
    return Synthesizer(recipe, teacher, replace(EAGER, precision=precision)).batch(0, torch.arange(4))


@pytest.mark.parametrize(
    ("trouble", "mended", "remedy"),
    [
        ({"teacher": loud(1e6), "precision": "fp16"}, {"precision": "fp32"}, "Use --precision fp32"),
        ({"teacher": loud(1), "scale": 1e-3}, {"scale": 100.0}, "change what it is made of with --set"),
        ({"teacher": loud(1e39)}, {"teacher": loud(1)}, "use another checkpoint"),
    ],
)
def test_a_loss_that_is_not_finite_before_the_first_step_blames_no_rate(trouble, mended, remedy):
    with pytest.raises(DfcompressError, match=rf"not finite at step 0: inception\. .*{remedy}") as caught:
        of_inception(**trouble)
    assert "--lr" not in str(caught.value)
    assert of_inception(**(trouble | mended)).attempts == 1


def test_noise_that_is_not_finite_blames_what_it_is_drawn_from(teacher):
    recipe = choose("gaussian", None, {"std": 1e39, "mean": 0.5}).recipe
    with pytest.raises(DfcompressError, match="what the images start from: change it with --set"):
        Synthesizer(recipe, teacher, EAGER).batch(0, LABELS)


def test_labels_that_the_teacher_gives_are_in_exact_fp32(teacher, precisions):
    own = copy.deepcopy(teacher)
    passes = precisions(own)
    Synthesizer(choose("bns", None, {"steps": 1, "batch_size": 16}).recipe, own, EAGER).batch(0, LABELS)
    assert set(passes) == {"ieee"}
