"""Timing of a step in several variants, which run interleaved in one process, because the speed of machines drifts."""

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
    """The times of one step in several variants. `rows` are {name, ms, images_per_second}, on CUDA also {tflops} if
    operations were counted. `ceilings` are the {tflops, gb_per_second} that the CUDA device reached in the same run.
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
    """The seconds of one step of each variant, by name: the median over `rounds`, after `warm_up` steps. In each round
    every variant runs two steps, of which the second is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    with console.progress("rounds", rounds) as progress:
        for step in steps.values():
            for _ in range(warm_up):
                step()
        for done in range(rounds):
            for name, step in steps.items():
                release_freed_memory()  # Memory freed by other variants would fragment the heap.
                step()
                times[name].append(seconds_of(step, target))
            progress.update(done + 1)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def seconds_of(step: Step, target: torch.device) -> float:
    """The seconds of one step, until the device `target` has finished it."""
    synchronize(target)
    started = time.perf_counter()
    step()
    synchronize(target)
    return time.perf_counter() - started


def row(name: str, seconds: float, batch_size: int, flops: float | None = None) -> dict[str, Any]:
    """A row of a `Bench`, from the seconds of a step and, if known, its floating-point operations `flops`."""
    values = {"name": name, "ms": round(1e3 * seconds, 2), "images_per_second": round(batch_size / seconds, 1)}
    return values if flops is None else {**values, "tflops": round(flops / seconds / 1e12, 1)}
