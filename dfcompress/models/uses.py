"""Which operations of a forward pass take which tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfcompress.models.classifier import Classifier, pass_once


def place(tensor: Tensor) -> int:
    """Tells tensors apart that are alive at the same time; a view has the place of its base."""
    address: int = tensor.untyped_storage()._cdata
    return address


class Uses(TorchDispatchMode):
    """Counts inside how many operations take what lies in each place, and keeps all tensors alive."""

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
    """Bytes of the parameters that no operation of an evaluation pass takes, by the largest modules that hold no other
    parameters (an auxiliary head, say).
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
