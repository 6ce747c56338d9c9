"""Random numbers as a pure function of a key, so that resuming needs no stored state."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on `key` alone, for instance `(seed, shard, step)`."""
    state = np.random.SeedSequence([part & 0xFFFFFFFF for part in key]).generate_state(1, np.uint64)
    return torch.Generator(device=device).manual_seed(int(state[0] & 0x7FFFFFFFFFFFFFFF))
