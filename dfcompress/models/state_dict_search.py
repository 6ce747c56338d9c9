"""Find the state dict in the value that a pickle describes, also in the modules and instances that it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeGuard

from dfcompress.models.pickle_machine import Instance, StoredTensor

NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")

MODULES = (
    "torch.nn.modules.",
    "torch.nn.parallel.",
    "torch.optim.swa_utils.",
    "torch._dynamo.eval_frame.",
    "torchvision.models.",
    "torchvision.ops.",
    "timm.models.",
    "timm.layers.",
    "dfcompress.models.",
)

# The largest networks of timm have some thousand modules; a shared module counts at each place, as in a state_dict.
MODULES_AT_MOST = 100_000


@dataclass(frozen=True)
class Found:
    """A state dict that was found in a file.

    `expression` is the Python expression that returns the state dict (None if it cannot be written safely), `strangers`
    are the unknown classes that hold it, and `of_module` is whether a module holds it.
    """

    tensors: dict[str, StoredTensor]
    expression: str | None
    strangers: frozenset[str] = frozenset()
    of_module: bool = False


class Searched(set[int]):
    """The ids of the mappings that were searched already, and the number of modules that were read."""

    modules = 0

    def count_module(self) -> None:
        """Raise `ValueError` above `MODULES_AT_MOST`: nested shared children give a small file any number of names."""
        self.modules += 1
        if self.modules > MODULES_AT_MOST:
            raise ValueError(f"it names more than {MODULES_AT_MOST:,} modules")


def search(value: object, expression: str | None, seen: Searched) -> Found | None:
    """Search a value for a state dict: at the top, in a module, under known keys, in items, or in attributes."""
    if not isinstance(value, dict) or id(value) in seen:
        return None
    seen.add(id(value))
    if _is_module(value):
        tensors, strangers = _of_module(value, seen)
        return Found(tensors, expression and f"{expression}.state_dict()", strangers, True) if tensors else None
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, StoredTensor)}
    if any(len(tensor.size) > 1 or tensor.foreign for tensor in tensors.values()):
        return Found(tensors, expression)
    for key in (*NESTED, *AVERAGED):
        if key in value and (found := search(value[key], _item(expression, key), seen)):
            return found
    found = _only(search(item, _item(expression, key), seen) for key, item in value.items())
    return found or (_inside(value, expression, seen) if isinstance(value, Instance) else None)


def _inside(instance: Instance, expression: str | None, seen: Searched) -> Found | None:
    """The only state dict in the attributes of an instance or in the arguments of its call."""
    attributes = instance.state if isinstance(instance.state, dict) else {}
    found = _only(
        [search(item, _attribute(expression, name), seen) for name, item in attributes.items()]
        + [search(item, None, seen) for item in instance.arguments]
    )
    if found is None or instance.name.startswith(MODULES):
        return found
    return replace(found, strangers=found.strangers | {instance.name})


def _only(found: Iterable[Found | None]) -> Found | None:
    """The only state dict, preferably one without strangers; if strangers hold several, their names and no tensors."""
    every = [each for each in found if each]
    known = [each for each in every if not each.strangers]
    if len(known or every) == 1:
        return (known or every)[0]
    return Found({}, None, frozenset().union(*(each.strangers for each in every))) if every and not known else None


def _is_module(value: object) -> TypeGuard[Instance]:
    return (
        isinstance(value, Instance) and isinstance(value.state, dict) and {"_parameters", "_modules"} <= {*value.state}
    )


def _of_module(module: Instance, seen: Searched) -> tuple[dict[str, StoredTensor], frozenset[str]]:
    """The tensors that `state_dict()` of a pickled module would return, and its and its children's unknown classes."""
    assert isinstance(module.state, dict)
    seen.count_module()
    tensors, strangers = {}, frozenset[str]()
    passing = module.state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (module.state.get(kind) or {}).items():
            if isinstance(tensor, StoredTensor) and name not in passing:
                tensors[name] = tensor
    for name, child in module.state["_modules"].items():
        if _is_module(child):
            inner, theirs = _of_module(child, seen)
            tensors |= {f"{name}.{rest}": tensor for rest, tensor in inner.items()}
            strangers |= theirs
    if tensors and not module.name.startswith(MODULES):
        strangers |= {module.name}
    return tensors, strangers


def _item(expression: str | None, key: object) -> str | None:
    """The expression for an item; None for keys with characters that are special in a shell or in Python."""
    safe = isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", key)
    return f"{expression}['{key}']" if expression and safe else None


def _attribute(expression: str | None, name: object) -> str | None:
    safe = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    return f"{expression}.{name}" if expression and safe else None
