"""Methods by which several teachers teach one student, one file each.

A file holds a `Distiller`, and `METHOD`, what the method does where nothing else is asked for.
This list imports no torch, because help must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal, get_args

from dfcompress.errors import unknown

if TYPE_CHECKING:
    from dfcompress.training.multi_teacher.method import MergingMethod

MethodName = Literal["logit-matching", "shapira-sidi", "all-logits", "paper"]
ALIASES = {"all-logits": "logit-matching", "paper": "shapira-sidi"}  # As version 0.1 called them.
NAMES = get_args(MethodName)
METHODS = tuple(name for name in NAMES if name not in ALIASES)


def method_name(name: str) -> str:
    """The name of a method, which may be given by an alias; raises `BadInput` where there is none."""
    if name not in NAMES:
        raise unknown("merging method", name, list(METHODS))
    return ALIASES.get(name, name)


def merging_method(name: str) -> MergingMethod:
    """The method of that name or alias; raises `BadInput` where there is none."""
    module = importlib.import_module(f"{__name__}.{method_name(name).replace('-', '_')}")
    method: MergingMethod = module.METHOD
    return method
