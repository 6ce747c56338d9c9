"""Random numbers as a pure function of a key, so that resuming needs no stored state."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on `key` alone, for instance `(seed, shard, step)`."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """One seed of 63 bits for a key of whole numbers."""
    state = np.random.SeedSequence([part & 0xFFFFFFFF for part in key]).generate_state(1, np.uint64)
    return int(state[0] & 0x7FFFFFFFFFFFFFFF)
