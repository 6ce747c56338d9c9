"""A verb works whatever its caller has set, and leaves the caller's settings and model as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

import dfcompress

DEMO = Path(__file__).resolve().parents[1] / "dfcompress" / "demo_files"
EAGER = dfcompress.Compute(compile="off")


def small(output: Path, model: str | Path | dfcompress.Classifier = DEMO) -> Path:
    """Two images, two steps of training, and what every way of calling gives."""
    synthesis = dfcompress.Synthesis(images=2, settings={"steps": 1, "batch_size": 2})
    dfcompress.distill(
        model,
        student="half",
        synthesis=synthesis,
        second_recipe=None,
        probe_images=0,
        training={"steps": 2},
        compute=EAGER,
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
