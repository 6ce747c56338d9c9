"""Optimizers against their formulas in double precision, and the probe of apex against stand-in packages."""

from __future__ import annotations

import math
import sys
import textwrap
from typing import get_args

import pytest
import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.training import OptimizerName, optimizers
from dfcompress.training.optimizers import Apex, State, choose_backend, make_optimizer, probe

NAMES = get_args(OptimizerName)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GRADIENTS = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
START = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))


def stepped(name, weight_decay, backend="torch"):
    weight = nn.Parameter(START.clone())
    groups = [{"params": [weight], "weight_decay": weight_decay}]
    optimizer = make_optimizer(name, groups, backend=backend, lr=0.1, momentum=0.9)
    for gradient in GRADIENTS:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def lamb_by_hand(weight_decay):
    w, m, v = START.double(), 0.0, 0.0
    for t, g in enumerate(GRADIENTS.double(), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + weight_decay * w
        w = w - 0.1 * (w.norm() / u.norm() if weight_decay else 1.0) * u
    return w


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_follows_its_formula(weight_decay):
    torch.testing.assert_close(stepped("lamb", weight_decay).double(), lamb_by_hand(weight_decay), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_finds_the_minimum_of_a_parabola(name):
    weight = nn.Parameter(torch.tensor([[3.0, -2.0]]))
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = make_optimizer(name, groups, backend="torch", lr=0.02, momentum=0.9)
    for _ in range(400):
        optimizer.zero_grad()
        (weight - torch.tensor([[1.0, 1.0]])).square().sum().backward()
        optimizer.step()
    assert (weight - 1).abs().max() < 0.05


@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_optimizers_state_survives_saving_also_before_the_first_step(name, stop, tmp_path):
    def run(stop):
        weight = nn.Parameter(START.clone())
        groups = [{"params": [weight], "weight_decay": 0.1}]
        optimizer = make_optimizer(name, groups, backend="torch", lr=0.1, momentum=0.9)
        for number, gradient in enumerate(GRADIENTS):
            if number == stop:
                torch.save(optimizer.state_dict(), tmp_path / "state")
                optimizer = make_optimizer(name, groups, backend="torch", lr=0.1, momentum=0.9)
                optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(stop), run(None))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs stand-in files in front of everything, and a fresh probe."""

    def install(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    monkeypatch.syspath_prepend(str(tmp_path))
    probe.cache_clear()
    yield install
    probe.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU; what would run on it runs on the CPU."""
    monkeypatch.setattr(optimizers, "has_cuda", lambda: True)


def test_no_apex_is_absent(installed):
    assert probe(CPU).state is State.ABSENT


def test_the_web_toolkit_of_the_same_name_is_the_wrong_package_and_is_not_run(installed):
    installed({"apex/__init__.py": "raise SystemExit('executed')"})
    found = probe(CPU)
    assert found.state is State.WRONG_PACKAGE
    assert "pip uninstall apex" in found.remedy


def test_apex_without_a_gpu(installed, monkeypatch):
    installed(nvidia(""))
    monkeypatch.setattr(optimizers, "has_cuda", lambda: False)
    assert probe(CPU).state is State.NO_GPU


# A stand-in whose interface and traps are those of the real one, and whose arithmetic is torch's or ours.
STAND_IN = """
    import math
    import torch
    from dfcompress.training.optimizers import Lamb

    class FusedLAMB(Lamb):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0):
            assert max_grad_norm == math.inf, "would cut the gradient's norm"
            super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def FusedAdam(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        family = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
        return family(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
"""


def nvidia(optimizers):
    """Files of an apex with these optimizers."""
    return {"apex/__init__.py": "", "apex/optimizers/__init__.py": optimizers}


@pytest.mark.parametrize(
    ("optimizers", "state", "found"),
    [
        (STAND_IN, State.READY, "agrees"),
        (STAND_IN.replace("if adam_w_mode", "if True"), State.BROKEN, "differ by"),
        (STAND_IN.replace("adam_w_mode=True, ", ""), State.BROKEN, "apex fails: TypeError"),
        ("raise ImportError('amp_C.so: undefined symbol: _ZN3c10')", State.BROKEN, "undefined symbol: _ZN3c10"),
        (
            "def FusedAdam(*_, **__): raise RuntimeError('no kernel image')",
            State.BROKEN,
            "no kernel image",
        ),
    ],
    ids=["as torch", "other numbers", "of another interface", "for another torch", "for another GPU"],
)
def test_apex_is_believed_after_three_steps_that_agree_with_torch(optimizers, state, found, installed, gpu):
    installed(nvidia(optimizers))
    apex = probe(CPU)
    assert apex.state is state
    assert found in apex.found
    assert ("TORCH_CUDA_ARCH_LIST" in apex.remedy) == (state is State.BROKEN)


@pytest.mark.parametrize("difference", [1e-3, math.nan])
def test_a_difference_that_is_no_rounding_is_not_believed(difference, installed, gpu, monkeypatch):
    installed(nvidia(STAND_IN))
    monkeypatch.setattr(optimizers, "_difference", lambda name, device: difference)
    assert probe(CPU).state is State.BROKEN


def test_apex_is_tried_on_the_device_of_this_process(installed, gpu, monkeypatch):
    installed(nvidia(STAND_IN))
    tried = []
    monkeypatch.setattr(optimizers, "_difference", lambda name, device: tried.append((name, str(device))) or 0.0)
    probe(torch.device("cuda:3"))
    assert tried == [("adam", "cuda:3"), ("adamw", "cuda:3"), ("lamb", "cuda:3")]


def test_gradients_of_another_layout_are_matched_before_apex_sees_them(installed):
    installed(nvidia(STAND_IN))
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    optimizer = make_optimizer(
        "adam", [{"params": [weight], "weight_decay": 0.0}], backend="apex", lr=0.1, momentum=0.0
    )
    gradient = torch.randn(2, 3, 4, 4)
    weight.grad = gradient.clone()
    optimizer.step()
    assert weight.grad.stride() == weight.stride()
    assert torch.equal(weight.grad, gradient)


def fixed_probe(monkeypatch, state):
    monkeypatch.setattr(optimizers, "probe", lambda *_: Apex(state, "it was found so", "do that"))


@pytest.mark.parametrize("state", list(State))
def test_asking_for_apex_that_is_not_ready_says_what_to_do(monkeypatch, state):
    fixed_probe(monkeypatch, state)
    if state is State.READY:
        assert choose_backend("lamb", "apex", CUDA) == "apex"
        return
    with pytest.raises(BadInput, match=r"found so.*do that"):
        choose_backend("lamb", "apex", CUDA)


@pytest.mark.parametrize("state", list(State))
def test_auto_takes_apex_only_for_what_torch_has_not(monkeypatch, state):
    fixed_probe(monkeypatch, state)
    ready = "apex" if state is State.READY else "torch"
    assert [choose_backend(name, "auto", CUDA) for name in NAMES] == ["torch", "torch", "torch", ready]
    assert choose_backend("lamb", "auto", CPU) == "torch"


def test_apex_is_refused_on_a_cpu(monkeypatch):
    fixed_probe(monkeypatch, State.READY)
    with pytest.raises(BadInput, match="CUDA alone"):
        choose_backend("lamb", "apex", CPU)


def test_sgd_is_never_given_to_apex():
    with pytest.raises(BadInput, match="FusedSGD"):
        choose_backend("sgd", "apex", CUDA)
