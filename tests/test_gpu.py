"""On a CUDA device: bf16 and a CUDA graph against fp32 and single launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dfcompress import device
from dfcompress.device import Compute, Execution
from dfcompress.evaluation.bench_step import bench_step
from dfcompress.models.checkpoint import load
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import Synthesizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXACT = Execution("cuda", "fp32", False, 2, "")
FAST = Execution("cuda", "bf16", True, 2, "")
LABELS = torch.arange(64) % 10


def made(file, execution, steps=100):
    recipe = choose("deepinversion", "fast-cifar10", {"steps": steps, "batch_size": 64}).build()
    return Synthesizer(recipe, load(file), execution)


@pytest.mark.parametrize("file", ["resnet20_file", "resnet44_file"])
def test_the_fast_path_ends_at_the_batchnorm_distance_of_the_exact_one(file, request):
    ends = [
        made(request.getfixturevalue(file), execution).batch(0, LABELS).losses["bn_distance"]
        for execution in (EXACT, FAST)
    ]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_the_gpu_ends_where_the_cpu_does(resnet20_file):
    ends = [
        made(resnet20_file, execution).batch(0, LABELS).losses["bn_distance"]
        for execution in (replace(EXACT, device="cpu"), FAST)
    ]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_a_captured_step_does_what_a_launched_one_does(resnet20_file, monkeypatch):
    compiled = replace(EXACT, compile=True)
    captured = made(resnet20_file, compiled, steps=20).batch(0, LABELS)
    monkeypatch.setattr(device, "captured", lambda step: step)
    launched = made(resnet20_file, compiled, steps=20).batch(0, LABELS)
    torch.testing.assert_close(captured.images, launched.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["deepinversion", "bns", "bns-inception", "inception", "deepdream"])
@pytest.mark.parametrize("index", sorted({0, torch.cuda.device_count() - 1}))
def test_the_step_is_really_captured_and_still_moves_the_images(name, index, resnet20_file, monkeypatch):
    captures = []
    honest = device.captured
    monkeypatch.setattr(device, "captured", lambda step: captures.append(honest(step)) or captures[-1])
    recipe = choose(name, None, {"steps": 10, "batch_size": 16}).build()
    synthesizer = Synthesizer(recipe, load(resnet20_file), replace(FAST, device=f"cuda:{index}"))
    work = synthesizer.begin({0: LABELS[:16]})
    for _ in range(8):
        synthesizer.step(work)
    before = work.images[0].render().detach().clone()
    synthesizer.step(work)
    assert [replay.__name__ for replay in captures] == ["replay"]
    assert not torch.equal(work.images[0].render(), before)


def test_interrupted_work_resumes_to_the_same_bits(resnet20_file, tmp_path):
    whole = made(resnet20_file, FAST, steps=12).batch(0, LABELS).images
    first = made(resnet20_file, FAST, steps=12)
    work = first.begin({0: LABELS})
    for _ in range(7):
        first.step(work)
    work.save(tmp_path / "partial")
    resumed = made(resnet20_file, FAST, steps=12).batch(0, LABELS, partial=tmp_path / "partial").images
    assert torch.equal(resumed, whole)


def test_the_bench_knows_the_ceilings_of_the_device(resnet20_file):
    measured = bench_step(resnet20_file, batch_size=64, rounds=3, compute=Compute("cuda"))
    assert measured.ceilings["tflops"] > 1
    rows = {row["name"]: row for row in measured.rows}
    assert rows["ours"]["ms"] < rows["published"]["ms"]
    assert rows["floor"]["tflops"] < measured.ceilings["tflops"]
