"""What computing borrows of a process, and gives back."""

from __future__ import annotations

import pytest
import torch

from dfcompress.machine.execution import Execution, computing
from dfcompress.machine.process import exact_fp32


def readable(switch):
    """The value of a switch; torch gives none where one of its kinds was set apart."""
    try:
        return switch()
    except RuntimeError:
        return "apart"


def arithmetic_settings():
    backends = torch.backends
    kinds = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
    return {
        "kinds": [kind.fp32_precision for kind in kinds],
        "cudnn": readable(lambda: backends.cudnn.allow_tf32),
        "cuda": readable(lambda: backends.cuda.matmul.allow_tf32),
        "products": readable(torch.get_float32_matmul_precision),
        "deterministic": backends.cudnn.deterministic,
        "benchmark": backends.cudnn.benchmark,
    }


EXACT = {
    "kinds": ["ieee"] * 4,
    "cudnn": False,
    "cuda": False,
    "products": "highest",
    "deterministic": True,
    "benchmark": False,
}


USERS = {
    "untouched": lambda backends: None,
    "forbidden": lambda backends: setattr(backends.cudnn, "allow_tf32", False),
    "everywhere": lambda backends: setattr(backends, "fp32_precision", "tf32"),
    "apart": lambda backends: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "both": lambda backends: (
        setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
        setattr(backends.cudnn.rnn, "fp32_precision", "ieee"),
    ),
    "products in TF32": lambda backends: setattr(backends.cuda.matmul, "allow_tf32", True),
    "products of high precision": lambda backends: torch.set_float32_matmul_precision("high"),
    "products of medium precision": lambda backends: torch.set_float32_matmul_precision("medium"),
    "products apart": lambda backends: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "products of a CPU apart": lambda backends: setattr(backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "timed": lambda backends: setattr(backends.cudnn, "benchmark", True),
}


@pytest.fixture(params=USERS)
def users_settings(request):
    """What a user of the library may have set, and what is left of it."""
    backends = torch.backends
    USERS[request.param](backends)
    yield arithmetic_settings()
    backends.fp32_precision = backends.cudnn.fp32_precision = "none"
    backends.cudnn.allow_tf32 = True
    backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"


def test_exact_arithmetic_gives_the_users_settings_back(users_settings):
    with exact_fp32():
        assert arithmetic_settings() == EXACT
        with torch.backends.cudnn.flags(enabled=True):  # Reads them all, and raises where they contradict each other.
            pass
    assert arithmetic_settings() == users_settings


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_computing_gives_back_what_it_borrows(gpus, users_settings, precision):
    gpus(1)
    threads = torch.get_num_threads()
    with computing(Execution("cuda", precision, False, threads + 1, "")):
        assert torch.get_num_threads() == threads + 1
        assert not torch.backends.cuda.flash_sdp_enabled()  # Its backward pass adds up in any order.
        steady = {"deterministic": True, "benchmark": False}
        assert arithmetic_settings() == (EXACT if precision == "fp32" else users_settings | steady)
    assert arithmetic_settings() == users_settings
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.get_num_threads() == threads
