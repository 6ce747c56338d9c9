"""A verb works whatever its caller has set, and leaves the caller's settings and model as they were."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

import dfcompress

DEMO = Path(__file__).resolve().parents[1] / "dfcompress" / "demo_files"
EAGER = dfcompress.Compute(compile="off")


def small(output: Path, model: str | Path | dfcompress.Classifier = DEMO, compute: dfcompress.Compute = EAGER) -> Path:
    """Two images, two steps of training, and what every way of calling gives."""
    synthesis = dfcompress.Synthesis(images=2, settings={"steps": 1, "batch_size": 2})
    dfcompress.distill(
        model,
        student="half",
        synthesis=synthesis,
        second_recipe=None,
        probe_images=0,
        training={"steps": 2},
        compute=compute,
        output=output,
    )
    return output / "model.safetensors"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_known_inside_of_a_verb(mode: Callable[[], AbstractContextManager[None]], tmp_path):
    with mode():
        loaded = dfcompress.load(DEMO)
        plan = dfcompress.distill.plan(loaded, student="half", output=tmp_path / "planned", compute=EAGER)
        assert plan.predicted()["training"] > 0
        made = small(tmp_path / "out", loaded)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert made.read_bytes() == small(tmp_path / "usual").read_bytes()


def test_the_result_warns_of_the_images_that_were_made(tmp_path):
    small(tmp_path / "out")
    (warning, *_) = json.loads((tmp_path / "out" / "run.json").read_text())["measurements"]["warnings"]
    assert "1 of 1 batches" in warning


def test_another_default_type_changes_nothing(tmp_path):
    usual = small(tmp_path / "usual").read_bytes()
    torch.set_default_dtype(torch.float64)
    try:
        assert small(tmp_path / "out").read_bytes() == usual
        assert dfcompress.inspect(DEMO).architecture == "lenet5_bn"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_of_the_caller_changes_nothing(precision, enabled, tmp_path):
    """Inside another autocast, one of ours keeps its copies of the weights, which the next step has changed."""
    compute = dfcompress.Compute(precision=precision, compile="off")
    usual = small(tmp_path / "usual", compute=compute).read_bytes()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert small(tmp_path / "out", compute=compute).read_bytes() == usual
        assert torch.is_autocast_enabled("cpu") == enabled
        assert torch.is_autocast_cache_enabled()


def test_the_caller_s_model_stays_where_and_as_it_is(tmp_path):
    model = dfcompress.load(DEMO).to(memory_format=torch.channels_last).train()
    before = [(tensor.data_ptr(), tensor.stride(), tensor.requires_grad) for tensor in model.state_dict().values()]
    small(tmp_path / "out", model)
    assert model.training
    after = [(tensor.data_ptr(), tensor.stride(), tensor.requires_grad) for tensor in model.state_dict().values()]
    assert after == before


def test_the_caller_s_random_numbers_are_left_as_they_were(tmp_path):
    """Though a network of the user's own draws its first weights."""
    make = "from dfcompress.models.architectures import find\n\ndef make(): return find('lenet5_bn').make(10, 1)\n"
    (tmp_path / "net.py").write_text(make)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model = dfcompress.load(DEMO, arch=f"{tmp_path / 'net.py'}:make")
    small(tmp_path / "out", model)
    assert torch.equal(torch.rand(4), expected)


def test_two_threads_make_what_one_after_the_other_makes(tmp_path):
    """Whatever one of them sets in PyTorch, and draws from its generators, is not seen by the other."""
    usual = small(tmp_path / "usual").read_bytes()
    calls = [threading.Thread(target=small, args=(tmp_path / str(number),)) for number in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert [(tmp_path / str(number) / "model.safetensors").read_bytes() == usual for number in range(2)] == [True, True]


def test_a_call_waits_for_that_of_another_thread_and_not_for_its_own(tmp_path):
    loaded = threading.Event()

    def load() -> None:
        dfcompress.load(DEMO)
        loaded.set()

    other = threading.Thread(target=load)

    def recipe() -> dfcompress.Recipe:
        other.start()
        assert not loaded.wait(1.0)
        dfcompress.load(DEMO)
        return dfcompress.Recipe(images=dfcompress.Pixels(), batch_size=2)

    dfcompress.invert(
        DEMO, synthesis=dfcompress.Synthesis(recipe=recipe, images=2), compute=EAGER, output=tmp_path / "images"
    )
    assert loaded.wait(60.0)
    other.join()


def test_another_default_device_is_not_taken_and_stays():
    torch.set_default_device("meta")
    try:
        assert dfcompress.load(DEMO).mean.device.type == "cpu"
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


def test_a_model_in_training_stays_in_training(tmp_path):
    mine = dfcompress.load(DEMO).train()
    for parameter in mine.parameters():
        parameter.requires_grad_(True)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    np.savez(tmp_path / "images.npz", images=np.zeros((20, 1, 32, 32), np.uint8), labels=np.arange(20) % 10)
    small(tmp_path / "distilled", mine)
    dfcompress.quantize(mine, data=tmp_path / "images.npz", finetune="none", output=tmp_path / "four", compute=EAGER)
    dfcompress.record(mine, data=tmp_path / "images.npz", output=tmp_path / "r.safetensors", settings={"min_images": 2})
    assert all(module.training for module in mine.modules())
    assert all(parameter.requires_grad for parameter in mine.parameters())
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
