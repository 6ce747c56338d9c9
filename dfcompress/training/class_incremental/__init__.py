"""Methods by which a classifier learns new classes, one file each.

A file holds a `Distiller`, and `METHOD`, what the method does where nothing else is asked for.
This list imports no torch, because help must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal, get_args

from dfcompress.errors import unknown

if TYPE_CHECKING:
    from dfcompress.training.class_incremental.method import IncrementalMethod

MethodName = Literal["abd", "deepinversion", "lwf-mc", "rdfcil", "oracle"]
METHODS = get_args(MethodName)
DEFAULT: MethodName = "abd"


def incremental_method(name: str) -> IncrementalMethod:
    """The method of that name; raises `BadInput` where there is none."""
    if name not in METHODS:
        raise unknown("method of extension", name, list(METHODS))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    method: IncrementalMethod = module.METHOD
    return method
