"""What is resolved from `auto`, and what is refused."""

from __future__ import annotations

import contextlib
import sysconfig
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfcompress import console, device
from dfcompress.device import (
    Compute,
    Execution,
    can_compile,
    computing,
    exact_fp32,
    missing_to_compile,
    resolve_device,
    resolve_execution,
    resolve_precision,
    threads,
    tried,
)
from dfcompress.distributed import World
from dfcompress.errors import BadInput

CPU = torch.device("cpu")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine whose PATH is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


LONG, SHORT = 1e15, 1e9  # Work.


def test_a_long_job_is_compiled_and_a_short_one_is_not():
    compute = Compute(device="cpu", precision="fp32")
    assert resolve_execution(compute, LONG, steps=1000).compile
    assert not resolve_execution(compute, SHORT, steps=1000).compile
    assert not resolve_execution(compute, LONG, steps=1000, sizes=1000).compile


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_job_runs_eagerly_and_says_so_once(capsys):
    console.configure(console.NORMAL)
    execution = resolve_execution(Compute(device="cpu", precision="fp32"), LONG, steps=1000)
    console.configure(console.QUIET)
    assert not execution.compile
    assert capsys.readouterr().err.count("No C++ compiler found") == 1


@pytest.mark.usefixtures("no_compiler")
def test_asking_to_compile_without_a_compiler_is_refused():
    assert not can_compile(CPU)
    with pytest.raises(BadInput, match=r"Install g\+\+"):
        resolve_execution(Compute(device="cpu", precision="fp32", compile="on"), LONG, steps=1000)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(BadInput, match="--device"):
        resolve_device(name)


def test_auto_precision_is_bf16_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr("dfcompress.device._cpu_multiplies_bf16", lambda: False)
    assert resolve_precision("auto", CPU) == torch.float32
    monkeypatch.setattr("dfcompress.device._cpu_multiplies_bf16", lambda: True)
    assert resolve_precision("auto", CPU) == torch.bfloat16


def in_bf16(compute: Compute):
    return replace(resolve_execution(compute, SHORT, steps=1000), precision="bf16")


def mixed(execution) -> None:
    if execution.precision != "fp32":
        raise RuntimeError("index_add_(): self (Float) and source (BFloat16) must have the same scalar type.\nmore")


def spoilt(execution) -> None:
    """What autograd says of a layer that overwrites what another one keeps for its gradient."""
    images = torch.ones(1, requires_grad=True)
    nn.Sequential(nn.Sigmoid(), nn.ELU(inplace=True))(images).backward()


def test_a_precision_that_was_chosen_here_and_fails_becomes_fp32_with_one_notice(capsys):
    compute = Compute(device="cpu", precision="auto", compile="off")
    console.configure(console.NORMAL)
    assert tried(in_bf16(compute), compute, mixed, what="net").precision == "fp32"
    console.configure(console.QUIET)
    said = capsys.readouterr().err
    assert "net cannot be computed in bf16: index_add_(): self (Float) and source (BFloat16)" in said
    assert "It runs in fp32." in said
    assert "more" not in said


def test_a_precision_that_works_is_kept_and_nothing_else_is_tried():
    compute = Compute(device="cpu", precision="auto", compile="off")
    for execution in (in_bf16(compute), replace(in_bf16(compute), precision="fp32")):
        tries = []
        assert tried(execution, compute, tries.append, what="net") == execution
        assert tries == [execution]


def test_a_precision_that_the_user_chose_and_that_fails_is_refused():
    compute = Compute(device="cpu", precision="bf16", compile="off")
    with pytest.raises(BadInput, match="net cannot be computed in bf16") as refused:
        tried(in_bf16(compute), compute, mixed, what="net")
    assert "--precision auto" in refused.value.remedy


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp32"])
def test_a_network_whose_layers_spoil_its_gradient_is_refused_for_that_whatever_the_precision(asked):
    compute = Compute(device="cpu", precision=asked, compile="off")
    execution = replace(in_bf16(compute), precision="fp32" if asked == "fp32" else "bf16")
    with pytest.raises(BadInput, match=r"^net cannot be differentiated: .*inplace operation") as refused:
        tried(execution, compute, spoilt, what="net")
    assert "anomaly" not in str(refused.value)
    assert "inplace=False" in refused.value.remedy


