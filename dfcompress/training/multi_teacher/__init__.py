"""Methods by which several teachers teach one student, one file each.

Each file defines a `Distiller`, and `METHOD`, which holds the defaults of the method.
This module does not import torch, so that `--help` can list the methods without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal, get_args

from dfcompress.errors import unknown

if TYPE_CHECKING:
    from dfcompress.training.multi_teacher.method import MergingMethod

MethodName = Literal["logit-matching", "shapira-sidi", "all-logits", "paper"]
ALIASES = {"all-logits": "logit-matching", "paper": "shapira-sidi"}  # The names in version 0.1.
NAMES = get_args(MethodName)
METHODS = tuple(name for name in NAMES if name not in ALIASES)


def method_name(name: str) -> str:
    """The current name of a method that is given by its name or an alias; raises `BadInput` for an unknown name."""
    if name not in NAMES:
        raise unknown("merging method", name, list(METHODS))
    return ALIASES.get(name, name)


def merging_method(name: str) -> MergingMethod:
    """The merging method of this name or alias; raises `BadInput` for an unknown name."""
    module = importlib.import_module(f"{__name__}.{method_name(name).replace('-', '_')}")
    method: MergingMethod = module.METHOD
    return method
