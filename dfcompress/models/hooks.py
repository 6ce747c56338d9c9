"""Functions that see what passes through some modules of a network, for the time of a context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from dfcompress.models.classifier import Classifier, pass_once

MANY = 1_000_000
Hook = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]
InputHook = Callable[[str, Tensor], Tensor | None]


@contextmanager
def hooked(network: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """Call `hook(name, module, input, output)` whenever a named module has run; what it returns becomes the output."""
    with ExitStack() as stack:
        for name in names:

            def run(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> Tensor | None:
                return hook(name, module, inputs[0], output)

            stack.callback(network.get_submodule(name).register_forward_hook(run).remove)
        yield


@contextmanager
def hooked_inputs(network: nn.Module, names: Iterable[str], hook: InputHook) -> Iterator[None]:
    """Call `hook(name, input)` whenever a named module is about to run; what it returns becomes the input."""
    with ExitStack() as stack:
        for name in names:

            def run(module: nn.Module, inputs: Any, name: str = name) -> Tensor | None:
                return hook(name, inputs[0])

            stack.callback(network.get_submodule(name).register_forward_pre_hook(run).remove)
        yield


def count_runs(classifier: Classifier, names: Iterable[str]) -> Counter[str]:
    """How often one forward pass runs each named module with one tensor in and one out, in the order of the first runs;
    other runs count as many.
    """
    runs: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., None]:
        def count(module: nn.Module, given: Any, named: Any, output: Any) -> None:
            plain = len(given) == 1 and not named and isinstance(given[0], Tensor) and isinstance(output, Tensor)
            runs[name] += 1 if plain else MANY

        return count

    modules = [(name, classifier.network.get_submodule(name)) for name in names]
    pass_once(classifier, [module.register_forward_hook(counting(name), with_kwargs=True) for name, module in modules])
    return runs
