"""Count the operations of a forward pass that read each tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfcompress.models.classifier import Classifier, pass_once


def place(tensor: Tensor) -> int:
    """A number that identifies a tensor's memory while it is alive; a view has the same number as its base."""
    address: int = tensor.untyped_storage()._cdata
    return address


class Uses(TorchDispatchMode):
    """Counts, within its context, the operations that read the memory at each `place`, and keeps all tensors alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.count: Counter[int] = Counter()
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        self.count.update({place(each) for each in given})
        result = func(*args, **(kwargs or {}))
        self._alive += [given, result]
        return result


def unused_weights(classifier: Classifier) -> dict[str, int]:
    """The bytes of the parameters that no operation of an evaluation pass reads.

    Keyed by the name of the largest module that holds only such parameters (an auxiliary head, say).
    """
    with Uses() as uses:
        pass_once(classifier)
    parameters = dict(classifier.network.named_parameters())
    unused = {name for name, parameter in parameters.items() if not uses.count[place(parameter)]}
    found: Counter[str] = Counter()
    for name in (each for each in parameters if each in unused):
        parts = name.split(".")
        wholes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        whole = next(each for each in wholes if not _inside(each, parameters.keys() - unused))
        found[whole] += parameters[name].nbytes
    return dict(found)


def _inside(whole: str, names: set[str]) -> bool:
    return any(name == whole or name.startswith(f"{whole}.") for name in names)