def test_a_network_that_fails_in_fp32_too_is_refused_without_a_word_on_precision():
    def broken(execution):
        raise TypeError("unsupported operand")

    compute = Compute(device="cpu", precision="auto", compile="off")
    with pytest.raises(BadInput, match=r"^net cannot run in any precision: unsupported operand") as refused:
        tried(in_bf16(compute), compute, broken, what="net")
    assert "inplace" not in refused.value.remedy
    assert "--precision" not in refused.value.remedy


def test_too_little_memory_is_no_reason_for_another_precision():
    def full(execution) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    compute = Compute(device="cpu", precision="auto", compile="off")
    assert tried(in_bf16(compute), compute, full, what="net").precision == "bf16"


def test_a_torch_without_the_private_names_of_the_allocator_still_runs_without_a_graph(monkeypatch):
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.delattr(torch._C, name, raising=False)
    device._leave_pool(0, None)


CUDA = torch.device("cuda")


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes this process see so many GPUs, as the given one of several."""

    def see(count, rank=0, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(device, "world", lambda: World(rank, processes, rank, processes))

    return see


@pytest.mark.parametrize(("seen", "expected"), [(1, "cuda:0"), (2, "cuda:1"), (3, "cuda:0"), (8, "cuda:3")])
def test_processes_take_the_gpus_they_see_in_turn(gpus, seen, expected):
    """Under `srun --gpus-per-task=1` every process sees one; a machine may have fewer than processes."""
    gpus(seen, rank=3, processes=4)
    assert str(resolve_device("auto")) == expected
    assert device.as_mine("cuda:0") == expected
    assert device.as_mine("cpu") == "cpu"


def test_a_process_without_a_gpu_in_a_job_on_gpus_says_so(gpus):
    gpus(0, rank=1, processes=2)
    with pytest.raises(BadInput, match="process 1 sees no CUDA device"):
        device.as_mine("cuda:0")


@pytest.mark.parametrize(("seen", "remedy"), [(0, "--device cpu"), (1, "--device auto")])
def test_the_remedy_for_a_gpu_that_is_not_there_can_be_followed(gpus, seen, remedy):
    gpus(seen)
    with pytest.raises(BadInput, match=f"sees {seen} CUDA devices.*{remedy}"):
        resolve_device("cuda:5")


def test_processes_that_share_a_gpu_do_not_take_nccl():
    assert device.collective_backend(["a/0", "a/1", "b/0"]) == "nccl"
    assert device.collective_backend(["a/0", "a/1", "a/0"]) == "gloo"
    assert device.collective_backend(["cpu", "cpu"]) == "gloo"


def test_on_cuda_short_jobs_are_captured_without_being_compiled(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in 9000")
    monkeypatch.setattr(device, "missing_to_compile", lambda device: None)
    short, off = (
        resolve_execution(Compute(device="cuda", precision="bf16", compile=way), SHORT, steps=1000)
        for way in ("auto", "off")
    )
    assert (short.capture, short.compile) == (True, False)
    assert (off.capture, off.compile) == (False, False)


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
        steady = {"deterministic": True, "benchmark": False}
        assert arithmetic_settings() == (EXACT if precision == "fp32" else users_settings | steady)
    assert arithmetic_settings() == users_settings
    assert torch.get_num_threads() == threads


@pytest.fixture
def two_threads(monkeypatch):
    """A process that computes in two threads and whose user has not said so by OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    with threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
