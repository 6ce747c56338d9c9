"""What a step costs in several ways: they run interleaved in one process, because machines drift."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dfcompress import console
from dfcompress.machine.device import synchronize
from dfcompress.machine.memory import release_freed_memory

Step = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """One step in several ways: `rows` of {name, ms, images_per_second}, on CUDA with {tflops} where operations were
    counted; the batch size, the processor, and on CUDA the `ceilings` {tflops, gb_per_second} it reached in the same
    run.
    """

    rows: list[dict[str, Any]]
    batch_size: int
    rounds: int
    processor: str
    ceilings: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return asdict(self)


def interleaved(steps: Mapping[str, Step], *, rounds: int, warm_up: int, target: torch.device) -> dict[str, float]:
    """Seconds of one step of each row, the median of `rounds`: each time the second of two, after `warm_up` steps."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    with console.progress("rounds", rounds) as progress:
        for step in steps.values():
            for _ in range(warm_up):
                step()
        for done in range(rounds):
            for name, step in steps.items():
                release_freed_memory()  # Another row's holes would spread this one over the heap.
                step()
                times[name].append(seconds_of(step, target))
            progress.update(done + 1)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def seconds_of(step: Step, target: torch.device) -> float:
    """Seconds of one step, until the device is done."""
    synchronize(target)
    started = time.perf_counter()
    step()
    synchronize(target)
    return time.perf_counter() - started


def row(name: str, seconds: float, batch_size: int, flops: float | None = None) -> dict[str, Any]:
    """A row of a `Bench`."""
    values = {"name": name, "ms": round(1e3 * seconds, 2), "images_per_second": round(batch_size / seconds, 1)}
    return values if flops is None else {**values, "tflops": round(flops / seconds / 1e12, 1)}
