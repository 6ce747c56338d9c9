"""Functions that observe the inputs and outputs of modules of a network: only this file registers hooks.

    with hooked_inputs(network, ["layer1.0"], lambda name, features: print(name, features.mean())):
        network(images)
    with kept_outputs(network, ["conv1", "fc"], outputs.__setitem__):
        network(images)                                       # outputs["conv1"] stays what it was

A hook receives the network's own tensor. An in-place layer after the hooked module, or the hooked module itself if it
works in place, overwrites that tensor later: a hook may compute with the tensor at once, but must copy values that are
used afterwards. So input hooks run before their module, and `kept_outputs` passes copies.
Hooks get the module's name, because names survive a copy of the network; register them before the network is compiled.
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
    """Call `hook(name, input)` before a named module runs; a value that the hook returns replaces the input.

    The input is the module's first argument, by position or by keyword. The hooks stay for the life of the network, or
    until the returned handles are removed.
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
    """Call `hook(name, output)` after a named module has run; a value that the hook returns replaces the output.

    The hooks stay for the life of the network, or until the returned handles are removed.
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
    The hooks stay for the life of the network, or until the returned handles are removed.
    """

    def copied(name: str, output: Tensor) -> None:
        keep(name, output.to(dtype or output.dtype, copy=True))

    return hook_outputs(network, names, copied)


@contextmanager
def hooked_inputs(network: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """`hook_inputs` within this context."""
    with _removed(hook_inputs(network, names, hook)):
        yield


@contextmanager
def hooked_outputs(network: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """`hook_outputs` within this context."""
    with _removed(hook_outputs(network, names, hook)):
        yield


@contextmanager
def kept_outputs(
    network: nn.Module, names: Iterable[str], keep: Callable[[str, Tensor], object], *, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """`keep_outputs` within this context."""
    with _removed(keep_outputs(network, names, keep, dtype=dtype)):
        yield


@contextmanager
def hooked_calls(
    network: nn.Module, names: Iterable[str], hook: Callable[[str, Call, Any, Any], object]
) -> Iterator[None]:
    """Within this context, call `hook(name, call, input, output)` after a named module has run.

    `call(features)` runs the module again with `features` as its first argument and the other arguments unchanged; no
    hook of this context is called then. A module that receives its first argument by keyword is left out.
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
    """Within this context, count the runs of each named module, in the order of the first runs.

    A run with one tensor as its only argument and one tensor as output counts 1, every other run `MANY`.
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
