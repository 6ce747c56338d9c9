"""Functions that see what passes through some modules of a network: the one place that registers hooks.

    with hooked_inputs(network, ["layer1.0"], lambda name, features: print(name, features.mean())):
        network(images)
    with kept_outputs(network, ["conv1", "fc"], outputs.__setitem__):
        network(images)                                       # outputs["conv1"] stays what it was

A hook is shown the network's own tensor. An in-place layer behind the hooked module, or the module itself where it
works on its input, writes into that tensor later: what a hook computes at once is right, and what shall outlast the
hook must be a copy. So an input is always seen before its module runs, and `kept_outputs` hands out copies.
Hooks are called by name, because names survive a copy of the network; they must be there before it is compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MANY = 1_000_000
Hook = Callable[[str, Any], Any]
Call = Callable[[Any], Any]


def hook_inputs(network: nn.Module, names: Iterable[str], hook: Hook) -> list[RemovableHandle]:
    """Call `hook(name, input)` before a named module runs; a value that it returns takes the input's place.

    The input is the module's first argument, by position or by keyword. For the life of the network, or until the
    handles are removed.
    """

    def before(name: str) -> Callable[..., tuple[Any, Any] | None]:
        def run(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
            if arguments:
                replacement = hook(name, arguments[0])
                return None if replacement is None else ((replacement, *arguments[1:]), named)
            key = next(iter(named))
            replacement = hook(name, named[key])
            return None if replacement is None else ((), {**named, key: replacement})

        return run

    modules = [(name, network.get_submodule(name)) for name in names]
    return [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in modules]


def hook_outputs(network: nn.Module, names: Iterable[str], hook: Hook) -> list[RemovableHandle]:
    """Call `hook(name, output)` after a named module has run; a value that it returns takes the output's place.

    For the life of the network, or until the handles are removed.
    """

    def after(name: str) -> Callable[..., Any]:
        return lambda module, arguments, output: hook(name, output)

    modules = [(name, network.get_submodule(name)) for name in names]
    return [module.register_forward_hook(after(name)) for name, module in modules]


def keep_outputs(
    network: nn.Module, names: Iterable[str], keep: Callable[[str, Tensor], object], *, dtype: torch.dtype | None = None
) -> list[RemovableHandle]:
    """Call `keep(name, copy)` after a named module has run, with a copy of its output that nothing changes later.

    The copy has the type `dtype`, by default the output's, and carries gradients.
    For the life of the network, or until the handles are removed.
    """

    def copied(name: str, output: Tensor) -> None:
        keep(name, output.to(dtype or output.dtype, copy=True))

    return hook_outputs(network, names, copied)


@contextmanager
def hooked_inputs(network: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """`hook_inputs` for the time of a context."""
    with _removed(hook_inputs(network, names, hook)):
        yield


@contextmanager
def hooked_outputs(network: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """`hook_outputs` for the time of a context."""
    with _removed(hook_outputs(network, names, hook)):
        yield


@contextmanager
def kept_outputs(
    network: nn.Module, names: Iterable[str], keep: Callable[[str, Tensor], object], *, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """`keep_outputs` for the time of a context."""
    with _removed(keep_outputs(network, names, keep, dtype=dtype)):
        yield


@contextmanager
def hooked_calls(
    network: nn.Module, names: Iterable[str], hook: Callable[[str, Call, Any, Any], object]
) -> Iterator[None]:
    """Call `hook(name, call, input, output)` after a named module has run inside: `call(features)` runs it once more,
    the same way but with other features as its first argument. No hook is called meanwhile.

    A module that was given its first argument by keyword is left out.
    """
    calling = False

    def after(name: str) -> Callable[..., None]:
        def run(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            nonlocal calling
            if calling or not arguments:
                return
            calling = True
            try:
                hook(name, lambda features: module(features, *arguments[1:], **named), arguments[0], output)
            finally:
                calling = False

        return run

    modules = [(name, network.get_submodule(name)) for name in names]
    with _removed([module.register_forward_hook(after(name), with_kwargs=True) for name, module in modules]):
        yield


@contextmanager
def counted_runs(network: nn.Module, names: Iterable[str]) -> Iterator[Counter[str]]:
    """How often each named module runs inside with one tensor in and one out, in the order of the first runs; other
    runs count as many.
    """
    runs: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        def run(module: nn.Module, arguments: Any, named: Any, output: Any) -> None:
            plain = (
                len(arguments) == 1 and not named and isinstance(arguments[0], Tensor) and isinstance(output, Tensor)
            )
            runs[name] += 1 if plain else MANY

        return run

    modules = [(name, network.get_submodule(name)) for name in names]
    with _removed([module.register_forward_hook(count(name), with_kwargs=True) for name, module in modules]):
        yield runs


@contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
