"""Schedules: a learning rate, or another number, as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["constant", "cosine", "multistep"]


def rate(
    step: int,
    *,
    peak: float,
    steps: int,
    schedule: Schedule,
    warmup: int = 0,
    milestones: Sequence[float] = (),
    gamma: float = 1.0,
) -> float:
    """The learning rate at `step`, counted from 0, of `steps` in all.

    It rises linearly to `peak` during the first `warmup` steps. Then it stays constant (`constant`), falls along a
    cosine to 0 (`cosine`), or is multiplied by `gamma` at each of the `milestones`, which are shares of `steps`
    (`multistep`).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        return cosine(step - warmup, max(1, steps - warmup), first=peak, last=0.0)
    if schedule == "multistep":
        return peak * gamma ** sum(step >= milestone * steps for milestone in milestones)
    return peak


def cosine(done: float, whole: float, *, first: float, last: float) -> float:
    """last + (first − last) · (1 + cos(π · done / whole)) / 2: falls from `first` at done = 0 to `last` at `whole`."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * done / whole))