def test_small_steps_have_one_thread_and_large_ones_all(monkeypatch):
    compute = Compute(device="cpu", compile="off")
    assert resolve_execution(compute, 2e12, steps=1000).threads == 1
    assert resolve_execution(compute, 2e12, steps=10).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert resolve_execution(compute, 2e12, steps=1000).threads == 2


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_allocations_that_fail_inside_cuda_count_as_out_of_memory(message, is_memory):
    assert device.is_out_of_memory(RuntimeError(message)) == is_memory


@pytest.mark.parametrize(("place", "missing"), [(CUDA, "C compiler"), (CPU, "C++ compiler")])
def test_compiling_needs_a_compiler_on_every_device(place, missing, no_compiler, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)
    assert missing_to_compile(place) == missing


def test_compiling_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "compiler", lambda: "g++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_to_compile(CPU) == "Python header"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp64"}, "There is no --precision 'fp64'"),
        ({"compile": "maybe"}, "There is no --compile 'maybe'"),
        ({"seed": -1}, "--seed -1 is negative"),
    ],
)
def test_settings_of_computing_that_cannot_be_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        device.Compute(**settings)


DEPTHWISE_STRIDED = {"stride": 2, "padding": 1, "groups": 8}


@pytest.mark.skipif(not device.can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_the_gradient_of_a_strided_depthwise_convolution_in_bf16_is_compiled_as_one_in_fp32(monkeypatch):
    """bf16 has no fast kernel for it; the values are those of the eager network but for bf16's rounding."""
    seen = []

    def spied(gradient, *arguments, usual):
        seen.append((gradient.dtype, tuple(arguments[1].shape)))
        return ours(gradient, *arguments, usual=usual)

    ours = device._convolution_backward
    monkeypatch.setattr(device, "_convolution_backward", spied)
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, **DEPTHWISE_STRIDED))
    network.to(torch.bfloat16).requires_grad_(False)
    images = torch.randn(2, 3, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    total = device.compiled(lambda shown: network(shown).float().square().sum())
    expected = torch.autograd.grad(network(images).float().square().sum(), images)[0]
    found = torch.autograd.grad(total(images), images)[0]
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert set(seen) >= {(torch.bfloat16, (8, 1, 3, 3)), (torch.bfloat16, (8, 3, 3, 3))}


@pytest.mark.parametrize(
    ("channels", "settings", "dtype", "in_fp32"),
    [
        (8, DEPTHWISE_STRIDED, torch.bfloat16, True),
        (8, DEPTHWISE_STRIDED, torch.float32, False),
        (8, {**DEPTHWISE_STRIDED, "stride": 1}, torch.bfloat16, False),
        (8, {**DEPTHWISE_STRIDED, "groups": 2}, torch.bfloat16, False),
    ],
)
def test_gradients_that_bf16_has_kernels_for_stay_in_bf16(channels, settings, dtype, in_fp32):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, **settings).to(dtype)
    features = torch.randn(2, channels, 9, 9, dtype=dtype, requires_grad=True)
    output = layer(features)
    left = []
    found = device._convolution_backward(
        torch.ones_like(output),
        features,
        layer.weight,
        [channels],
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0, 0],
        layer.groups,
        [True, False, False],
        usual=lambda *arguments: left.append(arguments),
    )
    assert bool(left) != in_fp32
    if in_fp32:
        expected = torch.autograd.grad(output, features, torch.ones_like(output))[0]
        assert found[0].dtype == dtype
        assert (found[0] - expected).norm() < 0.01 * expected.norm()


def test_a_function_is_compiled_more_often_than_torch_would_in_one_process(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(console, "notice", told.append)
    monkeypatch.setattr(device, "_inductor", lambda graph, inputs: graph.forward)

    def doubled(values: torch.Tensor) -> torch.Tensor:
        return 2 * values

    fast = device.compiled(doubled)
    for length in range(2, 14):
        assert fast(torch.ones(length)).tolist() == [2.0] * length
    assert told == []
