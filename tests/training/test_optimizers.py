"""Optimisers against their formulas in double precision, and the probe of apex against stand-in packages."""

from __future__ import annotations

import copy
import math
import sys
import textwrap

import pytest
import torch
from torch import nn

from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.device import Execution
from dfcompress.distributed import World
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.training import apex_probe, optimizers
from dfcompress.training.apex_probe import Apex, State, probe
from dfcompress.training.distiller import Distillation
from dfcompress.training.objectives import kd
from dfcompress.training.optimizers import NAMES, choose_backend, make_optimizer
from dfcompress.training.settings import Training
from dfcompress.training.steps import Steps

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


def novograd_by_hand(weight_decay):
    w, m, v = START.double(), 0.0, GRADIENTS[0].double().square().sum()
    for t, g in enumerate(GRADIENTS.double(), 1):
        v = 0.98 * v + 0.02 * g.square().sum()
        m = 0.95 * m + 0.05 * g
        w = w - 0.1 * (m / (1 - 0.95**t) / ((v / (1 - 0.98**t)).sqrt() + 1e-8) + weight_decay * w)
    return w


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "by_hand"), [("lamb", lamb_by_hand), ("novograd", novograd_by_hand)])
def test_own_optimisers_follow_their_formulas(name, by_hand, weight_decay):
    torch.testing.assert_close(stepped(name, weight_decay).double(), by_hand(weight_decay), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_finds_the_minimum_of_a_parabola(name):
    weight = nn.Parameter(torch.tensor([[3.0, -2.0]]))
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = make_optimizer(name, groups, backend="torch", lr=0.02, momentum=0.9)
    for _ in range(400):
        optimizer.zero_grad()
        (weight - torch.tensor([[1.0, 1.0]])).square().sum().backward()
        optimizer.step()
    assert (weight - 1).abs().max() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_an_optimisers_state_survives_saving(name, tmp_path):
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

    assert torch.equal(run(stop=2), run(stop=None))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs stand-in files in front of everything, and a fresh probe."""

    def install(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    monkeypatch.syspath_prepend(str(tmp_path))
    apex_probe.probe.cache_clear()
    yield install
    apex_probe.probe.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU; what would run on it runs on the CPU."""
    monkeypatch.setattr(apex_probe, "has_cuda", lambda: True)
    monkeypatch.setattr(apex_probe, "processor_name", lambda device: "Stand-in 9000")


NVIDIA = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": ""}


def agrees(device):
    return 0.0


def test_no_apex_is_absent(installed):
    assert probe(agrees, CPU).state is State.ABSENT


def test_the_web_toolkit_of_the_same_name_is_the_wrong_package_and_is_not_run(installed):
    installed({"apex/__init__.py": "raise SystemExit('executed')"})
    found = probe(agrees, CPU)
    assert found.state is State.WRONG_PACKAGE
    assert "pip uninstall apex" in found.remedy


def test_apex_without_a_gpu(installed, monkeypatch):
    monkeypatch.setattr(apex_probe, "has_cuda", lambda: False)
    installed(NVIDIA)
    assert probe(agrees, CPU).state is State.NO_GPU


def test_a_build_without_extensions_is_python_only(installed, gpu):
    installed({name: text for name, text in NVIDIA.items() if name != "amp_C.py"})
    assert probe(agrees, CPU).state is State.PYTHON_ONLY


def test_extensions_of_another_torch_are_an_abi_mismatch(installed, gpu):
    installed(NVIDIA | {"amp_C.py": "raise ImportError('amp_C.so: undefined symbol: _ZN3c10')"})
    found = probe(agrees, CPU)
    assert found.state is State.ABI_MISMATCH
    assert "undefined symbol" in found.found


def test_kernels_for_other_gpus_are_the_wrong_architecture(installed, gpu):
    def fails(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    installed(NVIDIA)
    found = probe(fails, CPU)
    assert found.state is State.WRONG_ARCHITECTURE
    assert "TORCH_CUDA_ARCH_LIST" in found.remedy


@pytest.mark.parametrize("difference", [1e-3, math.nan])
def test_wrong_numbers_are_broken(installed, gpu, difference):
    installed(NVIDIA)
    found = probe(lambda device: difference, CPU)
    assert found.state is State.BROKEN
    assert "differ" in found.found


def test_a_failing_import_is_broken(installed, gpu):
    installed(NVIDIA | {"apex/optimizers/__init__.py": "raise ValueError('no such op')"})
    found = probe(lambda device: optimizers._difference("lamb", CPU), CPU)
    assert found.state is State.BROKEN
    assert "no such op" in found.found


# A stand-in whose interface and traps are those of the real one, and whose arithmetic is torch's or ours.
STAND_IN = """
    import math
    import torch
    from dfcompress.training.optimizers import Lamb, NovoGrad

    class FusedLAMB(Lamb):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0):
            assert max_grad_norm == math.inf, "would cut the gradient's norm"
            super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    class FusedNovoGrad(NovoGrad):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
            super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

        def zero_grad(self):
            super().zero_grad()

        def step(self):
            super().step()
            for group in self.param_groups:
                group["exp_avg_sq"] = []

        def load_state_dict(self, state):
            super().load_state_dict(state)
            for group in self.param_groups:
                group["exp_avg_sq"]

    def FusedAdam(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        family = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
        return family(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
"""


@pytest.mark.parametrize("steps", [0, 2])
def test_a_training_by_apex_resumes_from_every_step_also_from_before_the_first(steps, installed, tmp_path):
    """apex's NovoGrad reads state that it makes in its first step; the choices of a run are saved before."""
    installed(NVIDIA | {"apex/optimizers/__init__.py": STAND_IN})
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    card = ModelCard("tiny", 2, (1, 2, 2), (0.5,), (0.25,))
    training = Training(steps=3, lr=0.01, batch_size=4, optimizer="novograd")

    def taken(count, state=None):
        student = Classifier(copy.deepcopy(network), card)
        teaching = Distillation(Classifier(network, card), [kd(1.0)])
        pool = ImagePool(torch.full((8, 1, 2, 2), 9, dtype=torch.uint8), augmentation=Augmentation(), batch_size=4)
        execution = Execution("cpu", "fp32", False, 1, "")
        made = Steps(student, teaching, training, pool, execution, backend="apex", seed=0, everyone=World())
        if state:
            made.load(torch.load(state, weights_only=True))
        for _ in range(count):
            made.take()
        return made

    taken(steps).save(tmp_path / "state")
    resumed, whole = taken(3 - steps, tmp_path / "state"), taken(3)
    for got, wanted in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_apex_is_tried_on_the_device_of_this_process(installed, gpu):
    installed(NVIDIA)
    tried = []
    probe(lambda device: tried.append(device) or 0.0, torch.device("cuda:3"))
    assert tried == [torch.device("cuda:3")]


def test_apex_is_ready_once_three_steps_agree_with_torch(installed, gpu):
    installed(NVIDIA | {"apex/optimizers/__init__.py": STAND_IN})
    assert probe(optimizers.disagreement, CPU).state is State.READY


def test_a_stand_in_that_decays_otherwise_is_found_out(installed, gpu):
    installed(NVIDIA | {"apex/optimizers/__init__.py": STAND_IN.replace("if adam_w_mode", "if True")})
    assert probe(optimizers.disagreement, CPU).state is State.BROKEN


def test_gradients_of_another_layout_are_matched_before_apex_sees_them(installed):
    installed(NVIDIA | {"apex/optimizers/__init__.py": STAND_IN})
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
    assert [choose_backend(name, "auto", CUDA) for name in NAMES] == ["torch", "torch", "torch", ready, ready]
    assert choose_backend("lamb", "auto", CPU) == "torch"


def test_apex_is_refused_on_a_cpu(monkeypatch):
    fixed_probe(monkeypatch, State.READY)
    with pytest.raises(BadInput, match="CUDA alone"):
        choose_backend("lamb", "apex", CPU)


def test_sgd_is_never_given_to_apex():
    with pytest.raises(BadInput, match="FusedSGD"):
        choose_backend("sgd", "apex", CUDA)
