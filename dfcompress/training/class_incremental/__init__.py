"""Methods by which a classifier learns new classes, one file each.

Each file defines a `Distiller`, and `METHOD`, which holds the defaults of the method.
This module does not import torch, so that `--help` can list the methods without it.
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
    """The class-incremental method of this name; raises `BadInput` for an unknown name."""
    if name not in METHODS:
        raise unknown("method of extension", name, list(METHODS))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    method: IncrementalMethod = module.METHOD
    return method
