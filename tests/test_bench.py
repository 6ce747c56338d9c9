"""`bench` times what it says, by real steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import load
from dfcompress.verbs.bench_generator import bench_generator
from dfcompress.verbs.bench_step import _convolutions, _flops, bench_step
from dfcompress.verbs.bench_train import bench_train

DEMO = Path(__file__).resolve().parents[1] / "dfcompress" / "demo_files"


def test_the_rows_are_the_documented_ones_and_positive(resnet20_file):
    measured = bench_step(
        resnet20_file, batch_size=4, rounds=1, compute=Compute(device="cpu", precision="bf16", compile="off")
    )
    assert [row["name"] for row in measured.rows] == [
        "published",
        "floor",
        "published-bf16",
        "floor-bf16",
        "convolutions-bf16",
        "+frozen",
        "+fused",
        "ours",
    ]
    assert all(row["ms"] > 0 and row["images_per_second"] > 0 for row in measured.rows)
    assert measured.ceilings is None


@pytest.mark.parametrize(
    ("precision", "rows"), [("fp32", ["plain", "+pool", "+cached"]), ("bf16", ["plain", "+pool", "+bf16", "+cached"])]
)
def test_the_rows_of_training_are_the_documented_ones(resnet20_file, precision, rows):
    compute = Compute(device="cpu", precision=precision, compile="off")
    measured = bench_train(resnet20_file, student="half", batch_size=4, rounds=1, compute=compute)
    assert [row["name"] for row in measured.rows] == rows
    assert all(row["ms"] > 0 for row in measured.rows)


def test_the_rows_of_a_round_are_the_documented_ones(resnet20_file):
    compute = Compute(device="cpu", precision="bf16", compile="off")
    measured = bench_generator(resnet20_file, batch_size=2, rounds=1, compute=compute)
    assert [row["name"] for row in measured.rows] == ["published", "published-bf16", "+live", "ours"]
    assert all(row["ms"] > 0 for row in measured.rows)


def test_the_operations_of_a_step_are_those_of_both_passes():
    """The forward pass by hand, layer by layer; the gradient to the input takes as many."""
    in_place_of_each_weight = {"conv1": 28 * 28, "conv2": 10 * 10, "fc1": 1, "fc2": 1, "fc3": 1}
    weights = {"conv1": 6 * 25, "conv2": 16 * 6 * 25, "fc1": 400 * 120, "fc2": 120 * 84, "fc3": 84 * 10}
    forward = 2 * sum(weights[name] * times for name, times in in_place_of_each_weight.items())
    assert _flops(load(DEMO), batch_size=3) == 2 * 3 * forward


def test_the_row_of_convolutions_runs_both_passes_of_every_convolution_and_linear_layer(resnet20_file):
    step = _convolutions(load(resnet20_file), 2, torch.device("cpu"), torch.bfloat16)
    with profile() as profiled:
        step()
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["aten::convolution_backward"] == 19
    assert calls["aten::conv2d"] == 19
    assert calls["aten::linear"] == 1
    assert "aten::batch_norm" not in calls
