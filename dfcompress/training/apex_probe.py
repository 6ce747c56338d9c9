"""Whether NVIDIA apex can be used here: asked once, lazily, and believed only after it has computed the right thing.

Apex is built from source for one torch, one CUDA and some GPU architectures, and each can be the wrong one; the package
of the same name in package indexes is an unrelated web toolkit.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

import torch

from dfcompress.device import has_cuda, processor_name
from dfcompress.errors import first_line

AGREEMENT = 1e-5
# What a package that was built for something else fails with.
FOREIGN_FAILURES = (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError)
BUILD = (
    "Build it from NVIDIA's repository with its C++ and CUDA extensions, in this environment "
    "(--no-build-isolation), or use --optimizer-backend torch."
)


class State(Enum):
    """What the probe can find."""

    ABSENT = "absent"
    WRONG_PACKAGE = "wrong package"
    NO_GPU = "no GPU"
    PYTHON_ONLY = "python-only build"
    ABI_MISMATCH = "ABI mismatch"
    WRONG_ARCHITECTURE = "wrong GPU architecture"
    BROKEN = "broken"
    READY = "ready"


@dataclass(frozen=True)
class Apex:
    """The state of apex on this machine, a sentence of what was found, and one of what to do."""

    state: State
    found: str
    remedy: str = ""


@cache
def probe(disagreement: Callable[[torch.device], float], device: torch.device) -> Apex:
    """Find out, in the order in which things go wrong; nothing of a wrong package is executed.

    `disagreement` runs three steps of every optimiser on `device`, this process's, with apex and with torch and gives
    the largest relative difference; up to 1e-5 is rounding.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex(State.ABSENT, "apex is not installed", BUILD)
    places = list(spec.submodule_search_locations or [])
    if not any((Path(place) / "optimizers").is_dir() for place in places):
        found = f"the installed package apex ({spec.origin}) is not NVIDIA's"
        return Apex(State.WRONG_PACKAGE, found, f"Uninstall it: pip uninstall apex. {BUILD}")
    if not has_cuda():
        return Apex(State.NO_GPU, "there is no CUDA device", "Use --optimizer-backend torch.")
    if importlib.util.find_spec("amp_C") is None:
        return Apex(State.PYTHON_ONLY, "apex was built without its CUDA extensions (no amp_C)", BUILD)
    try:
        importlib.import_module("amp_C")
    except ImportError as error:
        found = f"apex was built for another torch than {torch.__version__} ({first_line(error)})"
        return Apex(State.ABI_MISMATCH, found, f"Build it again. {BUILD}")
    return _tried(disagreement, device)


def _tried(disagreement: Callable[[torch.device], float], device: torch.device) -> Apex:
    """Whether its numbers are right, after three steps of each optimiser."""
    try:
        difference = disagreement(device)
    except FOREIGN_FAILURES as error:
        if "no kernel image" in str(error):
            name = processor_name(device)
            remedy = "Build it again with TORCH_CUDA_ARCH_LIST naming this GPU's compute capability."
            return Apex(State.WRONG_ARCHITECTURE, f"apex was not built for {name}", remedy)
        return Apex(State.BROKEN, f"apex fails: {type(error).__name__}: {first_line(error)}", BUILD)
    if not difference <= AGREEMENT:
        return Apex(State.BROKEN, f"apex and torch differ by {difference:.1g} after three steps", BUILD)
    return Apex(State.READY, "apex agrees with torch")
