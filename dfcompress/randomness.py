"""Random numbers as a pure function of a key, so that resuming needs no stored state."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def generator(purpose: str, *key: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on `purpose` and `key` alone, for instance ("view", seed, shard)."""
    return torch.Generator().manual_seed(seed_of(purpose, *key))


def seed_of(purpose: str, *key: int) -> int:
    """One seed of 63 bits for a purpose and whole numbers from 0 up."""
    state = np.random.SeedSequence([zlib.crc32(purpose.encode()), len(key), *key]).generate_state(1, np.uint64)
    return int(state[0] & 0x7FFFFFFFFFFFFFFF)
