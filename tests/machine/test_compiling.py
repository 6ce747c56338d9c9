"""What compiling needs, what is compiled differently, and what happens where it fails."""

from __future__ import annotations

import sysconfig

import pytest
import torch
from torch import nn
from torch._functorch import config

from dfcompress import console
from dfcompress.machine import compiling
from dfcompress.machine.compiling import _convolution_backward, _leave_pool, can_compile, compiled, missing_to_compile

CPU = torch.device("cpu")


def test_a_torch_without_the_private_names_of_the_allocator_still_runs_without_a_graph(monkeypatch):
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.delattr(torch._C, name, raising=False)
    _leave_pool(0, None)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(("place", "missing"), [(CUDA, "C compiler"), (CPU, "C++ compiler")])
def test_compiling_needs_a_compiler_on_every_device(place, missing, no_compiler, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    assert missing_to_compile(place) == missing


def test_compiling_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "compiler", lambda: "g++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_to_compile(CPU) == "Python header"


DEPTHWISE_STRIDED = {"stride": 2, "padding": 1, "groups": 8}


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_the_gradient_of_a_strided_depthwise_convolution_in_bf16_is_compiled_as_one_in_fp32(monkeypatch):
    """bf16 has no fast kernel for it; the values are those of the eager network but for bf16's rounding."""
    seen = []

    def spied(gradient, *arguments, usual):
        seen.append((gradient.dtype, tuple(arguments[1].shape)))
        return ours(gradient, *arguments, usual=usual)

    ours = _convolution_backward
    monkeypatch.setattr(compiling, "_convolution_backward", spied)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, **DEPTHWISE_STRIDED))
    network.to(torch.bfloat16).requires_grad_(False)
    images = torch.randn(2, 3, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    total = compiled(lambda shown: network(shown).float().square().sum())
    expected = torch.autograd.grad(network(images).float().square().sum(), images)[0]
    with config.patch(enable_autograd_cache=False):
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
    found = _convolution_backward(
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
    monkeypatch.setattr(compiling, "_inductor", lambda graph, inputs: graph.forward)

    def doubled(values: torch.Tensor) -> torch.Tensor:
        return 2 * values

    fast = compiled(doubled)
    for length in range(2, 14):
        assert fast(torch.ones(length)).tolist() == [2.0] * length
    assert told == []


@pytest.mark.parametrize("works", [True, False])
def test_calls_are_replayed_after_a_few_with_the_same_shapes(works, monkeypatch):
    captures = []
    monkeypatch.setattr(compiling, "captured", lambda step: captures.append(step) or (step if works else None))
    replayed, launched = compiling.Replayed(), []

    def doubled(numbers):
        launched.append(numbers)
        return 2 * numbers

    for length in (4, 4, 4, 4, 4, 2, 2, 2, 2, 2):
        numbers = torch.rand(length)
        assert torch.equal(replayed(doubled, numbers), 2 * numbers)
    assert len(captures) == 2
    # Replays read the same memory: the last two calls with each length.
    assert [launched[i] is launched[i + 1] for i in (3, 8)] == [works] * 2
