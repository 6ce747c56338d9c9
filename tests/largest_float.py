"""How many elements the largest tensor of floats has that any operation makes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestFloat(TorchDispatchMode):
    """Inside, `elements` grows to the size of the largest float32 result, views apart."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return found
