"""`bench` times what it says, by real steps."""

from __future__ import annotations

import pytest

from dfcompress.device import Compute
from dfcompress.evaluation.bench_step import bench_step
from dfcompress.evaluation.bench_train import bench_train


def test_the_rows_are_the_documented_ones_and_positive(resnet20_file):
    measured = bench_step(resnet20_file, batch_size=4, rounds=1, compute=Compute("cpu", "bf16", "off"))
    assert [row["name"] for row in measured.rows] == [
        "published",
        "floor",
        "published-bf16",
        "floor-bf16",
        "+frozen",
        "+records",
        "ours",
    ]
    assert all(row["ms"] > 0 and row["images_per_second"] > 0 for row in measured.rows)
    assert measured.ceilings is None


@pytest.mark.parametrize(
    ("precision", "rows"), [("fp32", ["plain", "+pool", "+cached"]), ("bf16", ["plain", "+pool", "+bf16", "+cached"])]
)
def test_the_rows_of_training_are_the_documented_ones(resnet20_file, precision, rows):
    compute = Compute("cpu", precision, "off")
    measured = bench_train(resnet20_file, student="half", batch_size=4, rounds=1, compute=compute)
    assert [row["name"] for row in measured.rows] == rows
    assert all(row["ms"] > 0 for row in measured.rows)
