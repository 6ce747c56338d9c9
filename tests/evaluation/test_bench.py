"""`bench step` times what it says, by real steps."""

from __future__ import annotations

from dfcompress.device import Compute
from dfcompress.evaluation.bench import bench_step


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
